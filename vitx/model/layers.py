"""Modules that own parameters. They take ints and functions; their names are timm's."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vitx.model.axes import Function, Image, Mask, Read, Tokens, Weights
from vitx.model.functional.attention import WEIGHTS
from vitx.model.functional.drop import drop_path
from vitx.model.functional.patches import conv, unfold
from vitx.registry import Registry, UserError

# einops (0.8) notes each type of tensor when it first meets it. Noted while torch.compile traces,
# that is a guard which fails, and the second call would compile everything again.
for _known in (torch.empty(0, device="cpu"), nn.Parameter(torch.empty(0, device="cpu"))):
    rearrange(_known, "n -> n")


class Linear(nn.Linear):
    """PyTorch's, left unfilled: the model draws every parameter by its own init."""

    bias: nn.Parameter | None  # pyright: ignore[reportIncompatibleVariableOverride]

    def reset_parameters(self) -> None:
        pass


HOOKS = ("forward", "forward_pre", "backward", "backward_pre")
"""Kinds of functions that PyTorch calls beside a module's own `forward`."""


class Conv2d(nn.Conv2d):
    """PyTorch's, left unfilled."""

    def reset_parameters(self) -> None:
        pass


class PatchKernel(Conv2d):
    """A convolution's weights, whose patches do not overlap; `patchify` applies them."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int], *, patchify: Function):
        super().__init__(channels, width, kernel_size=patch, stride=patch)  # pyright: ignore[reportUnknownMemberType]
        self.patchify = patchify

    def forward(self, image: Image) -> Tokens:  # type: ignore[override]
        return self.patchify(image, self.weight, self.bias)


def _plain(linear: nn.Module) -> bool:
    """Whether calling it does nothing but its product: our class, no hook, its own `forward`."""
    hooked = any(getattr(linear, f"_{kind}_hooks") for kind in HOOKS)
    return type(linear) is Linear and not hooked and "forward" not in vars(linear)


class PatchEmbed(nn.Module):
    """Image to patch tokens: one linear map per patch, evaluated by `patchify`."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int], *, patchify: Function):
        super().__init__()
        self.proj = PatchKernel(channels, width, patch, patchify=patchify)

    def forward(self, image: Image) -> Tokens:
        return self.proj(image)


class Stem(nn.Module):
    """Image to patch tokens by 3×3 convolutions of stride 2, each with norm and ReLU, then a 1×1.

    Xiao et al. 2021, arXiv:2106.14881, section 4: widths double up to the model's, and a patch of
    2ᵏ pixels takes k convolutions. Departure: one group norm over all channels instead of batch
    norm, so that the images of a batch stay independent.
    """

    def __init__(self, channels: int, width: int, patch: tuple[int, int]):
        super().__init__()
        steps = int(math.log2(patch[0]))
        if patch != (2**steps, 2**steps) or not steps:
            raise UserError(f"model.patchify = 'stem' needs a patch of 2, 4, 8, 16, …, not {patch}")
        if width % 2 ** (steps - 1):
            raise UserError(
                f"model.patchify = 'stem' halves model.width {steps - 1} times: {width} is not "
                f"a multiple of {2 ** (steps - 1)}"
            )
        widths = [channels, *(width // 2 ** (steps - 1 - k) for k in range(steps))]
        self.convs = nn.ModuleList(
            Conv2d(c, d, kernel_size=3, stride=2, padding=1) for c, d in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, d) for d in widths[1:])
        self.proj = Conv2d(width, width, kernel_size=1)

    def forward(self, image: Image) -> Tokens:
        x = image
        for halve, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(halve(x)))
        return rearrange(self.proj(x), "b d y x -> b (y x) d")


PATCHIFY = Registry("model.patchify", conv, unfold, Stem)


def patch_embedding(
    patchify: Callable[..., Any], channels: int, width: int, patch: tuple[int, int]
) -> nn.Module:
    """The module of a variant: its own, or `PatchEmbed` around a function."""
    if isinstance(patchify, type):
        return patchify(channels, width, patch)
    return PatchEmbed(channels, width, patch, patchify=patchify)


class Norm(nn.Module):
    """A gain and a bias over the width, applied by `norm`."""

    def __init__(self, width: int, *, norm: Function):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.norm = norm

    def forward(self, x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
        return self.norm(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention; `core` mixes the values, for the first `queries` tokens."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        core: Function,
        bias: bool,
        qk_norm: Function | None,
        drop: float,
        core_drop: float,
    ):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=bias)
        self.q_norm = Norm(width // heads, norm=qk_norm) if qk_norm else nn.Identity()
        self.k_norm = Norm(width // heads, norm=qk_norm) if qk_norm else nn.Identity()
        self.proj = Linear(width, width)
        self.drop = nn.Dropout(drop)
        self.core, self.core_drop = core, core_drop

    def forward(
        self, tokens: Tokens, *, queries: int | None = None, mask: Mask | None = None
    ) -> Read:
        q, k, v = self.split(tokens, queries)
        mixed = self.core(q, k, v, mask=mask, drop=self.core_drop if self.training else 0.0)
        return self.drop(self.proj(rearrange(mixed, "b heads i e -> b i (heads e)")))

    def split(self, tokens: Tokens, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the first `queries` tokens (all: None), keys and values of all tokens.

        A `qkv` that was replaced, as by an adapter, or that has a hook is called on all tokens, and
        nothing is saved.
        """
        if queries is None or not _plain(self.qkv):
            qkv = self.qkv(tokens)
            q, k, v = rearrange(
                qkv, "b n (three heads e) -> three b heads n e", three=3, heads=self.heads
            )
            return self.q_norm(q[:, :, :queries]), self.k_norm(k), v
        weight, bias, d = self.qkv.weight, self.qkv.bias, tokens.shape[-1]
        q = F.linear(tokens[:, :queries], weight[:d], None if bias is None else bias[:d])
        kv = F.linear(tokens, weight[d:], None if bias is None else bias[d:])
        q = rearrange(q, "b i (heads e) -> b heads i e", heads=self.heads)
        k, v = rearrange(kv, "b n (two heads e) -> two b heads n e", two=2, heads=self.heads)
        return self.q_norm(q), self.k_norm(k), v

    def weights(self, tokens: Tokens, *, mask: Mask | None = None) -> Weights:
        """The attention map, recomputed from the queries and keys that `core` receives, with its
        knobs."""
        function = WEIGHTS.get(getattr(self.core, "func", self.core))
        if function is None:
            raise UserError(
                f"model.attention = {self.core!r} has no attention maps: "
                "add its function to vitx.model.functional.attention.WEIGHTS"
            )
        q, k, _ = self.split(tokens, None)
        return function(q, k, mask=mask, **getattr(self.core, "keywords", {}))


class Mlp(nn.Module):
    """Two linear maps with `act` between them."""

    def __init__(self, width: int, hidden: int, *, act: Function, drop: float):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.act = act
        self.drop = nn.Dropout(drop)

    def forward(self, tokens: Tokens) -> Tokens:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(tokens)))))


class LayerScale(nn.Module):
    """A gain per channel on a residual branch (Touvron et al. 2021, arXiv:2103.17239, eq. 2)."""

    def __init__(self, width: int, value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, branch: Tokens) -> Tokens:
        return branch * self.gamma


class DropPath(nn.Module):
    """Stochastic depth in training. The rate is a tensor, so one compiled block serves all."""

    rate: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("rate", torch.zeros(()), persistent=False)

    def forward(self, branch: Tokens) -> Tokens:
        if not self.training:
            return branch
        # In float32: bfloat16 draws would be multiples of 1/256.
        uniform = torch.rand(branch.shape[0], 1, 1, device=branch.device)
        return drop_path(branch, uniform, self.rate)
