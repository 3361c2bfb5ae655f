"""Predictions of a model on a split, and what they are worth."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitx.data import Dataset, readings
from vitx.images import Split
from vitx.parallel import ALONE, Part, gathered
from vitx.sources import Images


@dataclass(frozen=True)
class Score:
    """Accuracy in [0, 1], its binomial standard error, and the mean cross-entropy in nats."""

    accuracy: float
    standard_error: float
    loss: float
    images: int


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.inference_mode()
def predict(
    model: nn.Module, dataset: Dataset, split: Images, *, batch: int = 512, part: Part = ALONE
) -> tuple[Tensor, Tensor]:
    """Logits (images, classes) of a split and its class numbers, on the model's device.

    Of several processes each computes its share once; all get the whole, in the split's order.
    Pictures that are skipped as bad are in neither.
    """
    some = next(model.parameters())
    found = []
    with evaluating(model):
        stream = readings(
            dataset, split, batch=batch, device=some.device, part=(part.rank, part.ranks)
        )
        for image, target in stream:
            found.append((model(image.to(some.dtype)), target))
    if not found:
        empty = torch.zeros(0, len(dataset.classes), device=some.device)
        found = [(empty, torch.zeros(0, dtype=torch.long, device=some.device))]
    logits, target = (torch.cat(values) for values in zip(*found, strict=True))
    if part.alone:
        return logits, target
    shares = gathered((logits.cpu(), target.cpu()), part)
    return _interleaved([a for a, _ in shares]).to(some.device), _interleaved(
        [b for _, b in shares]
    ).to(some.device)


def score(logits: Tensor, target: Tensor) -> Score:
    """Accuracy and loss of logits (images, classes) against class numbers (images)."""
    images = len(target)
    if not images:
        return Score(float("nan"), float("nan"), float("nan"), 0)
    accuracy = (logits.argmax(dim=1) == target).float().mean().item()
    loss = F.cross_entropy(logits.float(), target).item()
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

    def rows(split: Images) -> np.ndarray:
        assert isinstance(split, Split)
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


def _interleaved(shares: list[Tensor]) -> Tensor:
    """Every process's k-th in turn: the order before they were dealt out."""
    longest = max(len(share) for share in shares)
    return torch.stack(
        [row for k in range(longest) for share in shares for row in share[k : k + 1]]
    )
