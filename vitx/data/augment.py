"""Variations of a batch of images, their draws passed in as uniform numbers."""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitx.model.axes import Image, Probabilities

AFFINE_DRAWS = 5
"""Uniform numbers per image that `affine` takes."""
CROP_TRIES = 10
CROP_DRAWS = 2 * CROP_TRIES + 2
FLIP_DRAWS = 1
ERASE_DRAWS = 5
MIX_DRAWS = 4
"""Uniform numbers per batch that `mixup` and `cutmix` share: which of the two, how much, where."""


def affine(
    image: Image,
    uniform: Float[Tensor, "b 5"],
    *,
    rotate: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
    shift: float = 0.0,
) -> Image:
    """A random affine map per image, bilinear, zero outside.

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


def flip(image: Image, uniform: Float[Tensor, "b 1"], *, rate: float = 0.5) -> Image:
    """Mirror left and right with probability `rate`."""
    mirrored = rearrange(uniform < rate, "b 1 -> b 1 1 1")
    return torch.where(mirrored, image.flip(-1), image)


def resized_crop(
    image: Image,
    uniform: Float[Tensor, "b 22"],
    *,
    smallest: float,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image:
    """A random box of `smallest` to all of the area, stretched to the image's size, bilinear.

    Szegedy et al. 2015, arXiv:1409.4842, as in torchvision's RandomResizedCrop without
    antialiasing: whole pixels, area uniform, aspect `ratio` uniform in its logarithm, the first of
    ten tries that fits, else the largest box within `ratio`.
    """
    h, w = image.shape[-2:]
    share, slant = uniform[:, :CROP_TRIES], uniform[:, CROP_TRIES : 2 * CROP_TRIES]
    area = h * w * (smallest + (1 - smallest) * share)
    aspect = _log_uniform(slant, ratio)
    heights, widths = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (heights >= 1) & (heights <= h) & (widths >= 1) & (widths <= w)
    first = fits.float().argmax(dim=1, keepdim=True)
    fitting = fits.any(dim=1)
    height = torch.where(fitting, heights.gather(1, first)[:, 0], min(h, round(w / ratio[0])))
    width = torch.where(fitting, widths.gather(1, first)[:, 0], min(w, round(h * ratio[1])))
    top = (uniform[:, -2] * (h - height + 1)).floor()
    left = (uniform[:, -1] * (w - width + 1)).floor()
    rows, columns = _interpolation(top, height, h), _interpolation(left, width, w)
    stretched = einsum(rows, image, "b out h, b c h w -> b c out w")
    return einsum(stretched, columns, "b c h w, b out w -> b c h out")


def erase(
    image: Image,
    uniform: Float[Tensor, "b 5"],
    *,
    rate: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 3.3),
) -> Image:
    """Set a random box to 0 with probability `rate` (Zhong et al. 2020, arXiv:1708.04896).

    On normalised images 0 is the mean colour. A box that does not fit is cut at the image's size.
    """
    h, w = image.shape[-2:]
    chance, share, slant, down, right = uniform.unbind(dim=1)
    size = h * w * (area[0] + (area[1] - area[0]) * share)
    aspect = _log_uniform(slant, ratio)
    height = (size / aspect).sqrt().round().clamp(1, h)
    width = (size * aspect).sqrt().round().clamp(1, w)
    top, left = (down * (h - height + 1)).floor(), (right * (w - width + 1)).floor()
    box = _box(image, top, left, height, width) & rearrange(chance < rate, "b -> b 1 1 1")
    return image.masked_fill(box, 0.0)


def mixup(
    image: Image, target: Probabilities, share: Float[Tensor, ""]
) -> tuple[Image, Probabilities]:
    """share·x + (1 - share)·x', targets alike (Zhang et al. 2018, arXiv:1710.09412, eq. 1).

    The partner x' is the neighbour in the batch: images 0 and 1, 2 and 3, … are mixed with each
    other, so that parts of a batch with an even number of images mix as the whole does.
    """
    other = _neighbours(image)
    return torch.lerp(image[other], image, share), torch.lerp(target[other], target, share)


def cutmix(
    image: Image,
    target: Probabilities,
    share: Float[Tensor, ""],
    centre: Float[Tensor, "2"],
) -> tuple[Image, Probabilities]:
    """A box of the partner's pixels in each image; targets weigh what is left of the image.

    Partners are those of `mixup`.

    Yun et al. 2019, arXiv:1905.04899, eq. 2: the box has the image's aspect and the area
    1 - share, and is cut at the edges; `centre` is uniform in [0, 1).
    """
    h, w = image.shape[-2:]
    height, width = (h * (1 - share).sqrt()).round(), (w * (1 - share).sqrt()).round()
    top, left = (centre[0] * h - height / 2).floor(), (centre[1] * w - width / 2).floor()
    box = _box(image[:1], top[None], left[None], height[None], width[None])
    left_over = 1 - box.to(target.dtype).mean()
    other = _neighbours(image)
    mixed = torch.where(box, image[other], image)
    return mixed, torch.lerp(target[other], target, left_over)


def _neighbours(image: Image) -> Int[Tensor, " b"]:
    """1, 0, 3, 2, …; the last of an odd number stays alone."""
    return (torch.arange(len(image), device=image.device) ^ 1).clamp(max=len(image) - 1)


def _log_uniform(uniform: Tensor, ends: tuple[float, float]) -> Tensor:
    low, high = math.log(ends[0]), math.log(ends[1])
    return (low + (high - low) * uniform).exp()


def _interpolation(
    start: Float[Tensor, " b"], length: Float[Tensor, " b"], size: int
) -> Float[Tensor, "b out size"]:
    """Matrices that stretch `length` pixels from `start` to `size` pixels, linearly.

    Output pixel k lies at (k + ½)·length/size - ½ in the box, held within it.
    """
    pixels = torch.arange(size, device=start.device, dtype=start.dtype)
    start, length = rearrange(start, "b -> b 1"), rearrange(length, "b -> b 1")
    place = ((pixels + 0.5) * length / size - 0.5).clamp(min=0).minimum(length - 1) + start
    return (1 - (rearrange(place, "b out -> b out 1") - pixels).abs()).clamp(min=0)


def _box(
    image: Image,
    top: Float[Tensor, " b"],
    left: Float[Tensor, " b"],
    height: Float[Tensor, " b"],
    width: Float[Tensor, " b"],
) -> Bool[Tensor, "b 1 h w"]:
    """True within the box, which may reach over the image's edges."""
    rows = torch.arange(image.shape[-2], device=image.device)
    columns = torch.arange(image.shape[-1], device=image.device)
    within = [
        (line >= rearrange(low, "b -> b 1")) & (line < rearrange(low + size, "b -> b 1"))
        for line, low, size in ((rows, top, height), (columns, left, width))
    ]
    return rearrange(within[0], "b h -> b 1 h 1") & rearrange(within[1], "b w -> b 1 1 w")
