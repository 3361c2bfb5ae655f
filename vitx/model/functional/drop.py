"""Stochastic depth and patch dropout; their noise is passed in as uniform numbers."""

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor


def drop_path(
    branch: Float[Tensor, "b n d"], uniform: Float[Tensor, "b 1 1"], rate: Float[Tensor, ""]
) -> Float[Tensor, "b n d"]:
    """branch · [uniform ≥ rate] / (1 - rate), one draw per image.

    Huang et al. 2016, arXiv:1603.09382; kept branches are scaled up so that the mean is unchanged.
    """
    kept = (uniform >= rate).to(branch.dtype)
    return branch * (kept / (1 - rate))


def drop_patches(
    tokens: Float[Tensor, "b n d"], uniform: Float[Tensor, "b m"], *, rate: float, prefix: int
) -> Float[Tensor, "b kept d"]:
    """The prefix tokens and a random share 1 - rate of the m = n - prefix patches, in order.

    Liu et al. 2022, arXiv:2208.07220; at least one patch is kept, as many of every image.
    """
    patches = uniform.shape[1]
    kept = max(1, int(patches * (1 - rate)))
    rows = uniform.argsort(dim=1)[:, :kept].sort(dim=1).values + prefix
    first = repeat(torch.arange(prefix, device=tokens.device), "r -> b r", b=len(rows))
    rows = torch.cat([first, rows], dim=1)
    return tokens.gather(1, repeat(rows, "b kept -> b kept d", d=tokens.shape[-1]))
