"""Configurations: frozen values, checked when they are made; a ValueError names field and rule.

`override` derives one from another, `delta` names how it differs from the defaults.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vitx.functional.attention import ATTENTION
from vitx.functional.init import INIT
from vitx.functional.mlp import MLP
from vitx.functional.norm import NORM
from vitx.functional.patches import PATCHIFY
from vitx.functional.pool import POOL, cls
from vitx.functional.position import POSITION, sincos2d
from vitx.registry import nearest, resolve

Slot = str | Callable[..., Any]
"""A variant's name, its call-string such as "layernorm(eps=1e-5)", or a callable in Python."""

SLOTS = {table.slot.removeprefix("model."): table for table in (
    PATCHIFY, POSITION, ATTENTION, NORM, MLP, POOL, INIT
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
    norm: Slot = "layernorm"
    mlp: Slot = "gelu"
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
    init: Slot = "timm"

    def __post_init__(self):
        for name in ("image", "patch"):
            object.__setattr__(self, name, _pair(f"model.{name}", getattr(self, name)))
        for name in ("channels", "width", "depth", "heads"):
            _check_int(f"model.{name}", getattr(self, name), 1)
        for name in ("classes", "registers"):
            _check_int(f"model.{name}", getattr(self, name), 0)
        for name in ("drop", "attention_drop", "position_drop", "head_drop", "drop_path"):
            _check_rate(f"model.{name}", getattr(self, name))
        for name in ("mlp_ratio", "layer_scale"):
            _check_number(f"model.{name}", getattr(self, name))
        for name in ("class_token", "final_norm", "fc_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"model.{name} = {getattr(self, name)!r} must be True or False")
        _check_choice("model.position_tokens", self.position_tokens, ("all", "patches"))
        _check_choice("model.qkv_bias", self.qkv_bias, ("qkv", "none"))
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

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What is known of a data set without reading it."""

    image: tuple[int, int]
    channels: int
    classes: int
    train: int
    val: int
    test: int


DATA = {"digits": DataFacts(image=(8, 8), channels=1, classes=10, train=1257, val=180, test=360)}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, how they are split, and how they are varied in training."""

    name: str = "digits"
    split_seed: int = 0
    """Fixes which image is in which split; not varied between seeds of a comparison."""
    rotate: float = 0.0
    """Largest rotation in degrees, either way."""
    scale: float = 0.0
    """Largest relative change of size, either way."""
    shear: float = 0.0
    """Largest horizontal shear, either way."""
    shift: float = 0.0
    """Largest shift as a fraction of the image, either way, on each axis."""

    def __post_init__(self):
        _check_choice("data.name", self.name, tuple(DATA))
        _check_number("data.rotate", self.rotate)
        if not 0 <= self.rotate <= 180:
            raise ValueError(f"data.rotate = {self.rotate} must lie between 0 and 180 degrees")
        for name in ("scale", "shear", "shift"):
            _check_rate(f"data.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to zero."""

    lr: float = 1e-3
    weight_decay: float = 0.05
    """On matrices and the patch kernel; not on biases, gains, tokens and positions."""
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_steps: int = 0
    label_smoothing: float = 0.0

    def __post_init__(self):
        for name in ("lr", "weight_decay"):
            _check_number(f"optim.{name}", getattr(self, name))
        if self.lr <= 0:
            raise ValueError(f"optim.lr = {self.lr} must be positive")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay = {self.weight_decay} must be 0 or positive")
        for name in ("beta1", "beta2", "label_smoothing"):
            _check_rate(f"optim.{name}", getattr(self, name))
        _check_int("optim.warmup_steps", self.warmup_steps, 0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: everything that its numbers depend on, but the machine."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 1000
    batch: int = 64
    """Images a step."""
    eval_every: int = 100
    """Steps between two readings of the validation split."""
    seed: int = 0
    """Seeds initial weights, order and augmentation."""

    def __post_init__(self):
        for name in ("steps", "batch", "eval_every"):
            _check_int(name, getattr(self, name), 1)
        _check_int("seed", self.seed, 0)
        facts, model = DATA[self.data.name], self.model
        for name, value, wanted in (
            ("image", model.size, facts.image),
            ("channels", model.channels, facts.channels),
            ("classes", model.classes, facts.classes),
        ):
            if value != wanted:
                raise ValueError(
                    f"model.{name} = {value} does not fit the data set {self.data.name}, "
                    f"which has {wanted}"
                )
        if self.batch > facts.train:
            raise ValueError(
                f"batch = {self.batch} is larger than the training split of {facts.train}"
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
    """Dotted field names to plain values, for records and W&B."""
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            values |= flat(value, f"{prefix}{entry.name}.")
        else:
            values[prefix + entry.name] = _plain(value)
    return values


def delta(config: Any, base: Any) -> dict[str, Any]:
    """The dotted fields in which `config` differs from `base`, with config's values."""
    before = flat(base)
    return {key: value for key, value in flat(config).items() if before[key] != value}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return getattr(value, "__name__", repr(value)) if callable(value) else value


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


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} = {value!r} must be a finite number")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r} is not known; {nearest(value, choices)}")


def _nearest_divisors(number: int, near: int) -> str:
    divisors = sorted(k for k in range(1, number + 1) if number % k == 0)
    below = [k for k in divisors if k < near][-1:]
    above = [k for k in divisors if k > near][:1]
    return " or ".join(str(k) for k in below + above)
