"""The nonlinearity between the two linear maps of the feed-forward block."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitx.registry import Registry


def gelu(hidden: Float[Tensor, "*shape f"]) -> Float[Tensor, "*shape f"]:
    """x·Φ(x), exact normal distribution function (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return F.gelu(hidden)


def gelu_tanh(hidden: Float[Tensor, "*shape f"]) -> Float[Tensor, "*shape f"]:
    """½x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), close to `gelu` (ibid., section 2)."""
    return F.gelu(hidden, approximate="tanh")


MLP = Registry("model.mlp", gelu, gelu_tanh)
