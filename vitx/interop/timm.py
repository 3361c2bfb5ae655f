"""timm's `VisionTransformer` as a `Vit`: read off the live model, or refused by timm's option.

The names and shapes of both state dicts are the same, so weights need no renaming.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitx.interop.huggingface import CONFIG, FILTERS, read
from vitx.model.config import ModelConfig
from vitx.model.preprocessing import CENTRE, Preprocessing
from vitx.model.vit import Vit, build
from vitx.registry import UserError, nearest


def from_timm(model_or_name: object, **timm_kwargs: Any) -> Vit:
    """The `Vit` that computes what a timm `VisionTransformer` computes, with a copy of its weights.

    `model_or_name` is a live model, or a name for `timm.create_model(name, **timm_kwargs)`.
    Weights, dtype, device, frozen parameters and train or eval state are taken over. A model with
    `dynamic_img_size` is taken at its own image size. Raises ValueError that names the timm option
    which can't be expressed.
    """
    model = live_model(model_or_name, timm_kwargs)
    config = read_config(model)
    first = next(model.parameters())
    vit = build(config, device=first.device, dtype=first.dtype)
    vit.load_state_dict(model.state_dict(), strict=True)
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    for name, module in vit.named_modules():
        module.training = _training(model, name)
    return vit


def read_config(model: nn.Module) -> ModelConfig:
    """The configuration of a live timm `VisionTransformer`; ValueError names what has no field."""
    _refuse_inexpressible(model)
    m: Any = model
    blocks, embed = list(m.blocks), m.patch_embed
    first = blocks[0]
    rates, eps = [_drop_path_rate(block) for block in blocks], first.norm1.eps
    return ModelConfig(
        image=tuple(embed.img_size),
        patch=tuple(embed.patch_size),
        channels=embed.proj.in_channels,
        classes=m.head.out_features if isinstance(m.head, nn.Linear) else 0,
        width=m.embed_dim,
        depth=len(blocks),
        heads=first.attn.num_heads,
        mlp_ratio=ModelConfig.ratio(first.mlp.fc1.out_features, m.embed_dim),
        class_token=m.cls_token is not None,
        registers=m.num_reg_tokens,
        position="none" if m.pos_embed is None else "learned",
        position_tokens="patches" if m.no_embed_class else "all",
        qkv_bias="none" if first.attn.qkv.bias is None else "qkv",
        qk_norm=not isinstance(first.attn.q_norm, nn.Identity),
        norm="layernorm" if eps == 1e-6 else f"layernorm(eps={eps!r})",
        mlp=_act(first) or "",
        pool={"token": "cls", "avg": "mean"}[m.global_pool],
        layer_scale=_layer_scale(first),
        final_norm=not isinstance(m.norm, nn.Identity),
        fc_norm=not isinstance(m.fc_norm, nn.Identity),
        drop=first.attn.proj_drop.p,
        attention_drop=first.attn.attn_drop.p,
        position_drop=0.0 if m.pos_embed is None else m.pos_drop.p,
        head_drop=m.head_drop.p,
        drop_path=rates[-1],
        patch_drop=getattr(m.patch_drop, "prob", 0.0),
        init="xavier" if m.weight_init_mode == "jax" else "timm",
    )


@dataclass(frozen=True)
class Pretrained:
    """What timm's config.json says of how weights were trained."""

    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    interpolation: str = "bilinear"
    crop_pct: float = CENTRE
    crop_mode: str = "center"


@dataclass(frozen=True)
class Folder:
    """The config.json that timm writes beside weights."""

    architecture: str
    global_pool: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    label_names: tuple[str, ...] | None = None
    pretrained_cfg: Pretrained = field(default_factory=Pretrained)

    def preprocessing(self, image: tuple[int, int]) -> Preprocessing | None:
        """How pictures are prepared, if that is said in our terms."""
        cfg = self.pretrained_cfg
        how = {"center": "crop", "squash": "squash"}.get(cfg.crop_mode)
        told = cfg.input_size and cfg.input_size[1:] == image and cfg.mean and cfg.std
        if not (told and how) or (how == "crop" and image[0] != image[1]):
            return None
        if cfg.interpolation not in FILTERS:
            return None
        return Preprocessing(how, cfg.mean, cfg.std, cfg.interpolation, cfg.crop_pct)


def read_folder(
    folder: Path, state: Mapping[str, Tensor], heads: int
) -> tuple[ModelConfig, tuple[str, ...], Preprocessing | None]:
    """The configuration of weights beside timm's config.json, class names and preprocessing.

    timm makes the model that is named there, with the sizes of the tensors. Raises UserError where
    the tensors are of another model, or it can't be expressed.
    """
    about = read(folder / CONFIG, Folder)
    options = _sizes(about, state) | about.model_args
    if about.global_pool is not None:
        options.setdefault("global_pool", about.global_pool)
        if options["global_pool"] == "avg":
            options.setdefault("fc_norm", "fc_norm.weight" in state)
    with torch.device("meta"):
        usual: Any = live_model(about.architecture, {"depth": 1})
        if "num_heads" not in options:
            if not heads and usual.embed_dim != options["embed_dim"]:
                raise UserError(
                    f"{folder} does not tell the number of attention heads: give it, "
                    f"load(path, heads=…); it divides {options['embed_dim']}"
                )
            options["num_heads"] = heads or usual.blocks[0].attn.num_heads
        model = live_model(about.architecture, options)
    if heads and heads != options["num_heads"]:
        raise UserError(
            f"{folder}: the model has {options['num_heads']} attention heads, not {heads}"
        )
    shapes = model.state_dict()
    for name in sorted(shapes.keys() | state.keys()):
        there, here = (list(s[name].shape) if name in s else "none" for s in (state, shapes))
        if there != here:
            raise UserError(
                f"{folder}: {name} is {there}, and {here} in timm's {about.architecture}"
            )
    config = read_config(model)
    return config, about.label_names or (), about.preprocessing(config.size)


def _sizes(about: Folder, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """timm's options that the tensors' shapes tell; the image's size only with what is said."""
    width, channels, p, q = state["patch_embed.proj.weight"].shape
    blocks = [int(name.split(".")[1]) for name in state if name.startswith("blocks.")]
    options: dict[str, Any] = {
        "embed_dim": width,
        "in_chans": channels,
        "patch_size": (p, q),
        "depth": 1 + max(blocks, default=0),
        "num_classes": len(state.get("head.bias", ())),
    }
    if "pos_embed" in state:
        count = state["pos_embed"].shape[1]
        side = math.isqrt(count)
        told = [about.pretrained_cfg.input_size[1:]] if about.pretrained_cfg.input_size else []
        for h, w in (*told, (side * p, side * q)):
            if 0 <= count - (h // p) * (w // q) <= MOST_PREFIX:
                return options | {"img_size": (h, w)}
    return options


MOST_PREFIX = 16
"""Positions of class token and registers, at most."""


def live_model(model_or_name: object, timm_kwargs: dict[str, Any]) -> nn.Module:
    """A timm model by its name and options, or the live model itself.

    Raises ValueError for an unknown name, with the nearest, and for options beside a live model.
    """
    if isinstance(model_or_name, str):
        import timm

        if not timm.is_model(model_or_name) and ":" not in model_or_name:
            names = timm.list_models("vit_*") + timm.list_models("deit*")
            hint = nearest(model_or_name, names).partition(" Choices")[0][:80]
            raise UserError(f"timm has no model {model_or_name!r}; {hint}")
        try:
            return timm.create_model(model_or_name, **timm_kwargs)
        except (RuntimeError, TypeError, ValueError) as error:  # timm's of a wrong tag or option
            raise UserError(f"timm can't make {model_or_name!r}: {error}") from error
    if timm_kwargs:
        raise UserError(f"timm_kwargs {sorted(timm_kwargs)} go with a name, not with a live model")
    if not isinstance(model_or_name, nn.Module):
        raise UserError(f"from_timm takes a timm model or its name, not {type(model_or_name)}")
    return model_or_name


def _refuse_inexpressible(model: nn.Module) -> None:
    """Each check is one line: what holds, timm's option, and its value in this model."""
    from timm.layers.norm import LayerNorm
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(model) is not VisionTransformer:
        raise UserError(
            f"from_timm takes timm's VisionTransformer; {type(model).__name__} is another class"
        )
    m: Any = model
    _refuse_around_blocks(m)
    blocks = list(m.blocks)
    _check(len(blocks) > 0, "depth", 0)
    for block in blocks:
        _check(type(block) is Block, "block_fn", type(block).__name__)
        _refuse_in_block(block, m.embed_dim)
        _check(_shape(block) == _shape(blocks[0]), "block_fn", "blocks that differ from each other")
    for norm in (module for module in m.modules() if "Norm" in type(module).__name__):
        _check(type(norm) in (LayerNorm, nn.LayerNorm), "norm_layer", type(norm).__name__)
        same = norm.eps == blocks[0].norm1.eps and norm.elementwise_affine
        _check(same and norm.bias is not None, "norm_layer", norm)
    rates = [_drop_path_rate(block) for block in blocks]
    linear = torch.linspace(0, rates[-1], len(rates), dtype=torch.float64).tolist()
    close = all(abs(a - b) < 1e-6 for a, b in zip(rates, linear, strict=True))
    _check(close, "drop_path_rate", rates)
    _check(len({p.dtype for p in m.parameters()}) == 1, "dtype", "more than one")
    hooked = [n for n, module in m.named_modules() if _hooks(module)]
    _check(not hooked, "forward hooks on", ", ".join(name or "the model" for name in hooked))


def _refuse_around_blocks(m: Any) -> None:
    from timm.layers.patch_dropout import PatchDropout
    from timm.layers.patch_embed import PatchEmbed

    _check(type(m.patch_embed) is PatchEmbed, "embed_layer", type(m.patch_embed).__name__)
    _check(isinstance(m.patch_embed.norm, nn.Identity), "embed_norm_layer", m.patch_embed.norm)
    _check(not m.patch_embed.dynamic_img_pad, "dynamic_img_pad", True)
    _check(isinstance(m.norm_pre, nn.Identity), "pre_norm", True)
    _check(m.patch_embed.proj.bias is not None, "pre_norm", "patch embedding without bias")
    drop = type(m.patch_drop) in (nn.Identity, PatchDropout)
    _check(drop, "patch_drop_rate", m.patch_drop)
    _check(m.global_pool in ("token", "avg"), "global_pool", m.global_pool)
    _check(not m.pool_include_prefix, "pool_include_prefix", True)
    _check(not m.grad_checkpointing, "grad_checkpointing", True)
    head = type(m.head) is nn.Identity or (type(m.head) is nn.Linear and m.head.bias is not None)
    _check(head, "head", m.head)


def _refuse_in_block(block: Any, width: int) -> None:
    from timm.layers.attention import Attention
    from timm.layers.drop import DropPath
    from timm.layers.layer_scale import LayerScale
    from timm.layers.mlp import Mlp

    attn, mlp = block.attn, block.mlp
    _check(type(attn) is Attention, "attn_layer", type(attn).__name__)
    _check(type(attn.q_norm) is type(attn.k_norm), "qk_norm", "one of the two only")
    _check(isinstance(attn.norm, nn.Identity), "scale_attn_norm", True)
    _check(attn.gate is None, "attn_layer", "gated attention")
    _check(attn.scale == attn.head_dim**-0.5, "attn_layer", f"scale {attn.scale}")
    linear = all(type(m) is nn.Linear for m in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
    _check(linear, "attn_layer", "a linear map of another class")
    _check(attn.head_dim * attn.num_heads == width, "attn_layer", f"head_dim {attn.head_dim}")
    _check(type(mlp) is Mlp, "mlp_layer", type(mlp).__name__)
    _check(isinstance(mlp.norm, nn.Identity), "scale_mlp_norm", True)
    _check(attn.proj.bias is not None and mlp.fc1.bias is not None, "proj_bias", False)
    _check(_act(block) is not None, "act_layer", mlp.act)
    rates = {attn.proj_drop.p, mlp.drop1.p, mlp.drop2.p}
    _check(len(rates) == 1, "proj_drop_rate", sorted(rates))
    for name in ("ls1", "ls2"):
        _check(type(getattr(block, name)) in (nn.Identity, LayerScale), "init_values", name)
    for name in ("drop_path1", "drop_path2"):
        _check(type(getattr(block, name)) in (nn.Identity, DropPath), "drop_path_rate", name)
    _check(type(block.ls1) is type(block.ls2), "init_values", "one branch only")
    same = _drop_path_rate(block) == float(getattr(block.drop_path2, "drop_prob", 0.0) or 0.0)
    _check(same, "drop_path_rate", "two rates in one block")


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _check(holds: bool, option: str, value: object) -> None:
    if not holds:
        raise UserError(f"timm's {option} = {value} can't be expressed in vitx")


def _shape(block: Any) -> tuple:
    drops = (block.attn.proj_drop.p, block.attn.attn_drop.p)
    shapes = tuple((name, tuple(value.shape)) for name, value in block.state_dict().items())
    return block.attn.num_heads, drops, _act(block), _layer_scale(block), shapes


def _act(block: Any) -> str | None:
    """Our name of the MLP's nonlinearity, if we have it."""
    from timm.layers.activations import GELU, GELUTanh

    act = block.mlp.act
    if type(act) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[act.approximate]
    return {GELU: "gelu", GELUTanh: "gelu_tanh"}.get(type(act))


def _layer_scale(block: Any) -> float:
    return getattr(block.ls1, "init_values", 0.0)


def _drop_path_rate(block: Any) -> float:
    return float(getattr(block.drop_path1, "drop_prob", 0.0) or 0.0)


def _training(model: nn.Module, name: str) -> bool:
    """The train or eval state of timm's module of that name, or of its nearest parent."""
    while True:
        try:
            return model.get_submodule(name).training
        except AttributeError:
            name = name.rpartition(".")[0]
