"""The nonlinearity between the two linear maps of the feed-forward block."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitx.registry import table


def gelu(hidden: Float[Tensor, "*shape f"]) -> Float[Tensor, "*shape f"]:
    """x·Φ(x) with the exact normal distribution function (Hendrycks and Gimpel, arXiv:1606.08415)."""
    return F.gelu(hidden)


MLP = table("model.mlp", gelu)
