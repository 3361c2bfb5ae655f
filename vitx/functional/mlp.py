"""The nonlinearity between the two linear maps of the feed-forward block."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitx.registry import table


def gelu(hidden: Float[Tensor, "*shape f"]) -> Float[Tensor, "*shape f"]:
    """x·Φ(x), exact normal distribution function (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return F.gelu(hidden)


MLP = table("model.mlp", gelu)
