"""The settings that Hugging Face keeps beside weights: config.json and preprocessor_config.json."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from vitx.model.preprocessing import CENTRE, Preprocessing
from vitx.registry import UserError, nearest

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""Our names of MLP variants by theirs."""

Settings = TypeVar("Settings")
Edges = int | dict[str, int | None] | None
"""One number, or edges by their names."""


@dataclass(frozen=True)
class Architecture:
    """What config.json says that the shapes of tensors don't."""

    num_channels: int = 3
    num_attention_heads: int = 0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    id2label: dict[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.id2label[key] for key in sorted(self.id2label, key=int))

    def fields(self) -> dict[str, str]:
        """The fields of ModelConfig. Raises ValueError for an activation that is no variant."""
        if self.hidden_act not in ACTIVATIONS:
            hint = nearest(self.hidden_act, ACTIVATIONS)
            raise UserError(
                f"config.json: hidden_act = {self.hidden_act!r} can't be expressed; {hint}"
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

    def preprocessing(self) -> Preprocessing | None:
        """The same preprocessing in our terms, or None where they can't express it."""
        factor = self.rescale_factor if self.do_rescale else 1
        if not math.isclose(factor, 1 / 255, rel_tol=1e-6) or not self.do_resize:
            return None
        if not self.do_normalize:
            mean, std = (0.0,), (1.0,)
        elif self.image_mean and self.image_std:
            mean, std = self.image_mean, self.image_std
        else:
            return None
        # A number alone is both edges to ViT's processor, and the shortest one to others.
        edge = self.size.get("shortest_edge") if isinstance(self.size, dict) else None
        if not self.do_center_crop:
            return None if edge else Preprocessing("squash", mean, std)
        crop = self.crop_size.get("height") if isinstance(self.crop_size, dict) else self.crop_size
        if edge and crop and round(crop / CENTRE) == edge:
            return Preprocessing("crop", mean, std)
        return None


def settings(folder: Path) -> tuple[Architecture, Preprocessing | None]:
    """The settings of a folder of weights, as far as it has them; a run folder has none."""
    config, processor = folder / "config.json", folder / "preprocessor_config.json"
    if not config.exists() or (folder / "run.json").exists():
        return Architecture(), None
    architecture = _read(config, Architecture)
    return architecture, _read(processor, Processor).preprocessing() if processor.exists() else None


def _read(path: Path, kind: type[Settings]) -> Settings:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.DecodeError as error:
        raise UserError(f"{path} can't be read: {error}") from None
