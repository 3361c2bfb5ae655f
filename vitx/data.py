"""Data sets in memory: uint8 images with labels, split by a fixed seed, varied on the device."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vitx.axes import Image
from vitx.config import DATA, DataConfig
from vitx.functional.augment import AFFINE_DRAWS, affine


@dataclass(frozen=True)
class Split:
    """Images as stored and their class numbers."""

    image: UInt8[Tensor, "images c h w"]
    target: Int[Tensor, "images"]

    def __len__(self) -> int:
        return len(self.target)

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.image.to(device), self.target.to(device))


@dataclass(frozen=True)
class Dataset:
    """Three splits that share no image. Validation chooses, test is read once at the end."""

    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    mean: float
    std: float

    def to(self, device: torch.device | str) -> "Dataset":
        train, val, test = (split.to(device) for split in (self.train, self.val, self.test))
        return replace(self, train=train, val=val, test=test)

    def normalise(self, image: Tensor) -> Tensor:
        """Stored values to mean 0 and standard deviation 1 over the training split."""
        return (image - self.mean) / self.std


def load(config: DataConfig) -> Dataset:
    """The data set that the configuration names."""
    return LOADERS[config.name](config)


def digits(config: DataConfig) -> Dataset:
    """1,797 scans of handwritten digits, 1×8×8, values 0 to 16, embedded in scikit-learn.

    Test set of Alpaydin and Kaynak's optical recognition data (UCI, 1998). Stratified into 1,257
    train, 180 validation and 360 test images by `config.split_seed`.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    image = torch.from_numpy(scans.images).to(torch.uint8)  # type: ignore[attr-defined]
    target = torch.from_numpy(scans.target).long()  # type: ignore[attr-defined]
    labels = target.numpy()
    rest, test = train_test_split(
        range(len(labels)),
        test_size=DATA["digits"].test,
        stratify=labels,
        random_state=config.split_seed,
    )
    train, val = train_test_split(
        rest,
        test_size=DATA["digits"].val,
        stratify=labels[rest],
        random_state=config.split_seed,
    )
    pixels = image[train].float()
    classes = tuple(str(name) for name in scans.target_names)  # type: ignore[attr-defined]
    return Dataset(
        train=_rows(image, target, train),
        val=_rows(image, target, val),
        test=_rows(image, target, test),
        classes=classes,
        mean=pixels.mean().item(),
        std=pixels.std().item(),
    )


LOADERS = {"digits": digits}


def epoch_order(seed: int, epoch: int, images: int) -> Int[Tensor, "images"]:
    """The order of an epoch: a permutation that depends on nothing but its arguments."""
    return torch.randperm(images, generator=_generator(seed, epoch, stream=0))


def epoch_draws(seed: int, epoch: int, images: int, draws: int) -> Float[Tensor, "images draws"]:
    """Uniform numbers of an epoch, a row an image of the split, whatever the order or device."""
    return torch.rand(images, draws, generator=_generator(seed, epoch, stream=1))


def batches(
    dataset: Dataset, config: DataConfig, *, batch: int, seed: int, start: int = 0
) -> Iterator[tuple[Image, Int[Tensor, "b"]]]:
    """Endless training batches from step `start`: varied, normalised, on the data's device.

    An epoch's last images that fill no batch are left out of that epoch.
    """
    split = dataset.train
    steps = len(split) // batch
    if not steps:
        raise ValueError(f"batch = {batch} is larger than the training split of {len(split)}")
    knobs = {name: getattr(config, name) for name in ("rotate", "scale", "shear", "shift")}
    device = split.image.device
    epoch, offset = divmod(start, steps)
    while True:
        order = epoch_order(seed, epoch, len(split))
        draws = epoch_draws(seed, epoch, len(split), AFFINE_DRAWS)
        for step in range(offset, steps):
            rows = order[step * batch : (step + 1) * batch]
            image = split.image[rows.to(device)].float()
            if any(knobs.values()):
                image = affine(image, draws[rows].to(device), **knobs)
            yield dataset.normalise(image), split.target[rows.to(device)]
        epoch, offset = epoch + 1, 0


def _rows(image: Tensor, target: Tensor, rows: Any) -> Split:
    return Split(rearrange(image[rows], "images h w -> images 1 h w"), target[rows])


def _generator(seed: int, epoch: int, *, stream: int) -> torch.Generator:
    # Three small numbers mixed into one 63-bit seed; the factors are large odd primes.
    mixed = (seed * 1_000_003 + epoch) * 998_244_353 + stream
    return torch.Generator().manual_seed(mixed % 2**63)
