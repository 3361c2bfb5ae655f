"""Variations of a batch of images, their draws passed in as uniform numbers."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitx.axes import Image

AFFINE_DRAWS = 5
"""Uniform numbers an image that `affine` takes."""


def affine(
    image: Image,
    uniform: Float[Tensor, "b 5"],
    *,
    rotate: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
    shift: float = 0.0,
) -> Image:
    """A random affine map an image, bilinear, zero outside.

    `rotate` in degrees, `scale` and `shear` relative, `shift` a fraction of the image; each is the
    largest size of a draw, either way. All zero gives the image itself.
    """
    angle, size, slant, right, down = (2 * uniform - 1).unbind(dim=1)
    angle = angle * math.radians(rotate)
    size = 1 + size * scale
    slant = slant * shear
    cos, sin = angle.cos() / size, angle.sin() / size
    # grid_sample measures both axes from -1 to 1, so a turn in pixels needs the sides' ratio.
    ratio = image.shape[-2] / image.shape[-1]
    matrix = torch.stack(
        [
            torch.stack([cos, (slant * cos - sin) * ratio, 2 * shift * right], dim=1),
            torch.stack([sin / ratio, slant * sin + cos, 2 * shift * down], dim=1),
        ],
        dim=1,
    )
    positions = F.affine_grid(matrix, list(image.shape), align_corners=False)
    return F.grid_sample(image, positions, align_corners=False)
