"""Positions that are added to the tokens: each function returns the table of shape (1, n, d)."""

import torch
from einops import rearrange
from torch import Tensor, nn

from vitx.registry import Registry, UserError


def learned(grid: tuple[int, int], width: int, *, prefix: int) -> nn.Parameter:
    """A free vector per token (Dosovitskiy et al. 2021, arXiv:2010.11929); filled by the init."""
    return nn.Parameter(torch.empty(1, prefix + grid[0] * grid[1], width))


def sincos2d(
    grid: tuple[int, int], width: int, *, prefix: int, temperature: float = 10_000.0
) -> Tensor:
    """Fixed 2-D sine and cosine features of the column, then of the row; prefix tokens get zero.

    The quarters sin x, cos x, sin y, cos y of MoCo v3 (Chen, Xie and He 2021, arXiv:2104.02057),
    with the frequencies of Beyer et al. 2022 (arXiv:2205.01580): temperature^(-k / (d/4 - 1)) for
    k = 0 … d/4 - 1. `width` must be a multiple of 4.
    """
    if width % 4:
        raise UserError(f"sincos2d needs model.width to be a multiple of 4, not {width}")
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid)
    quarter = width // 4
    exponent = torch.arange(quarter, dtype=torch.float64) / max(quarter - 1, 1)
    frequency = temperature**-exponent
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    angle_y = rearrange(y, "y x -> (y x) 1") * frequency
    angle_x = rearrange(x, "y x -> (y x) 1") * frequency
    patches = torch.cat([angle_x.sin(), angle_x.cos(), angle_y.sin(), angle_y.cos()], dim=1)
    return rearrange(torch.cat([patches.new_zeros(prefix, width), patches]), "n d -> 1 n d")


def none(grid: tuple[int, int], width: int, *, prefix: int) -> None:
    """No position: the model does not know where a patch lay."""
    return None


POSITION = Registry("model.position", learned, sincos2d, none, given=("prefix",))
