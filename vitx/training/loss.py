"""Losses of logits."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitx.model.axes import Logits, Probabilities, Target


def cross_entropy(
    logits: Logits, target: Target | Probabilities, *, label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """-log softmax of the target class, averaged over the batch, in nats.

    Targets are class numbers, or probabilities by which the losses of the classes are weighed.
    `label_smoothing` moves that share of the target to all classes alike
    (Szegedy et al. 2016, arXiv:1512.00567).
    """
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing)
