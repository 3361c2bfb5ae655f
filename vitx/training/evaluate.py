"""Predictions of a model on a split, and what they are worth."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitx.data.dataset import Dataset
from vitx.data.images import Split
from vitx.data.loader import evaluation_batches
from vitx.data.sources import Images
from vitx.model.vit import Vit
from vitx.registry import UserError
from vitx.training.parallel import ALONE, Part, gathered

BATCH = 512
"""Images at a time, at most; a run takes its own batch, which its memory holds."""


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
    model: nn.Module, dataset: Dataset, split: Images, *, batch: int = BATCH, part: Part = ALONE
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (images, classes) of a split, its class numbers and indices, on the model's device.

    Of several processes each computes its share once; all get the whole, in the split's order.
    Pictures that are skipped as bad are left out.
    """
    first = next(model.parameters())
    # A share without images: the split has none, or fewer than there are processes.
    logits = [torch.zeros(0, len(dataset.classes), dtype=first.dtype, device=first.device)]
    target = [torch.zeros(0, dtype=torch.long, device=first.device)]
    with evaluating(model):
        share = (part.rank, part.ranks)
        for image, label in evaluation_batches(
            dataset, split, batch=batch, device=first.device, part=share
        ):
            logits.append(model(image.to(first.dtype)))
            target.append(label)
    whole, labels = torch.cat(logits), torch.cat(target)
    if not part.alone:
        shares = gathered((whole.cpu(), labels.cpu()), part)
        whole, labels = (_interleaved(each).to(first.device) for each in zip(*shares, strict=True))
    kept = (labels >= 0).nonzero().flatten()
    return whole[kept], labels[kept], kept


class NotFinite(UserError):
    """Outputs that mean no class."""


def check_finite(outputs: Tensor) -> None:
    """Raises NotFinite for outputs (images, …) of which some are not finite."""
    bad = ~outputs.isfinite().flatten(1).all(dim=1)
    if bad.any():
        raise NotFinite(f"the outputs for {int(bad.sum()):,} of {len(bad):,} images are not finite")


def score(logits: Tensor, target: Tensor) -> Score:
    """Accuracy and loss of logits (images, classes) against class numbers (images).

    Raises NotFinite for logits that are not finite.
    """
    images = len(target)
    if not images:
        return Score(float("nan"), float("nan"), float("nan"), 0)
    check_finite(logits)
    accuracy = (logits.argmax(dim=1) == target).float().mean().item()
    loss = F.cross_entropy(logits.float(), target).item()
    return Score(accuracy, (accuracy * (1 - accuracy) / images) ** 0.5, loss, images)


def top(logits: Tensor, target: Tensor, k: int) -> float:
    """Share of images whose class is among the k largest logits; 1 where there are no more."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == rearrange(target, "images -> images 1")).any(dim=1).float().mean().item()


@dataclass(frozen=True)
class Calibration:
    """How right a model is when it is how sure; bins of equal width over [0, 1]."""

    edges: Float[Tensor, " edges"]
    images: Int[Tensor, " bins"]
    confidence: Float[Tensor, " bins"]
    """Mean of the largest probability in a bin; 0 where it is empty."""
    accuracy: Float[Tensor, " bins"]
    error: float
    """Σ images/all · |accuracy - confidence| (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""


def calibration(logits: Tensor, target: Tensor, *, bins: int = 15) -> Calibration:
    """Accuracy against confidence of softmax probabilities."""
    sure, guess = logits.double().softmax(dim=1).cpu().max(dim=1)
    right = (guess == target.cpu()).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    place = torch.bucketize(sure, edges[1:-1])
    images = torch.bincount(place, minlength=bins)
    sums = [torch.bincount(place, weights=value, minlength=bins) for value in (sure, right)]
    confidence, accuracy = (value / images.clamp(min=1) for value in sums)
    error = ((accuracy - confidence).abs() * images).sum() / len(target)
    return Calibration(edges, images, confidence, accuracy, error.item())


def by_class(logits: Tensor, target: Tensor, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and number of images of each class."""
    from sklearn.metrics import precision_recall_fscore_support

    guess, labels = logits.argmax(dim=1).cpu().numpy(), range(len(classes))
    scores = np.stack(
        precision_recall_fscore_support(target.cpu().numpy(), guess, labels=labels, zero_division=0)  # type: ignore[arg-type]
    )
    names = ("precision", "recall", "f1", "images")
    return {
        word: dict(zip(names, of_class.tolist(), strict=True))
        for word, of_class in zip(classes, scores.T, strict=True)
    }


@torch.inference_mode()
def features(
    vit: Vit, dataset: Dataset, split: Images, *, batch: int = BATCH
) -> tuple[np.ndarray, np.ndarray]:
    """Frozen features (images, d) of a split, and its class numbers."""
    first = next(vit.parameters())
    with evaluating(vit):
        batches = [
            (vit.features(image.to(first.dtype)).float().cpu(), target.cpu())
            for image, target in evaluation_batches(
                dataset, split, batch=batch, device=first.device
            )
        ]
    values, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    check_finite(values)
    return values[labels >= 0].numpy(), labels[labels >= 0].numpy()


Labelled = tuple[np.ndarray, np.ndarray]


def balanced(target: Tensor, images: int, *, seed: int = 0) -> list[int]:
    """Indices of so many images at most, at random, as many of each class as it has; 0 for all.

    A class with fewer than its share gives all it has, and the others share the rest.
    """
    if not 0 < images < len(target):
        return list(range(len(target)))
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    shuffled = target.cpu()[order]
    # Of each image, how many of its class come before it: the first of each class, then the second.
    turn = torch.zeros_like(order)
    for number in shuffled.unique():
        of_class = shuffled == number
        turn[of_class] = torch.arange(int(of_class.sum()))
    return order[turn.argsort(stable=True)[:images]].sort().values.tolist()


def nearest_neighbours(train: Labelled, test: Labelled, *, k: int) -> float:
    """Accuracy of a vote of the k training images whose features have the smallest angle."""
    from sklearn import config_context
    from sklearn.neighbors import KNeighborsClassifier

    machine = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
    with config_context(working_memory=64):  # MiB of distances at a time
        return float(machine.fit(*train).score(*test))


def linear_probe(train: Labelled, test: Labelled) -> float | None:
    """Accuracy of logistic regression on standardised features, with scikit-learn's defaults.

    None if the training images are of one class, on which it can't be fitted.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(set(train[1].tolist())) < 2:
        return None
    machine = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(machine.fit(*train).score(*test))


def confusion(logits: Tensor, target: Tensor, classes: int) -> np.ndarray:
    """Counts (classes, classes): rows are true classes, columns predicted ones."""
    from sklearn.metrics import confusion_matrix

    guess = logits.argmax(dim=1).cpu().numpy()
    return confusion_matrix(target.cpu().numpy(), guess, labels=range(classes))


def svm_accuracy(dataset: Dataset) -> float:
    """Test accuracy of a support vector machine with an RBF kernel on raw pixels.

    A reference without a network, beside the models: fitted on the training split, its two knobs
    chosen on validation.
    """
    from sklearn.svm import SVC

    def pixels(split: Images) -> np.ndarray:
        assert isinstance(split, Split)
        return split.image.flatten(1).cpu().numpy().astype(np.float64)

    train, val, test = (
        (pixels(split), split.target.cpu().numpy())
        for split in (dataset.train, dataset.val, dataset.test)
    )
    machines = [
        SVC(gamma=gamma, C=c).fit(*train)  # type: ignore[arg-type]
        for gamma in (0.0003, 0.001, 0.003)
        for c in (1.0, 10.0, 100.0)
    ]
    return float(max(machines, key=lambda machine: machine.score(*val)).score(*test))


def _interleaved(shares: Sequence[Tensor]) -> Tensor:
    """Every process's k-th in turn: the order before they were dealt out."""
    places = torch.cat([torch.arange(len(share)) for share in shares])
    return torch.cat(list(shares))[places.argsort(stable=True)]
