"""Data: sources of images, splits, augmentation, and batches whose order a seed fixes."""

from vitx.data.dataset import Dataset, load
from vitx.data.loader import (
    Batch,
    batches,
    check_batch,
    epoch_draws,
    epoch_order,
    evaluation_batches,
    steps_per_epoch,
)

__all__ = [
    "Batch",
    "Dataset",
    "batches",
    "check_batch",
    "epoch_draws",
    "epoch_order",
    "evaluation_batches",
    "load",
    "steps_per_epoch",
]
