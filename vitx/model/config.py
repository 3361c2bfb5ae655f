"""The configuration of a Vision Transformer, and named sizes."""

import math
from dataclasses import dataclass
from typing import Any

from vitx.model.functional.attention import ATTENTION
from vitx.model.functional.init import INIT
from vitx.model.functional.mlp import MLP
from vitx.model.functional.norm import NORM
from vitx.model.functional.placement import PLACEMENT
from vitx.model.functional.pool import POOL, cls
from vitx.model.functional.position import POSITION, sincos2d
from vitx.model.layers import PATCHIFY
from vitx.registry import Slot, choose, nearest, resolve
from vitx.settings import check_int, check_number, check_rate, make, nearest_divisors, pair

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
            object.__setattr__(self, name, pair(f"model.{name}", getattr(self, name)))
        for name in ("channels", "width", "depth", "heads"):
            check_int(f"model.{name}", getattr(self, name), 1)
        for name in ("classes", "registers"):
            check_int(f"model.{name}", getattr(self, name), 0)
        for name in ("drop", "attention_drop", "position_drop", "head_drop", "drop_path",
                     "patch_drop"):  # fmt: skip
            check_rate(f"model.{name}", getattr(self, name))
        for name in ("mlp_ratio", "layer_scale"):
            check_number(f"model.{name}", getattr(self, name))
        for name in ("class_token", "qk_norm", "final_norm", "fc_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"model.{name} = {getattr(self, name)!r} must be True or False")
        choose("model.position_tokens", self.position_tokens, ("all", "patches"))
        choose("model.qkv_bias", self.qkv_bias, ("qkv", "none"))
        for axis, image, patch in zip(("height", "width"), self.size, self.patch_size, strict=True):
            if image % patch:
                raise ValueError(
                    f"model.patch = {patch} does not divide the image {axis} {image}; "
                    f"nearest that does: {nearest_divisors(image, patch)}"
                )
        if self.width % self.heads:
            raise ValueError(
                f"model.heads = {self.heads} does not divide model.width = {self.width}; "
                f"nearest that does: {nearest_divisors(self.width, self.heads)}"
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
        return pair("model.image", self.image)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Patch height and width in pixels."""
        return pair("model.patch", self.patch)

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
