"""Files of weights: this project's own, timm's, Hugging Face's and the two scratch projects'.

`load` recognises a file by its names of tensors, `export` writes a model back under them.
"""

import inspect
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from vitx.files import write_whole
from vitx.interop import huggingface, names, tensors, timm
from vitx.interop.names import Format
from vitx.model.config import SLOTS, ModelConfig
from vitx.model.functional.init import INIT, keyed_generator
from vitx.model.preprocessing import Preprocessing
from vitx.model.vit import Vit, build
from vitx.registry import Registry, Slot, UserError, nearest, resolve
from vitx.settings import flat, from_flat, override, pair

FILE = tensors.FILE
"""Name of a run's weights in its folder."""
METADATA = "vitx"
"""Key under which a safetensors file of this project holds its description."""


@dataclass(frozen=True)
class Description:
    """What a file says of a model beside its weights."""

    config: ModelConfig
    classes: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None


@dataclass(frozen=True)
class _Metadata:
    """A description as plain values."""

    config: dict[str, Any]
    classes: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None


def save(vit: nn.Module, path: Path, about: Description) -> None:
    """Write weights, configuration, class names and preprocessing as one safetensors file.

    Raises OSError naming the file that could not be written; one of that name stays as it was.
    """
    from safetensors.torch import save as to_bytes

    described = _Metadata(flat(about.config), about.classes, about.preprocessing)
    state = {name: value.contiguous().cpu() for name, value in vit.state_dict().items()}
    write_whole(path, to_bytes(state, metadata={METADATA: json.dumps(asdict(described))}))


def load(
    path: str | Path,
    *,
    heads: int = 0,
    classes: int = 0,
    image: int | tuple[int, int] = 0,
    seed: int = 0,
) -> Vit:
    """The `Vit` of a file or folder of weights.

    `path` is a safetensors or PyTorch file, a run folder of this project, or a folder that Hugging
    Face or timm wrote. `heads` and `image` (pixels, or height and width) are for files that don't
    tell them. `classes` makes a new head, drawn with `seed`, where the file's has another number of
    outputs, and says so. Raises ValueError for a file that is none of these.
    """
    state, about = read(path, heads=heads, image=image)
    config = override(about.config, classes=classes or about.config.classes)
    new = config.classes != about.config.classes
    return _filled(config, state, about.config, path, seed, new_head=new)


NO_FUNCTION = {"classes", "drop", "attention_drop", "position_drop", "head_drop", "drop_path",
               "patch_drop", "init"}  # fmt: skip
"""Fields of a model that may differ from those of the weights that it starts from."""
SAME_FUNCTION = {"patchify": {"conv", "unfold"}, "attention": {"sdpa", "math"}}
"""Variants of a slot that compute the same with the same weights."""


def start(
    config: ModelConfig, path: str | Path, *, classes: Sequence[str] = (), seed: int = 0
) -> Vit:
    """The configured model with the weights of a file.

    Its head is new where the number of classes differs, or their names do; the rows of a head with
    the same names are put in the order of `classes`. Raises ValueError naming the first field by
    which the file's model is another function.
    """
    state, about = read(path, heads=config.heads, image=config.size)
    for name in flat(config):
        ours, theirs = getattr(config, name), getattr(about.config, name)
        if name not in NO_FUNCTION and not _same(name, ours, theirs):
            hint = "; positions are not resized" if name == "image" else ""
            raise UserError(
                f"weights = {str(path)!r}: model.{name} is {theirs!r} there and {ours!r} here{hint}"
            )
    new = config.classes != about.config.classes
    if classes and not new and "head.weight" in state:
        new = bool(about.classes) and set(about.classes) != set(classes)
        if not new:
            _reorder(state, about.classes, classes, path)
    return _filled(config, state, about.config, path, seed, new_head=new)


def _reorder(
    state: dict[str, Tensor], theirs: Sequence[str], ours: Sequence[str], path: str | Path
) -> None:
    """Put the head's rows in the order of our classes.

    Outputs without names are numbers. Raises ValueError for classes that are other numbers.
    """
    numbers = [str(number) for number in range(len(ours))]
    if not theirs:
        if all(name.isdecimal() for name in ours) and list(ours) != numbers:
            raise UserError(
                f"weights = {str(path)!r}: its outputs are the numbers 0 to {len(ours) - 1}, the "
                f"classes are {', '.join(ours[:8])}{', …' if len(ours) > 8 else ''}"
            )
        return
    order = [theirs.index(name) for name in ours]
    for name in ("head.weight", "head.bias"):
        state[name] = state[name][order]


def _same(name: str, ours: Any, theirs: Any) -> bool:
    """Whether two values of a field give the same function."""
    if {ours, theirs} <= SAME_FUNCTION.get(name, set()):
        return True
    if name in SLOTS:
        ours, theirs = (_meaning(call, SLOTS[name]) for call in (ours, theirs))
    return ours == theirs


def _meaning(call: Slot, registry: Registry) -> tuple[object, dict[str, object]]:
    """A slot's function, and all its knobs with their values."""
    variant = resolve(call, registry)
    parameters = inspect.signature(variant).parameters.values()  # those of a partial as it is
    knobs = {p.name: p.default for p in parameters if p.default is not p.empty}
    return getattr(variant, "func", variant), knobs


def _filled(
    config: ModelConfig,
    state: dict[str, Tensor],
    theirs: ModelConfig,
    path: str | Path,
    seed: int,
    *,
    new_head: bool,
) -> Vit:
    """The configured model with a file's weights, but for a new head."""
    if new_head:
        same = config.classes == theirs.classes
        others = "with other names" if same else f"instead of {theirs.classes}"
        print(
            f"{path}: a new head of {config.classes} classes {others}, drawn with seed {seed}",
            file=sys.stderr,
        )
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        state |= _new_head(config, seed) if config.classes else {}
    # Weights keep the widest precision that they were written in.
    vit = build(config, dtype=tensors.dtype(state, Path(path)))
    _check_fit(vit, state, path)
    vit.load_state_dict(state)
    return vit


def _check_fit(vit: Vit, state: dict[str, Tensor], path: str | Path) -> None:
    """ValueError naming the first tensor that the model lacks, the file lacks, or of other size."""
    parameters = vit.state_dict()
    for name in parameters | state:
        here, there = (list(s[name].shape) if name in s else "none" for s in (parameters, state))
        if here != there:
            raise UserError(
                f"{path} does not fit the model: {name} is {there} there and {here} here"
            )


def describe(path: str | Path, *, heads: int = 0) -> Description:
    """What a file says of its model."""
    return read(path, heads=heads)[1]


def read(
    path: str | Path, *, heads: int = 0, image: int | tuple[int, int] = 0
) -> tuple[dict[str, Tensor], Description]:
    """Our state dict and the description; errors as in `load`."""
    file = tensors.find(Path(path))
    state, metadata = tensors.read(file)
    if METADATA in metadata:
        about = _described(metadata[METADATA], file)
        _check_heads(heads, about.config.heads, file)
        return state, about
    for form in _formats(state):
        if form.mark in state:
            return _foreign(state, form, heads, pair("image", image) if image else None, file)
    raise UserError(
        f"{file} is of no known format: its tensors are named {', '.join(sorted(state)[:3])}, …"
    )


def export(vit: Vit, path: str | Path, format: str) -> None:
    """Write the weights under another project's names, as a PyTorch file.

    `format` is scratch-places365, scratch-cifar10, scratch-cifar10-heads, hf-vit or hf-vit-model.
    Raises ValueError where the model has what the format can't hold.
    """
    forms = {
        "scratch-places365": names.SCRATCH_PLACES365,
        "scratch-cifar10": names.scratch_cifar10(),
        "scratch-cifar10-heads": names.scratch_cifar10(vit.config.heads),
        "hf-vit": names.hugging_face("vit."),
        "hf-vit-model": names.hugging_face(),
    }
    if format not in forms:
        raise UserError(f"format = {format!r} is not known; {nearest(format, forms)}")
    _check_function(vit.config, forms[format])
    state = names.to_theirs(vit.state_dict(), forms[format], vit.config.depth)
    torch.save(state, path)


def _check_function(config: ModelConfig, form: Format) -> None:
    """ValueError naming the first field by which a model means something else in that format."""
    usual = {"attention": "sdpa", "placement": "pre", "mlp": "gelu", "pool": "cls",
             "position_tokens": "all", "final_norm": True, "fc_norm": False, "registers": 0,
             "class_token": True}  # fmt: skip
    meant = {**usual, **form.model}
    for name in ("patchify", "init"):
        meant.pop(name, None)
    for name, value in meant.items():
        if not _same(name, getattr(config, name), value):
            raise UserError(
                f"{form.name} means model.{name} = {value!r}, the model has "
                f"{getattr(config, name)!r}"
            )


def _formats(state: Mapping[str, Tensor]) -> list[Format]:
    per_head = "encoder.blocks.0.attention.heads.{}.query.weight"
    heads = next(k for k in range(10_000) if per_head.format(k) not in state)
    return [
        names.SCRATCH_PLACES365,
        names.scratch_cifar10(),
        names.scratch_cifar10(max(heads, 1)),
        names.hugging_face("vit."),
        names.hugging_face(),
        names.TIMM,
    ]


def _foreign(
    state: dict[str, Tensor],
    form: Format,
    heads: int,
    image: tuple[int, int] | None,
    file: Path,
) -> tuple[dict[str, Tensor], Description]:
    """A state of another project under our names, with a configuration read off its shapes."""
    architecture = huggingface.Architecture()
    beside = huggingface.beside(file) if file.name.startswith(tensors.FILES) else None
    if beside and form is names.TIMM:
        return state, Description(*timm.read_folder(beside, state, heads))
    if beside:
        architecture = huggingface.read(beside / huggingface.CONFIG, huggingface.Architecture)
    numbers = re.findall(r"(?:layers?|blocks)\.(\d+)", "\n".join(state))
    if not numbers:
        raise UserError(f"{file} holds no block of {form.name}")
    depth = 1 + max(map(int, numbers))
    embedding = next(r for r in form.renames if r.ours == "patch_embed.proj.weight")
    kernel = state[embedding.theirs[0]]
    c, p, q = _patch_sizes(kernel, architecture.num_channels)
    ours = names.to_ours(state, form, depth, {"c": c, "p": p, "q": q})
    patches = ours["pos_embed"].shape[1] - 1
    width, known = kernel.shape[0], architecture.num_attention_heads or form.heads
    if not (heads or known):
        raise UserError(
            f"{file} does not tell the number of attention heads: give it, load(path, heads=…); "
            f"it divides {width}"
        )
    _check_heads(heads, known, file)
    outputs = len(ours.get("head.bias", ()))
    config = ModelConfig(
        image=_size(architecture.size or image, patches, (p, q), file),
        patch=(p, q),
        channels=c,
        classes=outputs,
        width=width,
        depth=depth,
        heads=heads or known,
        mlp_ratio=ModelConfig.ratio(ours["blocks.0.mlp.fc1.weight"].shape[0], width),
        qkv_bias="qkv" if "blocks.0.attn.qkv.bias" in ours else "none",
        **{**form.model, **(architecture.fields() if form.settings_beside else {})},
    )
    prepared = huggingface.preprocessing(beside, config.size) if beside else None
    return ours, Description(config, architecture.classes(outputs), prepared)


def _size(
    known: tuple[int, int] | None, patches: int, patch: tuple[int, int], file: Path
) -> tuple[int, int]:
    """Height and width of the image: those that are known, if they fit, else of a square."""
    if known:
        if known[0] // patch[0] * (known[1] // patch[1]) != patches:
            raise UserError(
                f"{file}: an image of {known} has another number of patches than {patches}, "
                "the positions beside the class token's"
            )
        return known
    grid = math.isqrt(patches)
    if grid**2 != patches:
        raise UserError(
            f"{file}: {patches} positions beside the class token's are no square of patches: give "
            "height and width, load(path, image=(h, w))"
        )
    size = (grid * patch[0], grid * patch[1])
    print(f"note: {file} does not tell the image's size; it is read as {size}", file=sys.stderr)
    return size


def _patch_sizes(kernel: Tensor, channels: int) -> tuple[int, int, int]:
    """Channels, height and width of a patch; a flat kernel (d, c·p·q) is of square patches."""
    if kernel.ndim == 2:
        side = math.isqrt(kernel.shape[1] // channels)
        return channels, side, side
    return kernel.shape[1], kernel.shape[2], kernel.shape[3]


def _check_heads(given: int, known: int, file: Path) -> None:
    """ValueError where both are known, and differ."""
    if given and known and given != known:
        raise UserError(f"{file}: the model has {known} attention heads, not {given}")


def _described(text: str, file: Path) -> Description:
    """The description in a safetensors file of this project."""
    try:
        about = msgspec.json.decode(text, type=_Metadata)
    except msgspec.DecodeError as error:
        raise UserError(f"{file}: its description can't be read: {error}") from None
    return Description(from_flat(ModelConfig, about.config), about.classes, about.preprocessing)


def _new_head(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    scheme = resolve(config.init, INIT)
    shapes = {"head.weight": (config.classes, config.width), "head.bias": (config.classes,)}
    return {
        name: scheme(name, shape, config.width, keyed_generator(seed, name))
        for name, shape in shapes.items()
    }
