"""Weights of other projects by name: a table a format, read in both directions.

A row is (their names, our name, einops pattern). Several of their tensors are stacked along a new
first axis before the pattern is applied; backwards the pattern is turned round and the stack taken
apart. `{n}` is the block's number, `{k}` counts stacked names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

SAME = "... -> ..."


@dataclass(frozen=True)
class Row:
    """One of our tensors and what it is made of there."""

    theirs: tuple[str, ...]
    ours: str
    pattern: str = SAME


@dataclass(frozen=True)
class Format:
    """A project's names, and one that only it has, by which a file is recognised."""

    name: str
    mark: str
    rows: tuple[Row, ...]
    model: Mapping[str, object] = field(default_factory=dict)
    """What the format means that no shape tells: fields of ModelConfig."""
    heads: int = 0
    """Attention heads, where the names tell them."""
    told: tuple[str, ...] = ()
    """Fields that a file beside the weights tells."""
    ignored: tuple[str, ...] = ()
    """Beginnings of names that play no part in classification."""


def pairs(theirs: str | Sequence[str], ours: str, pattern: str = SAME) -> tuple[Row, Row]:
    """The rows of a weight and of its bias; `pattern` is the weight's."""
    names = (theirs,) if isinstance(theirs, str) else tuple(theirs)
    stacked = "k f -> (k f)" if len(names) > 1 else SAME
    return (
        Row(tuple(f"{name}.weight" for name in names), f"{ours}.weight", pattern),
        Row(tuple(f"{name}.bias" for name in names), f"{ours}.bias", stacked),
    )


QKV = "k f d -> (k f) d"

SCRATCH_PLACES365 = Format(
    "a from-scratch ViT with post-norm blocks and convolutions of width 1",
    mark="embedding.pos_embedding",
    rows=(
        Row(("embedding.cls_token",), "cls_token"),
        Row(("embedding.pos_embedding",), "pos_embed"),
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

_SCRATCH_CIFAR10 = (
    Row(("embedding.cls_token",), "cls_token"),
    Row(("embedding.position_embeddings",), "pos_embed"),
    *pairs("embedding.patch_embeddings.projection", "patch_embed.proj"),
    *pairs("encoder.blocks.{n}.attention.output_projection", "blocks.{n}.attn.proj"),
    *pairs("encoder.blocks.{n}.layernorm_1", "blocks.{n}.norm1"),
    *pairs("encoder.blocks.{n}.layernorm_2", "blocks.{n}.norm2"),
    *pairs("encoder.blocks.{n}.mlp.dense_1", "blocks.{n}.mlp.fc1"),
    *pairs("encoder.blocks.{n}.mlp.dense_2", "blocks.{n}.mlp.fc2"),
    *pairs("classifier", "head"),
)


def scratch_cifar10(heads: int = 0) -> Format:
    """The from-scratch CIFAR-10 project: one merged projection, or `heads` modules of their own."""
    block = "encoder.blocks.{n}.attention"
    if heads:
        names = [
            f"{block}.heads.{head}.{x}" for x in ("query", "key", "value") for head in range(heads)
        ]
        attention = pairs(names, "blocks.{n}.attn.qkv", QKV)
    else:
        attention = pairs(f"{block}.qkv_projection", "blocks.{n}.attn.qkv")
    kind = "a module a head" if heads else "merged attention"
    mark = f"encoder.blocks.0.attention.{'heads.0.query' if heads else 'qkv_projection'}.weight"
    return Format(
        f"a from-scratch ViT for CIFAR-10, {kind}",
        mark,
        (*_SCRATCH_CIFAR10, *attention),
        model={
            "norm": "layernorm(eps=1e-5)",
            "mlp": "gelu_tanh",
            "final_norm": False,
            "init": "normal",
        },
        heads=heads,
    )


def hugging_face(prefix: str = "") -> Format:
    """`ViTModel` (no prefix) or `ViTForImageClassification` (`vit.`) of transformers."""
    layer = prefix + "encoder.layer.{n}"
    rows = (
        Row((f"{prefix}embeddings.cls_token",), "cls_token"),
        Row((f"{prefix}embeddings.position_embeddings",), "pos_embed"),
        *pairs(f"{prefix}embeddings.patch_embeddings.projection", "patch_embed.proj"),
        *pairs(
            [f"{layer}.attention.attention.{x}" for x in ("query", "key", "value")],
            "blocks.{n}.attn.qkv",
            QKV,
        ),
        *pairs(f"{layer}.attention.output.dense", "blocks.{n}.attn.proj"),
        *pairs(f"{layer}.intermediate.dense", "blocks.{n}.mlp.fc1"),
        *pairs(f"{layer}.output.dense", "blocks.{n}.mlp.fc2"),
        *pairs(f"{layer}.layernorm_before", "blocks.{n}.norm1"),
        *pairs(f"{layer}.layernorm_after", "blocks.{n}.norm2"),
        *pairs(f"{prefix}layernorm", "norm"),
        *pairs("classifier", "head"),
    )
    return Format(
        "a Hugging Face ViT",
        f"{prefix}embeddings.patch_embeddings.projection.weight",
        rows,
        model={"norm": "layernorm(eps=1e-12)", "init": "normal"},
        told=("norm", "mlp"),
        ignored=(f"{prefix}pooler.", "pooler."),
    )


def _live_transformers() -> Format:
    """The modules of transformers' `ViTForImageClassification`, 5.23; files keep older names."""
    layer = "model.vit.layers.{n}"
    return Format(
        "transformers' ViTForImageClassification",
        "model.vit.embeddings.patch_embeddings.projection.weight",
        (
            Row(("model.vit.embeddings.cls_token",), "cls_token"),
            Row(("model.vit.embeddings.position_embeddings",), "pos_embed"),
            *pairs("model.vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
            *pairs([f"{layer}.attention.{x}_proj" for x in "qkv"], "blocks.{n}.attn.qkv", QKV),
            *pairs(f"{layer}.attention.o_proj", "blocks.{n}.attn.proj"),
            *pairs(f"{layer}.mlp.fc1", "blocks.{n}.mlp.fc1"),
            *pairs(f"{layer}.mlp.fc2", "blocks.{n}.mlp.fc2"),
            *pairs(f"{layer}.layernorm_before", "blocks.{n}.norm1"),
            *pairs(f"{layer}.layernorm_after", "blocks.{n}.norm2"),
            *pairs("model.vit.layernorm", "norm"),
            *pairs("model.classifier", "head"),
        ),
    )


TRANSFORMERS = _live_transformers()
"""Of a live model behind an attribute `model`, not of its files."""

_TORCHVISION = "encoder.layers.encoder_layer_{n}"

TORCHVISION = Format(
    "torchvision's VisionTransformer",
    "conv_proj.weight",
    (
        Row(("class_token",), "cls_token"),
        Row(("encoder.pos_embedding",), "pos_embed"),
        *pairs("conv_proj", "patch_embed.proj"),
        Row((f"{_TORCHVISION}.self_attention.in_proj_weight",), "blocks.{n}.attn.qkv.weight"),
        Row((f"{_TORCHVISION}.self_attention.in_proj_bias",), "blocks.{n}.attn.qkv.bias"),
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
    rows=(
        Row(("cls_token",), "cls_token"),
        Row(("pos_embed",), "pos_embed"),
        *(row for name in _TIMM for row in pairs(name, name)),
    ),
)


def to_ours(
    state: Mapping[str, Tensor], form: Format, depth: int, sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Their tensors under our names; `sizes` are axis lengths that patterns need.

    Raises ValueError naming a tensor that is missing, or one that the format has no row for.
    """
    rest = {name for name in state if not name.startswith(form.ignored or ("\0",))}
    found = {}
    for row in _numbered(form, depth):
        there = [name for name in row.theirs if name in state]
        if not there and _optional(row.ours):
            continue
        if len(there) < len(row.theirs):
            missing = next(name for name in row.theirs if name not in state)
            raise ValueError(f"{form.name}: the file lacks {missing}")
        rest -= set(there)
        tensors = [state[name] for name in there]
        value = torch.stack(tensors) if len(tensors) > 1 else tensors[0]
        found[row.ours] = _apply(value, row.pattern, sizes)
    if rest:
        raise ValueError(f"{form.name}: no place for {sorted(rest)[0]} and {len(rest) - 1} more")
    return found


def to_theirs(state: Mapping[str, Tensor], form: Format, depth: int) -> dict[str, Tensor]:
    """Our tensors under their names: the inverse of `to_ours`."""
    rest, found = set(state), {}
    for row in _numbered(form, depth):
        if row.ours not in state:
            if _optional(row.ours):
                continue
            raise ValueError(f"{form.name} needs {row.ours}, which this model has not")
        rest.discard(row.ours)
        left, _, right = row.pattern.partition(" -> ")
        count = len(row.theirs)
        sizes = {"k": count} if count > 1 else {}
        value = _apply(state[row.ours], f"{right} -> {left}", sizes)
        parts = value.unbind() if count > 1 else (value,)
        found |= {name: part.contiguous() for name, part in zip(row.theirs, parts, strict=True)}
    if rest:
        raise ValueError(f"{form.name} has no place for {sorted(rest)[0]}")
    return found


def _numbered(form: Format, depth: int) -> list[Row]:
    """The rows of every block, and those outside of the blocks."""
    found = []
    for row in form.rows:
        for n in range(depth) if "{n}" in row.ours else [0]:
            theirs = tuple(name.replace("{n}", str(n)) for name in row.theirs)
            found.append(Row(theirs, row.ours.replace("{n}", str(n)), row.pattern))
    return found


def _optional(ours: str) -> bool:
    """A head may be absent, and so may the biases of query, key and value."""
    return ours.startswith("head.") or ours.endswith("attn.qkv.bias")


def _apply(value: Tensor, pattern: str, sizes: Mapping[str, int]) -> Tensor:
    if pattern == SAME:
        return value
    words = set(pattern.replace("(", " ").replace(")", " ").split())
    return rearrange(value, pattern, **{axis: n for axis, n in sizes.items() if axis in words})
