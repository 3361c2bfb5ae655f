"""The learning rate after warm-up: its share of the peak, by progress (0 to 1) of the steps."""

import math

from vitx.registry import Registry
from vitx.settings import Share


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.0


def linear(progress: float) -> float:
    """1 - progress."""
    return max(1.0 - progress, 0.0)


def cosine(progress: float, *, end: Share = 0.0) -> float:
    """end + (1 - end)·½(1 + cos π·progress).

    Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5.
    """
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def wsd(progress: float, *, decay: Share = 0.2) -> float:
    """1, then linear to 0 over the last `decay` of the steps: warm-up, stable, decay.

    Hu et al. 2024, arXiv:2404.06395, with the linear decay of Hägele et al. 2024, arXiv:2405.18392.
    """
    return min(1.0, max(1.0 - progress, 0.0) / decay) if decay else 1.0


SCHEDULE = Registry("optim.schedule", constant, linear, cosine, wsd)
