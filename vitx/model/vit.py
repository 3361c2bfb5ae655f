"""The Vision Transformer: `Block`, `Vit`, `build(config)` and the pure `functionalize`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from vitx.model.axes import Function, Image, Mask, Pooled, Read, Tokens, Weights
from vitx.model.config import ModelConfig
from vitx.model.functional.attention import ATTENTION
from vitx.model.functional.drop import drop_patches
from vitx.model.functional.init import INIT, keyed_generator
from vitx.model.functional.mlp import MLP
from vitx.model.functional.norm import NORM
from vitx.model.functional.placement import PLACEMENT
from vitx.model.functional.pool import POOL, READS
from vitx.model.functional.position import POSITION
from vitx.model.layers import (
    PATCHIFY,
    Attention,
    DropPath,
    LayerScale,
    Linear,
    Mlp,
    Norm,
    patch_embedding,
)
from vitx.registry import UserError, resolve


class Block(nn.Module):
    """Transformer block: attention, then MLP, each added to what it read, as `placement` says."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        norm: Function,
        core: Function,
        act: Function,
        placement: Function,
        qkv_bias: bool,
        qk_norm: bool,
        layer_scale: float,
        drop: float,
        core_drop: float,
        drop_path: bool,
    ):
        super().__init__()
        self.placement = placement
        self.norm1 = Norm(width, norm=norm)
        self.attn = Attention(
            width,
            heads,
            core=core,
            bias=qkv_bias,
            qk_norm=norm if qk_norm else None,
            drop=drop,
            core_drop=core_drop,
        )
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.drop_path1 = DropPath() if drop_path else nn.Identity()
        self.norm2 = Norm(width, norm=norm)
        self.mlp = Mlp(width, hidden, act=act, drop=drop)
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.drop_path2 = DropPath() if drop_path else nn.Identity()

    def forward(
        self, tokens: Tokens, *, queries: int | None = None, mask: Mask | None = None
    ) -> Read:
        x = self.placement(tokens, self.norm1, self.attend, queries=queries, mask=mask)
        return self.placement(x, self.norm2, self.feed)

    def attend(self, tokens: Tokens, *, queries: int | None, mask: Mask | None) -> Read:
        """What the attention branch adds to the first `queries` tokens."""
        return self.drop_path1(self.ls1(self.attn(tokens, queries=queries, mask=mask)))

    def feed(self, tokens: Read) -> Read:
        """What the MLP branch adds."""
        return self.drop_path2(self.ls2(self.mlp(tokens)))

    def attention_map(self, tokens: Tokens, *, mask: Mask | None = None) -> Weights:
        """How much each query reads of each key, of what attention gets under this placement."""
        maps: list[Tensor] = []

        def look(x: Tokens) -> Tokens:
            maps.append(self.attn.weights(x, mask=mask))
            return x

        self.placement(tokens, self.norm1, look)
        return maps[0]


class Vit(nn.Module):
    """A Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929).

    Its state dict has the names and shapes of timm's `VisionTransformer`. `build` puts one on a
    device in a dtype.
    """

    pos_embed: Tensor | None

    def __init__(self, config: ModelConfig, *, seed: int = 0):
        super().__init__()
        c = self.config = config
        norm = resolve(c.norm, NORM)
        self.patch_embed = patch_embedding(
            resolve(c.patchify, PATCHIFY), c.channels, c.width, c.patch_size
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.width)) if c.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, c.registers, c.width)) if c.registers else None
        positions = self.positions()
        if isinstance(positions, nn.Parameter):
            self.pos_embed = positions
        else:
            like = next(self.patch_embed.parameters())
            fixed = None if positions is None else positions.to(like)
            self.register_buffer("pos_embed", fixed, persistent=False)
        self.pos_drop = nn.Dropout(c.position_drop)
        block = partial(
            Block,
            c.width,
            c.heads,
            c.hidden,
            norm=norm,
            core=resolve(c.attention, ATTENTION),
            act=resolve(c.mlp, MLP),
            placement=resolve(c.placement, PLACEMENT),
            qkv_bias=c.qkv_bias == "qkv",
            qk_norm=c.qk_norm,
            layer_scale=c.layer_scale,
            drop=c.drop,
            core_drop=c.attention_drop,
            drop_path=c.drop_path > 0,
        )
        self.blocks = nn.ModuleList(block() for _ in range(c.depth))
        self.norm = Norm(c.width, norm=norm) if c.final_norm else nn.Identity()
        self.pool = resolve(c.pool, POOL)
        self.fc_norm = Norm(c.width, norm=norm) if c.fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(c.head_drop)
        self.head = Linear(c.width, c.classes) if c.classes else nn.Identity()
        self.reset_parameters(seed)
        self.reset_buffers()

    def forward(self, image: Image, *, mask: Mask | None = None) -> Float[Tensor, "b out"]:
        """Logits (b, classes), or pooled features (b, d) without a head; mask is over tokens."""
        return self.head(self.head_drop(self.features(image, mask=mask)))

    def features(self, image: Image, *, mask: Mask | None = None) -> Pooled:
        """The pooled and normalised vector (b, d) that the head reads."""
        tokens = self.encode(image, read=READS.get(self.pool), mask=mask)
        return self.fc_norm(self.pool(tokens, prefix=self.config.prefix, mask=mask))

    def encode(self, image: Image, read: int | None = None, *, mask: Mask | None = None) -> Read:
        """The first `read` tokens after the last block and the final norm; all of them if None.

        The last block computes only the queries that are read: the same function, whose values
        differ by rounding in float32 (6e-7) and not in float64.
        """
        if mask is not None and self.training and self.config.patch_drop:
            raise UserError("a mask is over all tokens, but model.patch_drop leaves some out")
        x = self.embed(image)
        *body, last = self.blocks
        for block in body:
            x = block(x, mask=mask)
        return self.norm(last(x, queries=read, mask=mask))

    def embed(self, image: Image) -> Tokens:
        """Class token, registers and patches, with their positions."""
        c = self.config
        if image.shape[1:] != (c.channels, *c.size):
            raise UserError(
                f"image is {tuple(image.shape)}, the model takes "
                f"(batch, {c.channels}, {c.size[0]}, {c.size[1]})"
            )
        x = self.patch_embed(image.to(self.dtype))
        prefix = [
            repeat(token, "1 r d -> b r d", b=x.shape[0])
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        if self.pos_embed is None:
            x = torch.cat([*prefix, x], dim=1)
        elif c.position_tokens == "patches":
            x = torch.cat([*prefix, x + self.pos_embed], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + self.pos_embed
        if self.training and c.patch_drop:
            uniform = torch.rand(x.shape[0], x.shape[1] - c.prefix, device=x.device)
            x = drop_patches(x, uniform, rate=c.patch_drop, prefix=c.prefix)
        return self.pos_drop(x)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; images are computed in it."""
        return next(self.parameters()).dtype

    def attention_maps(
        self, image: Image, *, mask: Mask | None = None
    ) -> Float[Tensor, "depth b heads i j"]:
        """Attention weights of every block, from the queries and keys of the fused path."""
        maps: list[Tensor] = []
        x = self.embed(image)
        for block in self.blocks:
            assert isinstance(block, Block)
            maps.append(block.attention_map(x, mask=mask))
            x = block(x, mask=mask)
        return torch.stack(maps)

    def positions(self) -> Tensor | None:
        """A fresh table of positions (1, n, d): a parameter if it is learned."""
        c = self.config
        prefix = c.prefix if c.position_tokens == "all" else 0
        return resolve(c.position, POSITION)(c.grid, c.width, prefix=prefix)

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Refill what is not in the state dict: fixed positions and drop-path rates."""
        if self.pos_embed is not None and not isinstance(self.pos_embed, nn.Parameter):
            self.pos_embed.copy_(self.positions())  # type: ignore[arg-type]
        for rate, block in zip(_rates(self.config), self.blocks, strict=True):
            for module in block.modules():
                if isinstance(module, DropPath):
                    module.rate.fill_(rate)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw every parameter by the configured init, keyed by (seed, its name), on the CPU."""
        scheme = resolve(self.config.init, INIT)
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            module, _, leaf = name.rpartition(".")
            if leaf == "gamma":  # layer scale starts at its configured value, by no scheme
                parameter.fill_(self.config.layer_scale)
                continue
            weight = self.get_parameter(f"{module}.weight") if leaf == "bias" else parameter
            fan_in = math.prod(weight.shape[1:])
            draw = scheme(name, tuple(parameter.shape), fan_in, keyed_generator(seed, name))
            parameter.copy_(draw)


def build(
    config: ModelConfig,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Vit:
    """A `Vit` in training mode; its parameters depend on `seed` and no device or dtype."""
    with torch.device(device or torch.get_default_device()):
        vit = Vit(config, seed=seed)
    if dtype is not None:
        vit.to(dtype)
        vit.reset_buffers()
    return vit


def functionalize(vit: nn.Module) -> tuple[dict[str, Tensor], Callable[..., Any]]:
    """`params, apply`: `apply(params, image)` is pure and bit-equal to `vit(image)`.

    `params` are detached copies of the parameters by name; buffers and the train or eval state are
    those of `vit` at the call. In training with dropout or drop path the draws are those of the
    device's global generator.
    """
    params = {name: value.detach().clone() for name, value in vit.named_parameters()}

    def apply(params: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(vit, params, args, kwargs)

    return params, apply


def _rates(config: ModelConfig) -> list[float]:
    """Drop-path rates of the blocks, linear from 0 to the configured one."""
    return [config.drop_path * block / max(config.depth - 1, 1) for block in range(config.depth)]
