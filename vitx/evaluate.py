"""Predictions of a model on a split, and what they are worth."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vitx.data import Dataset, Split


@dataclass(frozen=True)
class Score:
    """Accuracy in [0, 1], its binomial standard error, and the mean cross-entropy in nats."""

    accuracy: float
    standard_error: float
    loss: float
    images: int


@torch.inference_mode()
def predict(model: nn.Module, dataset: Dataset, split: Split, *, batch: int = 512) -> Tensor:
    """Logits (n, classes) of a split, in evaluation mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    dtype = next(model.parameters()).dtype
    logits = [model(dataset.normalise(image.to(dtype))) for image in split.image.split(batch)]
    model.train(was_training)
    return torch.cat(logits)


def score(logits: Tensor, target: Tensor) -> Score:
    """Accuracy and loss of logits (n, classes) against class numbers (n)."""
    images = len(target)
    accuracy = (logits.argmax(dim=1) == target).float().mean().item()
    loss = nn.functional.cross_entropy(logits, target).item()
    return Score(accuracy, (accuracy * (1 - accuracy) / images) ** 0.5, loss, images)


def confusion(logits: Tensor, target: Tensor, classes: int) -> np.ndarray:
    """Counts (classes, classes): rows are true classes, columns predicted ones."""
    from sklearn.metrics import confusion_matrix

    guess = logits.argmax(dim=1).cpu().numpy()
    return confusion_matrix(target.cpu().numpy(), guess, labels=range(classes))


def svm_accuracy(dataset: Dataset) -> float:
    """Test accuracy of a support vector machine with an RBF kernel on raw pixels.

    A reading that needs no network, beside the models: fitted on the training split, its two knobs
    chosen on validation.
    """
    from sklearn.svm import SVC

    def rows(split: Split) -> np.ndarray:
        return split.image.flatten(1).cpu().numpy().astype(np.float64)

    labels = {
        name: getattr(dataset, name).target.cpu().numpy() for name in ("train", "val", "test")
    }
    pixels = {name: rows(getattr(dataset, name)) for name in labels}
    machines = [
        SVC(gamma=gamma, C=c).fit(pixels["train"], labels["train"])  # type: ignore[arg-type]
        for gamma in (0.0003, 0.001, 0.003)
        for c in (1.0, 10.0, 100.0)
    ]
    best = max(machines, key=lambda machine: machine.score(pixels["val"], labels["val"]))
    return float(best.score(pixels["test"], labels["test"]))
