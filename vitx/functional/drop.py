"""Stochastic depth."""

from jaxtyping import Float
from torch import Tensor


def drop_path(
    branch: Float[Tensor, "b n d"], uniform: Float[Tensor, "b 1 1"], rate: Float[Tensor, ""]
) -> Float[Tensor, "b n d"]:
    """branch · [uniform ≥ rate] / (1 - rate), one draw an image.

    Huang et al. 2016, arXiv:1603.09382; kept branches are scaled up so that the mean is unchanged.
    """
    kept = (uniform >= rate).to(branch.dtype)
    return branch * (kept / (1 - rate))
