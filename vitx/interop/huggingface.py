"""The settings that Hugging Face keeps beside weights: config.json and preprocessor_config.json."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from vitx.model.preprocessing import Preprocessing
from vitx.registry import UserError, choose, nearest
from vitx.settings import pair

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""Our names of MLP variants by theirs."""

KINDS = ("vit", "vit_msn")
"""Kinds of models whose names of tensors mean this model."""
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Filters of resizing by Pillow's numbers."""
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"

Settings = TypeVar("Settings")
Edges = int | dict[str, int | None] | None
"""One number, or edges by their names."""


@dataclass(frozen=True)
class Architecture:
    """What config.json says that the shapes of tensors don't."""

    model_type: str = "vit"
    num_channels: int = 3
    num_attention_heads: int = 0
    image_size: int | tuple[int, int] | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    id2label: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the image, if they are told."""
        return None if self.image_size is None else pair("image_size", self.image_size)

    def classes(self, outputs: int) -> tuple[str, ...]:
        """A name per output, its number where it has none; nothing if no output has one."""
        numbers = [str(number) for number in range(outputs)]
        unknown = self.id2label.keys() - set(numbers)
        if outputs and unknown:
            raise UserError(
                f"{CONFIG}: id2label names the output {min(unknown)!r}, there are {outputs}"
            )
        return tuple(self.id2label.get(n, n) for n in numbers) if self.id2label else ()

    def fields(self) -> dict[str, str]:
        """The fields of ModelConfig. Raises ValueError for what is no variant."""
        choose(f"{CONFIG}: model_type", self.model_type, KINDS)
        if self.hidden_act not in ACTIVATIONS:
            hint = nearest(self.hidden_act, ACTIVATIONS)
            raise UserError(
                f"{CONFIG}: hidden_act = {self.hidden_act!r} can't be expressed; {hint}"
            )
        eps = self.layer_norm_eps
        return {"mlp": ACTIVATIONS[self.hidden_act], "norm": f"layernorm(eps={eps!r})"}


@dataclass(frozen=True)
class Processor:
    """preprocessor_config.json."""

    do_resize: bool | None = True
    do_rescale: bool | None = True
    do_normalize: bool | None = True
    do_center_crop: bool | None = False
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    size: Edges = None
    crop_size: Edges = None
    resample: int | None = None

    def preprocessing(self, image: tuple[int, int]) -> Preprocessing | None:
        """The same preprocessing in our terms for a model's image size, or None where they can't
        express it."""
        factor = self.rescale_factor if self.do_rescale else 1
        if not math.isclose(factor, 1 / 255, rel_tol=1e-6) or not self.do_resize:
            return None
        if not self.do_normalize:
            mean, std = (0.0,), (1.0,)
        elif self.image_mean and self.image_std:
            mean, std = self.image_mean, self.image_std
        else:
            return None
        resample = 2 if self.resample is None else self.resample
        if resample not in range(len(FILTERS)):
            return None
        filter = FILTERS[resample]
        # A number alone is both edges to ViT's processor, and the shortest one to others.
        edge = self.size.get("shortest_edge") if isinstance(self.size, dict) else None
        if not self.do_center_crop:
            if edge or _edges(self.size, image) != image:
                return None
            return Preprocessing("squash", mean, std, filter)
        if edge and _edges(self.crop_size, image) == image and image[0] == image[1] <= edge:
            return Preprocessing("crop", mean, std, filter, image[0] / edge)
        return None


def _edges(given: Edges, image: tuple[int, int]) -> tuple[int | None, int | None]:
    """Height and width; those of the image where nothing is said."""
    if isinstance(given, dict):
        return given.get("height"), given.get("width")
    return (given, given) if given else image


def beside(file: Path) -> Path | None:
    """The folder of a file of weights, if settings of another project lie in it."""
    folder = file.parent
    return folder if (folder / CONFIG).exists() and not (folder / "run.json").exists() else None


def preprocessing(folder: Path, image: tuple[int, int]) -> Preprocessing | None:
    """What the folder says of how pictures are prepared, if our terms can express it."""
    path = folder / PROCESSOR
    return read(path, Processor).preprocessing(image) if path.exists() else None


def read(path: Path, kind: type[Settings]) -> Settings:
    """Settings of this kind. Raises UserError naming the file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}") from None
