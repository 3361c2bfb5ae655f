"""Configurations: frozen values, checked when they are made; a ValueError names field and rule.

`override` derives one from another, `delta` names how two differ, `identity` hashes one.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from vitx.functional.attention import ATTENTION
from vitx.functional.init import INIT
from vitx.functional.mlp import MLP
from vitx.functional.norm import NORM
from vitx.functional.placement import PLACEMENT
from vitx.functional.pool import POOL, cls
from vitx.functional.position import POSITION, sincos2d
from vitx.functional.schedule import SCHEDULE
from vitx.images import MAX_PIXELS
from vitx.layers import PATCHIFY
from vitx.registry import choose, nearest, resolve
from vitx.sources import FACTS, SOURCES, Facts

Slot = str | Callable[..., Any]
"""A variant's name, its call-string such as "layernorm(eps=1e-5)", or a callable in Python."""

SLOTS = {table.slot.removeprefix("model."): table for table in (
    PATCHIFY, POSITION, ATTENTION, NORM, MLP, PLACEMENT, POOL, INIT
)}  # fmt: skip

SIZES = {
    # name: (width, depth, heads); the first three are for images of 8 to 32 pixels
    "Pico": (48, 4, 4),
    "Nano": (96, 6, 3),
    "Micro": (192, 9, 3),
    # DeiT (Touvron et al. 2021, arXiv:2012.12877) and ViT (arXiv:2010.11929)
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Vision Transformer. Sizes in pixels or tokens, rates in [0, 1); slots are call-strings."""

    image: int | tuple[int, int] = 224
    """Height and width in pixels; one number for a square."""
    patch: int | tuple[int, int] = 16
    """Height and width of a patch in pixels; it must divide the image."""
    channels: int = 3
    classes: int = 1000
    """Outputs of the head; 0 leaves the head out and gives the pooled features."""
    width: int = 192
    depth: int = 12
    heads: int = 3
    mlp_ratio: float = 4.0
    class_token: bool = True
    registers: int = 0
    """Extra tokens without a meaning of their own (Darcet et al. 2024, arXiv:2309.16588)."""
    patchify: Slot = "conv"
    position: Slot = "learned"
    position_tokens: str = "all"
    """`all` tokens have a position, or `patches` only."""
    attention: Slot = "sdpa"
    qkv_bias: str = "qkv"
    """Which of query, key and value have a bias: `qkv` or `none`."""
    qk_norm: bool = False
    """Normalise each head's queries and keys (Henry et al. 2020, arXiv:2010.04245; Dehghani et al.
    2023, arXiv:2302.05442)."""
    norm: Slot = "layernorm"
    mlp: Slot = "gelu"
    placement: Slot = "pre"
    """Where a block normalises: before its branches, or after adding them."""
    pool: Slot = "cls"
    layer_scale: float = 0.0
    """Initial gain of the residual branches; 0 leaves layer scale out."""
    final_norm: bool = True
    """Normalise the encoder's tokens."""
    fc_norm: bool = False
    """Normalise the pooled vector."""
    drop: float = 0.0
    """Dropout after the attention's and the MLP's linear maps."""
    attention_drop: float = 0.0
    position_drop: float = 0.0
    head_drop: float = 0.0
    drop_path: float = 0.0
    """Stochastic depth of the last block; the rate grows linearly from 0 at the first."""
    patch_drop: float = 0.0
    """Share of the patches that training leaves out, other ones of every image and step."""
    init: Slot = "timm"

    def __post_init__(self):
        for name in ("image", "patch"):
            object.__setattr__(self, name, _pair(f"model.{name}", getattr(self, name)))
        for name in ("channels", "width", "depth", "heads"):
            _check_int(f"model.{name}", getattr(self, name), 1)
        for name in ("classes", "registers"):
            _check_int(f"model.{name}", getattr(self, name), 0)
        for name in ("drop", "attention_drop", "position_drop", "head_drop", "drop_path",
                     "patch_drop"):  # fmt: skip
            _check_rate(f"model.{name}", getattr(self, name))
        for name in ("mlp_ratio", "layer_scale"):
            _check_number(f"model.{name}", getattr(self, name))
        for name in ("class_token", "qk_norm", "final_norm", "fc_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"model.{name} = {getattr(self, name)!r} must be True or False")
        choose("model.position_tokens", self.position_tokens, ("all", "patches"))
        choose("model.qkv_bias", self.qkv_bias, ("qkv", "none"))
        for axis, image, patch in zip(("height", "width"), self.size, self.patch_size, strict=True):
            if image % patch:
                raise ValueError(
                    f"model.patch = {patch} does not divide the image {axis} {image}; "
                    f"nearest that does: {_nearest_divisors(image, patch)}"
                )
        if self.width % self.heads:
            raise ValueError(
                f"model.heads = {self.heads} does not divide model.width = {self.width}; "
                f"nearest that does: {_nearest_divisors(self.width, self.heads)}"
            )
        if self.hidden < 1:
            raise ValueError(
                f"model.mlp_ratio = {self.mlp_ratio} must give the MLP at least one hidden unit"
            )
        if self.layer_scale < 0:
            raise ValueError(f"model.layer_scale = {self.layer_scale} must be 0 (none) or positive")
        chosen = {name: resolve(getattr(self, name), entries) for name, entries in SLOTS.items()}
        if chosen["pool"] is cls and not self.class_token:
            raise ValueError(
                "model.pool = 'cls' reads the class token, but model.class_token is False; "
                "choose model.pool = 'mean'"
            )
        if getattr(chosen["position"], "func", chosen["position"]) is sincos2d and self.width % 4:
            raise ValueError(
                f"model.position = 'sincos2d' needs a model.width that 4 divides, not {self.width}"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        return _pair("model.image", self.image)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Patch height and width in pixels."""
        return _pair("model.patch", self.patch)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (height, width), (p, q) = self.size, self.patch_size
        return height // p, width // q

    @property
    def prefix(self) -> int:
        """Tokens before the patches: class token and registers."""
        return int(self.class_token) + self.registers

    @staticmethod
    def ratio(hidden: int, width: int) -> float:
        """The `mlp_ratio` that gives exactly `hidden`: the quotient may round to one less."""
        ratio = hidden / width
        return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, how they are split, and how they are varied in training."""

    name: Slot = "digits"
    """A source: digits, cifar10, cifar100, places365, imagefolder, hf or fake."""
    root: str = ""
    """Folder of the data, or its name on the Hugging Face hub."""
    train: int = 0
    """Images to train on, a random part; 0 for all that validation and test leave."""
    val: int = 0
    """Images for validation: a random part of the data set's own split, if it has one, else held
    out of the training images; 0 for all of its own split."""
    test: int = 0
    """Images for the test, as for validation."""
    stratified: bool = True
    """Held-out parts have the classes' shares of the whole."""
    split_seed: int = 0
    """Fixes which image is in which split; not varied between seeds of a comparison."""
    drop_last: bool = True
    """Leave out an epoch's last images that fill no batch; else they are a smaller batch."""
    resize: str = "crop"
    """How larger images get the model's size: the shorter side and then the centre (`crop`), or
    both sides, whatever the aspect (`squash`). Data sets in memory have the model's size."""
    normalise: str = "data"
    """Mean and deviation: of the training split (`data`), ½ and ½ (`half`), or `imagenet`."""
    flip: float = 0.0
    """Share of images mirrored left and right."""
    crop: float = 1.0
    """Smallest area of a random resized crop, as a share of the image; 1 for none."""
    rotate: float = 0.0
    """Largest rotation in degrees, either way."""
    scale: float = 0.0
    """Largest relative change of size, either way."""
    shear: float = 0.0
    """Largest horizontal shear, either way."""
    shift: float = 0.0
    """Largest shift as a fraction of the image, either way, on each axis."""
    randaugment: str = ""
    """timm's words for RandAugment, such as rand-m9-mstd0.5; only for images read from files."""
    erase: float = 0.0
    """Share of images with a random box erased."""
    mixup: float = 0.0
    """α of mixup's Beta(α, α); 0 for none. With cutmix too, either is drawn for a batch."""
    cutmix: float = 0.0
    workers: int = 0
    """Processes that read images from files; 0 for this one. It changes no image."""
    on_bad_image: str = "stop"
    """What to do with a picture that can't be decoded: `stop`, or `skip` it and list it."""
    max_pixels: int = MAX_PIXELS
    """Larger pictures are refused before they are decoded."""

    def __post_init__(self):
        _check_number("data.rotate", self.rotate)
        if not 0 <= self.rotate <= 180:
            raise ValueError(f"data.rotate = {self.rotate} must lie between 0 and 180 degrees")
        for name in ("scale", "shear", "shift"):
            _check_rate(f"data.{name}", getattr(self, name))
        for name in ("flip", "erase"):
            _check_share(f"data.{name}", getattr(self, name))
        _check_number("data.crop", self.crop)
        if not 0 < self.crop <= 1:
            raise ValueError(f"data.crop = {self.crop} must lie in (0, 1]")
        for name in ("mixup", "cutmix"):
            _check_positive(f"data.{name}", getattr(self, name), zero=True)
        for name in ("train", "val", "test", "split_seed", "workers"):
            _check_int(f"data.{name}", getattr(self, name), 0)
        _check_int("data.max_pixels", self.max_pixels, 1)
        if self.split_seed >= 2**32 - 1:
            raise ValueError(f"data.split_seed = {self.split_seed} must be less than 2**32 - 1")
        resolve(self.name, SOURCES)
        if self.randaugment:
            _check_randaugment(self.randaugment)
        choose("data.on_bad_image", self.on_bad_image, ("stop", "skip"))
        choose("data.resize", self.resize, ("crop", "squash"))
        choose("data.normalise", self.normalise, ("data", "half", "imagenet"))

    @property
    def facts(self) -> Facts | None:
        """What is known of the named data set without reading it, if anything."""
        return FACTS.get(self.name) if isinstance(self.name, str) else None

    @property
    def has_val(self) -> bool:
        """Whether there are images for validation, as far as that is known without the data."""
        return self.val > 0 or self.facts is None

    @property
    def train_images(self) -> int:
        """Images to train on, as far as they are known without reading the data; else 0."""
        if self.train or self.facts is None:
            return self.train
        return self.facts.train - self.val - (0 if self.facts.test else self.test)


OPTIMIZERS = ("adamw", "adam", "sgd", "muon")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its learning rate over the steps, and which parameters it changes."""

    name: str = "adamw"
    """adamw, adam, sgd, muon (for the blocks' matrices, adamw for the rest), or timm's name."""
    lr: float = 1e-3
    weight_decay: float = 0.05
    decay: str = "matrices"
    """What weight decay acts on: `matrices` and the patch kernel, not biases, gains, tokens and
    positions; or `all` parameters."""
    beta1: float = 0.9
    """Or the momentum, of optimizers that have one."""
    beta2: float = 0.999
    schedule: Slot = "cosine"
    warmup_steps: int = 0
    """Steps over which the rate grows linearly to `lr`, before the schedule."""
    clip: float = 0.0
    """Largest norm of the whole gradient; 0 for none."""
    layer_decay: float = 1.0
    """Factor of the learning rate from a block to the one below it (Clark et al. 2020)."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by patterns such as blocks.0.* or patch_embed.*"""
    label_smoothing: float = 0.0

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            from timm.optim import list_optimizers  # type: ignore[attr-defined]

            # Left out: what needs a second derivative, or a library that is not here.
            found = list_optimizers(exclude_filters=["adahessian", "bnb*", "fused*"])
            others = (str(name) for name in found)
            choose("optim.name", self.name, (*OPTIMIZERS, *others))
        _check_positive("optim.lr", self.lr)
        _check_positive("optim.weight_decay", self.weight_decay, zero=True)
        _check_positive("optim.clip", self.clip, zero=True)
        for name in ("beta1", "beta2", "label_smoothing"):
            _check_rate(f"optim.{name}", getattr(self, name))
        choose("optim.decay", self.decay, ("matrices", "all"))
        _check_number("optim.layer_decay", self.layer_decay)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay = {self.layer_decay} must lie in (0, 1]")
        _check_int("optim.warmup_steps", self.warmup_steps, 0)
        schedule = resolve(self.schedule, SCHEDULE)
        if not all(0 <= schedule(progress / 10) <= 1 for progress in range(11)):
            raise ValueError(
                f"optim.schedule = {self.schedule!r} must stay between 0 and 1, the share of lr"
            )


RECIPE_VERSION = 1
"""What a configuration trains to. A change by which some configuration gets other weights, or other
final values, raises it, and runs of the version before are stale. A new variant, which no earlier
configuration names, does not."""

FREE = ("data.root", "data.workers", "log_every", "save_every", "keep_every")
"""Settings that a run which is resumed may change: no trained value depends on them."""

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: everything that its numbers depend on, but the machine."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    weights: str = ""
    """File of weights to start from, in any format that `vitx.load` knows; empty for the init."""
    steps: int = 1000
    batch: int = 64
    """Images a step, over all processes and accumulated parts."""
    accumulate: int = 1
    """Equal parts of a batch whose gradients are added up one after the other."""
    precision: str = "float32"
    """Of matrix products and attention, by autocast; parameters stay in float32."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is then the result; 0 for none."""
    compile: bool = False
    """Train through torch.compile."""
    seed: int = 0
    """Seeds initial weights, order and augmentation."""
    seed_init: int = 0
    """Added to `seed` for the initial weights alone; likewise the two below."""
    seed_order: int = 0
    """For the order of the images, and what is left out or mixed with what."""
    seed_augment: int = 0
    """For augmentation, and for what is drawn inside the model."""
    curve: str = "val"
    """Split that is read during training, `val` or `test`; it chooses nothing."""
    eval_every: int = 100
    """Steps between two readings of the curve's split."""
    log_every: int = 50
    """Steps between two readings of the training loss; the steps between do not wait for the
    device."""
    save_every: int = 1000
    """Steps between two checkpoints."""
    keep_every: int = 0
    """Steps between two files of weights that stay, model-STEP.safetensors; 0 for the last only."""

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "eval_every", "log_every", "save_every"):
            _check_int(name, getattr(self, name), 1)
        _check_int("keep_every", self.keep_every, 0)
        for name in ("seed", "seed_init", "seed_order", "seed_augment"):
            _check_int(name, getattr(self, name), 0)
            if getattr(self, name) >= 2**31:
                raise ValueError(f"{name} = {getattr(self, name)} must be less than 2**31")
        _check_rate("ema", self.ema)
        choose("precision", self.precision, PRECISIONS)
        choose("curve", self.curve, ("val", "test"))
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate = {self.accumulate} does not divide batch = {self.batch}; "
                f"nearest that does: {_nearest_divisors(self.batch, self.accumulate)}"
            )
        if facts := self.data.facts:
            check_fit(self.model, self.data.name, facts)
        if self.data.facts and self.data.train_images < 1:
            raise ValueError(
                f"data.val = {self.data.val} and data.test = {self.data.test} leave no image of "
                f"{self.data.facts.train} for training"
            )
        if 0 < self.data.train_images < self.batch and self.data.drop_last:
            raise ValueError(
                f"batch = {self.batch} is larger than the training split of "
                f"{self.data.train_images}"
            )


def check_fit(model: ModelConfig, name: object, facts: Facts) -> None:
    """ValueError if a model does not take the images or give the classes of a data set."""
    for what, value, wanted in (
        ("image", model.size, facts.image),
        ("channels", model.channels, facts.channels),
        ("classes", model.classes, facts.classes),
    ):
        if value != wanted:
            raise ValueError(
                f"model.{what} = {value} does not fit the data set {name}, which has {wanted}"
            )


Config = TypeVar("Config", ModelConfig, DataConfig, OptimConfig, TrainConfig)


def size(name: str, **fields: Any) -> ModelConfig:
    """The configuration of a named size, `size("S/16", image=224, classes=10)`.

    `name` is SIZE/PATCH with a size of `SIZES`; further fields are those of `ModelConfig`.
    """
    word, slash, patch = name.partition("/")
    if word not in SIZES:
        raise ValueError(f"size = {name!r} is not known; {nearest(word, SIZES)}")
    if not (slash and patch.isdecimal() and int(patch)):
        raise ValueError(f"size = {name!r} needs a patch size in pixels, such as {word}/16")
    width, depth, heads = SIZES[word]
    values = {"width": width, "depth": depth, "heads": heads, "patch": int(patch)}
    return make(ModelConfig, **(values | fields))


def make(kind: type[Config], **fields: Any) -> Config:
    """`kind(**fields)`, with a ValueError that names the nearest field when one is unknown."""
    names = [entry.name for entry in dataclasses.fields(kind)]
    for key in fields:
        if key not in names:
            raise ValueError(f"{kind.__name__} has no field {key!r}; {nearest(key, names)}")
    return kind(**fields)


def override(config: Config, **changes: Any) -> Config:
    """A copy with dotted fields changed: `override(config, **{"model.depth": 6, "steps": 100})`."""
    direct = {key: value for key, value in changes.items() if "." not in key}
    for part in {key.partition(".")[0] for key in changes if "." in key}:
        inner = getattr(config, part, None)
        if not dataclasses.is_dataclass(inner):
            names = [f.name for f in dataclasses.fields(config)]
            raise ValueError(
                f"{type(config).__name__} has no part {part!r}; {nearest(part, names)}"
            )
        nested = {k.partition(".")[2]: v for k, v in changes.items() if k.startswith(f"{part}.")}
        direct[part] = override(inner, **nested)  # type: ignore[type-var]
    kept = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return make(type(config), **(kept | direct))


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field names to plain values, for records and W&B.

    Raises ValueError for a callable that has no name to be recorded by.
    """
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            values |= flat(value, f"{prefix}{entry.name}.")
        else:
            values[prefix + entry.name] = _plain(value)
    return values


def from_flat(kind: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """The inverse of `flat`; what was written before a field was there gets its default.

    Raises ValueError naming a field that is unknown.
    """
    hints, fields = get_type_hints(kind), {}
    nested = {entry.name: dataclasses.is_dataclass(hints[entry.name])
              for entry in dataclasses.fields(kind)}  # fmt: skip
    for name in values:
        head, dot, _ = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and nested.get(head) is not bool(dot):
            raise ValueError(f"the configuration has an unknown {name}")
    for entry in dataclasses.fields(kind):
        name, inner = prefix + entry.name, hints[entry.name]
        if dataclasses.is_dataclass(inner):
            fields[entry.name] = from_flat(inner, values, f"{name}.")  # type: ignore[type-var]
        elif name in values:
            value = values[name]
            fields[entry.name] = tuple(value) if isinstance(value, list) else value
    return kind(**fields)


def delta(config: Any, base: Any) -> dict[str, Any]:
    """The dotted fields in which `config` differs from `base`, with config's values."""
    before = flat(base)
    return {key: value for key, value in flat(config).items() if before[key] != value}


def identity(config: Config) -> str:
    """A hash of all that a run's numbers depend on: every field, but for the `FREE` ones.

    The folder of the data counts where it alone says which data they are; a file of weights counts
    by its path, not by what is in it.
    """
    named = not isinstance(config, TrainConfig) or config.data.facts is not None
    free = FREE if named else tuple(name for name in FREE if name != "data.root")
    values = {name: value for name, value in flat(config).items() if name not in free}
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return _said(value) if callable(value) else value


def _said(slot: Callable[..., Any]) -> str:
    """A slot's callable for records: its name in a table, else with its module.

    Raises ValueError for one without a name of its own, of which a record would say nothing.
    """
    for entries in (*SLOTS.values(), SOURCES, SCHEDULE):
        for name, entry in entries.items():
            if slot is entry:
                return name
    name = getattr(slot, "__qualname__", "<lambda>")
    if "<" in name:  # <lambda>, or <locals> of a function, which may make others of that name
        raise ValueError(
            f"{slot!r} has no name of its own to be recorded by; write it as a def of a module"
        )
    return f"{slot.__module__}.{name}"


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = value if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} = {value!r} must be one number or height and width")
    for number in pair:
        _check_int(name, number, 1)
    return pair[0], pair[1]


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} = {value!r} must be a whole number, at least {least}")


def _check_rate(name: str, value: float) -> None:
    _check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} = {value!r} must lie in [0, 1)")


def _check_share(name: str, value: float) -> None:
    _check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value!r} must lie in [0, 1]")


def _check_positive(name: str, value: float, *, zero: bool = False) -> None:
    _check_number(name, value)
    if value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} = {value!r} must be {'0 or ' if zero else ''}positive")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} = {value!r} must be a finite number")


def _check_randaugment(words: str) -> None:
    # By its form: to ask timm itself would import it for every configuration, and timm passes over
    # what it does not know. n0 would pick no operation.
    number = r"(m|mmax)\d+|n[1-9]\d*|inc[01]|(mstd|p)\d+(\.\d+)?|t(weights|3aw|3a)"
    if not re.fullmatch(rf"rand(-({number}))*", words):
        raise ValueError(
            f"data.randaugment = {words!r} must be timm's words, such as rand-m9-mstd0.5"
        )


def _nearest_divisors(number: int, near: int) -> str:
    divisors = sorted(k for k in range(1, number + 1) if number % k == 0)
    below = [k for k in divisors if k < near][-1:]
    above = [k for k in divisors if k > near][:1]
    return " or ".join(str(k) for k in below + above)
