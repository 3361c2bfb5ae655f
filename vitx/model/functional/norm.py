"""Normalisations of a token over its width."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitx.registry import Registry
from vitx.settings import Positive


def layernorm(
    x: Float[Tensor, "*shape d"],
    gain: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    *,
    eps: Positive = 1e-6,
) -> Float[Tensor, "*shape d"]:
    """(x - mean) / √(var + eps) · gain + bias (Ba, Kiros and Hinton 2016, arXiv:1607.06450).

    `eps` is part of the weights' meaning: timm's ViT uses 1e-6, PyTorch 1e-5, BERT-style ViT 1e-12.
    """
    return F.layer_norm(x, gain.shape, gain, bias, eps)


NORM = Registry("model.norm", layernorm)
