"""How a picture becomes a model's input; it travels with the weights."""

from dataclasses import dataclass

CENTRE = 0.875
"""Share of the resized picture's side that the centre crop keeps (Krizhevsky et al. 2012)."""


@dataclass(frozen=True)
class Preprocessing:
    """`resize` is `crop` (the shorter side, then the centre) or `squash`; values in [0, 1]."""

    resize: str = "crop"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    filter: str = "bilinear"
    """Pillow's filter of resizing."""
    centre: float = CENTRE
    """Share of the resized picture's side that `crop` keeps."""
