"""A data set as training sees it: three splits that share no image, and its statistics."""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from vitx.data.config import DataConfig
from vitx.data.images import Files, Split, read_all
from vitx.data.sources import SOURCES, Images, Source
from vitx.files import shown
from vitx.model.preprocessing import Preprocessing
from vitx.registry import UserError, resolve

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of ImageNet's colours, in [0, 1]."""


@dataclass(frozen=True)
class Dataset:
    """Three splits that share no image."""

    train: Images
    val: Images
    test: Images
    classes: tuple[str, ...]
    mean: Float[Tensor, " c"]
    std: Float[Tensor, " c"]
    origin: str
    config: DataConfig
    size: tuple[int, int]
    """Height and width that batches have."""
    peak: int = 255
    """Largest stored value of a pixel."""
    skipped: list[str] = field(default_factory=list)
    """Pictures that could not be used, and why; grows while files are read."""
    notes: tuple[str, ...] = ()
    """What was left out, for people."""

    def to(self, device: torch.device | str) -> "Dataset":
        """What lies in memory on a device; files stay where they are."""
        parts = {
            name: split.to(device)
            for name in ("train", "val", "test")
            if isinstance(split := getattr(self, name), Split)
        }
        return replace(self, mean=self.mean.to(device), std=self.std.to(device), **parts)

    @cached_property
    def fingerprint(self) -> str:
        """Two hashes: of which images are in which split, and of the names and pictures.

        Pictures in memory are hashed whole. Of an encoded picture count its size and its first and
        last bytes, of its path the folder and the name: where the data lie is no part of them.
        """
        first, second = (hashlib.blake2b(digest_size=16) for _ in range(2))
        second.update("\n".join(self.classes).encode())
        for split in (self.train, self.val, self.test):
            first.update(split.target.cpu().numpy().tobytes())
            if isinstance(split, Split):
                first.update(split.image.cpu().numpy().tobytes())
                continue
            names = ("/".join(shown(str(item)).split("/")[-2:]) for item in split.items)
            first.update("\n".join(names).encode())
            for ends in split.ends():
                second.update(ends)
        return f"{first.hexdigest()}-{second.hexdigest()}"

    def is_of(self, fingerprint: str) -> bool:
        """Whether the fingerprint is of these data; one without a second hash is an older one."""
        return same_data([self.fingerprint, fingerprint])

    @property
    def preprocessing(self) -> Preprocessing:
        """What a picture needs before the model sees it.

        Images in memory are taken whole, so a picture of another size is squashed.
        """
        mean, std = ((value / self.peak).tolist() for value in (self.mean, self.std))
        resize = "squash" if isinstance(self.train, Split) else self.config.resize
        return Preprocessing(resize, tuple(mean), tuple(std))

    def normalise(self, image: Tensor) -> Tensor:
        """Stored values to about mean 0 and standard deviation 1."""
        mean, std = (rearrange(value, "c -> c 1 1").to(image) for value in (self.mean, self.std))
        return (image - mean) / std

    def pixels(self, image: Tensor) -> Tensor:
        """The inverse of `normalise`, as values from 0 to 1, for people to look at."""
        mean, std = (rearrange(value, "c -> c 1 1").to(image) for value in (self.mean, self.std))
        return ((image * std + mean) / self.peak).clamp(0, 1)


def same_data(fingerprints: Iterable[str]) -> bool:
    """Whether all are of the same data, as far as they tell: older ones are a first hash alone."""
    parts = [fingerprint.partition("-") for fingerprint in fingerprints]
    first, second = {part[0] for part in parts}, {part[2] for part in parts} - {""}
    return len(first) < 2 and len(second) < 2


def load(config: DataConfig, *, size: tuple[int, int] | None = None) -> Dataset:
    """The data set that the configuration names, split. `size` (h, w) is for pictures in files.

    Raises ValueError where the data is missing or cannot be split as configured.
    """
    source: Source = resolve(config.name, SOURCES)(root=config.root, max_pixels=config.max_pixels)
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    splits, skipped = dict(source.splits), []
    for name, split in splits.items():
        if source.in_memory and isinstance(split, Files):
            splits[name], bad = read_all(split, skip=config.on_bad_image == "skip")
            skipped += bad
    if "train" not in splits:
        raise UserError(f"data.root = {config.root!r} holds no training split")
    train = splits["train"]
    held = {}
    for name, images in (("test", config.test), ("val", config.val)):
        if name in splits:
            held[name] = _part(splits[name], name, images, config)
        elif images:
            rest, out = _hold_out(train, name, images, config)
            train, held[name] = train.take(rest), train.take(out)
        else:
            held[name] = train.take([])
    train = _part(train, "train", config.train, config)
    _check_variations(config, train)
    mean, std = _statistics(train, source.peak, config)
    if isinstance(train, Split):
        size = (train.image.shape[-2], train.image.shape[-1])
    if size is None:
        raise UserError("pictures in files need the size of a model: load(config, size=(h, w))")
    return Dataset(
        train, held["val"], held["test"], source.classes, mean, std, source.origin, config, size,
        source.peak, skipped, source.notes,
    )  # fmt: skip


def _check_variations(config: DataConfig, train: Images) -> None:
    """ValueError for a variation that images of this kind don't get."""
    if isinstance(train, Split) and config.randaugment:
        raise UserError(
            f"data.randaugment = {config.randaugment!r} is for pictures read from files; "
            f"{config.name} is held in memory, where rotate, scale, shear and shift vary images"
        )
    for name in ("rotate", "scale", "shear", "shift"):
        if isinstance(train, Files) and getattr(config, name):
            raise UserError(
                f"data.{name} = {getattr(config, name)} is for images in memory; {config.name} is "
                "read from files, which data.randaugment varies"
            )


def _part(images: Images, name: str, count: int, config: DataConfig) -> Images:
    """A random part of a split, or all of it for a count of 0."""
    if count > len(images):
        raise UserError(f"data.{name} = {count}, but there are only {len(images)} images")
    if count in (0, len(images)):
        return images
    return images.take(_hold_out(images, name, count, config)[1])


def _hold_out(
    images: Images, name: str, count: int, config: DataConfig
) -> tuple[Sequence[int], Sequence[int]]:
    """Indices that stay and those held out for the split `name`, by the split seed."""
    from sklearn.model_selection import train_test_split

    labels = images.target.numpy()
    if count >= len(labels):
        raise UserError(f"data.{name} = {count}: that many can't be held out of {len(labels)}")
    counts = torch.unique(images.target, return_counts=True)[1]
    classes, least = len(counts), int(counts.min())
    if config.stratified and (min(count, len(labels) - count) < classes or least < 2):
        raise UserError(
            f"data.{name} = {count} of {len(labels)} images can't keep the shares of {classes} "
            "classes; set data.stratified=False, or hold out more"
        )
    rest, held = train_test_split(
        list(range(len(labels))),
        test_size=count,
        stratify=labels if config.stratified else None,
        random_state=config.split_seed + (name == "train"),
    )
    return list(rest), list(held)


def _statistics(train: Images, peak: int, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, in stored values."""
    channels = train.image.shape[1] if isinstance(train, Split) else 3
    if config.normalise == "half":
        mean, std = torch.full((2, channels), 0.5)
    elif config.normalise == "imagenet":
        if channels != 3:
            raise UserError(f"data.normalise = 'imagenet' is for 3 channels, not {channels}")
        mean, std = torch.tensor(IMAGENET)
    elif isinstance(train, Split):
        pixels = rearrange(train.image, "images c h w -> c (images h w)").float()
        std = pixels.std(dim=1)
        return pixels.mean(dim=1), torch.where(std > 0, std, 1.0)  # a constant channel is 0
    else:
        raise UserError(
            "data.normalise = 'data' needs images in memory; choose 'imagenet' or 'half' for files"
        )
    return peak * mean, peak * std
