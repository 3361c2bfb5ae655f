"""Metrics of one's own: `report(name, value)` anywhere in a training step, one line per metric.

The means appear beside the training loss, in the terminal, `metrics.jsonl` and W&B. They change no
result: neither a run's identity nor its version depends on them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Sums = dict[str, tuple[float | Tensor, int]]
"""By name: the sum of the values since the last logging step, on their device, and their number."""

_recorded: Sums | None = None
"""Where the step that is running keeps its sums; None outside of training steps."""


def report(name: str, value: int | float | Tensor) -> None:
    """Record a value of the running training step: `report("train/entropy", entropy)`.

    Callable in a model's forward, a loss or the step, any number of times. A tensor counts by the
    mean of its entries and stays on its device: only logging steps wait for it. They log the mean
    over all calls since the last logging step, and over processes. Outside of a training step,
    as in evaluation, nothing happens. Code that `torch.compile` traces records nothing either, so
    that its graph stays whole: with `compile = True` report from the loss or the step.
    """
    if torch.compiler.is_compiling() or _recorded is None:
        return
    if isinstance(value, Tensor):
        value = value.detach().float().mean()
    total, count = _recorded.get(name, (0.0, 0))
    _recorded[name] = (total + value, count + 1)


@contextmanager
def recording(sums: Sums) -> Iterator[None]:
    """The block in which `report` adds to these sums."""
    global _recorded
    outer, _recorded = _recorded, sums
    try:
        yield
    finally:
        _recorded = outer


def numbers(sums: Sums) -> dict[str, tuple[float, int]]:
    """The sums as plain numbers. This waits for the device."""
    return {name: (float(total), count) for name, (total, count) in sums.items()}
