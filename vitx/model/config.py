"""The configuration of a Vision Transformer, and named sizes."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from vitx.model.functional.attention import ATTENTION
from vitx.model.functional.init import INIT
from vitx.model.functional.mlp import MLP
from vitx.model.functional.norm import NORM
from vitx.model.functional.placement import PLACEMENT
from vitx.model.functional.pool import POOL, cls
from vitx.model.functional.position import POSITION, sincos2d
from vitx.model.layers import PATCHIFY
from vitx.registry import Slot, UserError, nearest, resolve
from vitx.settings import (
    Natural,
    Rate,
    Whole,
    at_least,
    check_fields,
    make,
    nearest_divisors,
    pair,
    within,
)

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
    channels: Whole = 3
    classes: Natural = 1000
    """Outputs of the head; 0 leaves the head out and gives the pooled features."""
    width: Whole = 192
    depth: Annotated[int, at_least(1), within(1, 10_000, rule="must be at most 10,000")] = 12
    heads: Whole = 3
    mlp_ratio: Annotated[float, within(0, 10_000, ends="(]")] = 4.0
    class_token: bool = True
    registers: Natural = 0
    """Extra tokens without a meaning of their own (Darcet et al. 2024, arXiv:2309.16588)."""
    patchify: Slot = "conv"
    position: Slot = "learned"
    position_tokens: Literal["all", "patches"] = "all"
    """`all` tokens have a position, or `patches` only."""
    attention: Slot = "sdpa"
    qkv_bias: Literal["qkv", "none"] = "qkv"
    """Which of query, key and value have a bias: `qkv` or `none`."""
    qk_norm: bool = False
    """Normalise each head's queries and keys (Henry et al. 2020, arXiv:2010.04245; Dehghani et al.
    2023, arXiv:2302.05442)."""
    norm: Slot = "layernorm"
    mlp: Slot = "gelu"
    placement: Slot = "pre"
    """Where a block normalises: before its branches, or after adding them."""
    pool: Slot = "cls"
    layer_scale: Annotated[float, within(0, math.inf, rule="must be 0 (none) or positive")] = 0.0
    """Initial gain of the residual branches; 0 leaves layer scale out."""
    final_norm: bool = True
    """Normalise the encoder's tokens."""
    fc_norm: bool = False
    """Normalise the pooled vector."""
    drop: Rate = 0.0
    """Dropout after the attention's and the MLP's linear maps."""
    attention_drop: Rate = 0.0
    position_drop: Rate = 0.0
    head_drop: Rate = 0.0
    drop_path: Rate = 0.0
    """Stochastic depth of the last block; the rate grows linearly from 0 at the first."""
    patch_drop: Rate = 0.0
    """Share of the patches that training leaves out, other ones of every image and step."""
    init: Slot = "timm"

    def __post_init__(self):
        for name in ("image", "patch"):
            object.__setattr__(self, name, pair(f"model.{name}", getattr(self, name)))
        check_fields(self, "model.")
        for axis, image, patch in zip(("height", "width"), self.size, self.patch_size, strict=True):
            if image % patch:
                raise UserError(
                    f"model.patch = {patch} does not divide the image {axis} {image}; "
                    f"nearest that does: {nearest_divisors(image, patch)}"
                )
        if self.width % self.heads:
            raise UserError(
                f"model.heads = {self.heads} does not divide model.width = {self.width}; "
                f"nearest that does: {nearest_divisors(self.width, self.heads)}"
            )
        if self.hidden < 1:
            raise UserError(
                f"model.mlp_ratio = {self.mlp_ratio} must give the MLP at least one hidden unit"
            )
        chosen = {name: resolve(getattr(self, name), entries) for name, entries in SLOTS.items()}
        if chosen["pool"] is cls and not self.class_token:
            raise UserError(
                "model.pool = 'cls' reads the class token, but model.class_token is False; "
                "choose model.pool = 'mean'"
            )
        if getattr(chosen["position"], "func", chosen["position"]) is sincos2d and self.width % 4:
            raise UserError(
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
        raise UserError(f"size = {name!r} is not known; {nearest(word, SIZES)}")
    if not (slash and patch.isdecimal() and int(patch)):
        raise UserError(f"size = {name!r} needs a patch size in pixels, such as {word}/16")
    width, depth, heads = SIZES[word]
    values = {"width": width, "depth": depth, "heads": heads, "patch": int(patch)}
    return make(ModelConfig, **(values | fields))
