"""Weights of other projects by name: a list of renames per format, read in both directions.

A rename is (their names, our name, einops pattern). Several of their tensors are stacked along a
new first axis `k` before the pattern is applied; backwards the pattern is turned round and the
stack taken apart. `{n}` is the block's number.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vitx.registry import UserError

SAME = "... -> ..."


@dataclass(frozen=True)
class Rename:
    """One of our tensors and what it is made of there."""

    theirs: tuple[str, ...]
    ours: str
    pattern: str = SAME


@dataclass(frozen=True)
class Format:
    """A project's names, and one that only it has, by which a file is recognised."""

    name: str
    mark: str
    renames: tuple[Rename, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    """What the format means that no shape tells: fields of ModelConfig."""
    heads: int = 0
    """Attention heads, where the names tell them."""
    settings_beside: bool = False
    """Whether a config.json beside the weights tells the norm and the MLP."""
    ignored: tuple[str, ...] = ()
    """Beginnings of names that play no part in classification."""

    def of_depth(self, depth: int) -> Iterator[Rename]:
        """The renames of every block, and those outside of the blocks."""
        for rename in self.renames:
            for n in range(depth) if "{n}" in rename.ours else [0]:
                theirs = tuple(name.replace("{n}", str(n)) for name in rename.theirs)
                yield Rename(theirs, rename.ours.replace("{n}", str(n)), rename.pattern)


def pairs(theirs: str | Sequence[str], ours: str, pattern: str = SAME) -> tuple[Rename, Rename]:
    """The renames of a weight and of its bias; `pattern` is the weight's."""
    names = (theirs,) if isinstance(theirs, str) else tuple(theirs)
    stacked = "k f -> (k f)" if len(names) > 1 else SAME
    return (
        Rename(tuple(f"{name}.weight" for name in names), f"{ours}.weight", pattern),
        Rename(tuple(f"{name}.bias" for name in names), f"{ours}.bias", stacked),
    )


QKV = "k f d -> (k f) d"

SCRATCH_PLACES365 = Format(
    "a from-scratch ViT with post-norm blocks and convolutions of width 1",
    mark="embedding.pos_embedding",
    renames=(
        Rename(("embedding.cls_token",), "cls_token"),
        Rename(("embedding.pos_embedding",), "pos_embed"),
        *pairs("embedding.projection", "patch_embed.proj", "d (c p q) -> d c p q"),
        *pairs(
            [f"encoder_layers.{{n}}.attention.w_{x}" for x in "qkv"], "blocks.{n}.attn.qkv", QKV
        ),
        *pairs("encoder_layers.{n}.attention.fc", "blocks.{n}.attn.proj"),
        *pairs("encoder_layers.{n}.feed_forward.fc1", "blocks.{n}.mlp.fc1", "f d 1 -> f d"),
        *pairs("encoder_layers.{n}.feed_forward.fc2", "blocks.{n}.mlp.fc2", "d f 1 -> d f"),
        *pairs("encoder_layers.{n}.layer_norm1", "blocks.{n}.norm1"),
        *pairs("encoder_layers.{n}.layer_norm2", "blocks.{n}.norm2"),
        *pairs("classifier.0", "fc_norm"),
        *pairs("classifier.1", "head"),
    ),
    model={
        "patchify": "unfold",
        "placement": "post",
        "norm": "layernorm(eps=1e-5)",
        "final_norm": False,
        "fc_norm": True,
        "init": "torch",
    },
)


def scratch_cifar10(heads: int = 0) -> Format:
    """The from-scratch CIFAR-10 project: one merged projection, or `heads` modules of their own."""
    block = "encoder.blocks.{n}.attention"
    qkv: str | list[str] = f"{block}.qkv_projection"
    if heads:
        parts = ("query", "key", "value")
        qkv = [f"{block}.heads.{head}.{part}" for part in parts for head in range(heads)]
    mark = "heads.0.query" if heads else "qkv_projection"
    return Format(
        f"a from-scratch ViT for CIFAR-10, {'a module per head' if heads else 'merged attention'}",
        f"encoder.blocks.0.attention.{mark}.weight",
        (
            Rename(("embedding.cls_token",), "cls_token"),
            Rename(("embedding.position_embeddings",), "pos_embed"),
            *pairs("embedding.patch_embeddings.projection", "patch_embed.proj"),
            *pairs(qkv, "blocks.{n}.attn.qkv", QKV if heads else SAME),
            *pairs(f"{block}.output_projection", "blocks.{n}.attn.proj"),
            *pairs("encoder.blocks.{n}.layernorm_1", "blocks.{n}.norm1"),
            *pairs("encoder.blocks.{n}.layernorm_2", "blocks.{n}.norm2"),
            *pairs("encoder.blocks.{n}.mlp.dense_1", "blocks.{n}.mlp.fc1"),
            *pairs("encoder.blocks.{n}.mlp.dense_2", "blocks.{n}.mlp.fc2"),
            *pairs("classifier", "head"),
        ),
        model={
            "norm": "layernorm(eps=1e-5)",
            "mlp": "gelu_tanh",
            "final_norm": False,
            "init": "normal",
        },
        heads=heads,
    )


def hugging_face(prefix: str = "") -> Format:
    """`ViTModel` (no prefix) or `ViTForImageClassification` (`vit.`) of transformers, in files."""
    layer = prefix + "encoder.layer.{n}"
    return Format(
        "a Hugging Face ViT",
        f"{prefix}embeddings.patch_embeddings.projection.weight",
        (
            *_around_layers(prefix, layer, head="classifier"),
            *pairs(
                [f"{layer}.attention.attention.{part}" for part in ("query", "key", "value")],
                "blocks.{n}.attn.qkv",
                QKV,
            ),
            *pairs(f"{layer}.attention.output.dense", "blocks.{n}.attn.proj"),
            *pairs(f"{layer}.intermediate.dense", "blocks.{n}.mlp.fc1"),
            *pairs(f"{layer}.output.dense", "blocks.{n}.mlp.fc2"),
        ),
        model={"norm": "layernorm(eps=1e-12)", "init": "normal"},
        settings_beside=True,
        ignored=(f"{prefix}pooler.", "pooler."),
    )


def _around_layers(prefix: str, layer: str, *, head: str) -> tuple[Rename, ...]:
    """What all names of transformers' ViT share: embeddings, norms and head."""
    return (
        Rename((f"{prefix}embeddings.cls_token",), "cls_token"),
        Rename((f"{prefix}embeddings.position_embeddings",), "pos_embed"),
        *pairs(f"{prefix}embeddings.patch_embeddings.projection", "patch_embed.proj"),
        *pairs(f"{layer}.layernorm_before", "blocks.{n}.norm1"),
        *pairs(f"{layer}.layernorm_after", "blocks.{n}.norm2"),
        *pairs(f"{prefix}layernorm", "norm"),
        *pairs(head, "head"),
    )


_LAYER = "model.vit.layers.{n}"

TRANSFORMERS = Format(
    "transformers' ViTForImageClassification",
    "model.vit.embeddings.patch_embeddings.projection.weight",
    (
        *_around_layers("model.vit.", _LAYER, head="model.classifier"),
        *pairs([f"{_LAYER}.attention.{part}_proj" for part in "qkv"], "blocks.{n}.attn.qkv", QKV),
        *pairs(f"{_LAYER}.attention.o_proj", "blocks.{n}.attn.proj"),
        *pairs(f"{_LAYER}.mlp.fc1", "blocks.{n}.mlp.fc1"),
        *pairs(f"{_LAYER}.mlp.fc2", "blocks.{n}.mlp.fc2"),
    ),
)
"""Of a live model of transformers 5.23 behind an attribute `model`; files keep older names."""

_TORCHVISION = "encoder.layers.encoder_layer_{n}"

TORCHVISION = Format(
    "torchvision's VisionTransformer",
    "conv_proj.weight",
    (
        Rename(("class_token",), "cls_token"),
        Rename(("encoder.pos_embedding",), "pos_embed"),
        *pairs("conv_proj", "patch_embed.proj"),
        Rename((f"{_TORCHVISION}.self_attention.in_proj_weight",), "blocks.{n}.attn.qkv.weight"),
        Rename((f"{_TORCHVISION}.self_attention.in_proj_bias",), "blocks.{n}.attn.qkv.bias"),
        *pairs(f"{_TORCHVISION}.self_attention.out_proj", "blocks.{n}.attn.proj"),
        *pairs(f"{_TORCHVISION}.ln_1", "blocks.{n}.norm1"),
        *pairs(f"{_TORCHVISION}.ln_2", "blocks.{n}.norm2"),
        *pairs(f"{_TORCHVISION}.mlp.0", "blocks.{n}.mlp.fc1"),
        *pairs(f"{_TORCHVISION}.mlp.3", "blocks.{n}.mlp.fc2"),
        *pairs("encoder.ln", "norm"),
        *pairs("heads.head", "head"),
    ),
)

_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_TIMM = ("patch_embed.proj", *(f"blocks.{{n}}.{part}" for part in _BLOCK), "norm", "head")

TIMM = Format(
    "a timm VisionTransformer",
    mark="patch_embed.proj.weight",
    renames=(
        Rename(("cls_token",), "cls_token"),
        Rename(("pos_embed",), "pos_embed"),
        *(rename for name in _TIMM for rename in pairs(name, name)),
    ),
)


def to_ours(
    state: Mapping[str, Tensor], form: Format, depth: int, sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Their tensors under our names; `sizes` are axis lengths that patterns need.

    Raises ValueError naming a tensor that is missing, or one that the format has no place for.
    """
    rest = {name for name in state if not name.startswith(form.ignored or ("\0",))}
    ours: dict[str, Tensor] = {}
    for rename in form.of_depth(depth):
        missing = [name for name in rename.theirs if name not in state]
        if len(missing) == len(rename.theirs) and _optional(rename.ours):
            continue
        if missing:
            raise UserError(f"{form.name}: the file lacks {missing[0]}")
        rest -= set(rename.theirs)
        tensors = [state[name] for name in rename.theirs]
        value = torch.stack(tensors) if len(tensors) > 1 else tensors[0]
        ours[rename.ours] = _apply(value, rename.pattern, sizes)
    if rest:
        raise UserError(f"{form.name}: no place for {min(rest)} and {len(rest) - 1} more")
    return ours


def to_theirs(state: Mapping[str, Tensor], form: Format, depth: int) -> dict[str, Tensor]:
    """Our tensors under their names: the inverse of `to_ours`."""
    rest, theirs = set(state), dict[str, Tensor]()
    for rename in form.of_depth(depth):
        if rename.ours not in state:
            if _optional(rename.ours):
                continue
            raise UserError(f"{form.name} needs {rename.ours}, which this model has not")
        rest.discard(rename.ours)
        left, _, right = rename.pattern.partition(" -> ")
        count = len(rename.theirs)
        value = _apply(state[rename.ours], f"{right} -> {left}", {"k": count})
        parts = value.unbind() if count > 1 else (value,)
        theirs |= {name: part.contiguous() for name, part in zip(rename.theirs, parts, strict=True)}
    if rest:
        raise UserError(f"{form.name} has no place for {min(rest)}")
    return theirs


def _optional(ours: str) -> bool:
    """A head may be absent, and so may the biases of query, key and value."""
    return ours.startswith("head.") or ours.endswith("attn.qkv.bias")


def _apply(value: Tensor, pattern: str, sizes: Mapping[str, int]) -> Tensor:
    if pattern == SAME:
        return value
    axes = set(pattern.replace("(", " ").replace(")", " ").split())
    return rearrange(value, pattern, **{axis: n for axis, n in sizes.items() if axis in axes})
