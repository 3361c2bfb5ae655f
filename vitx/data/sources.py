"""Sources of images: each function reads one data set and gives its own splits.

A source takes `root` and `max_pixels` from the configuration; further knobs are its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from vitx.data import folders, hub
from vitx.data.folders import in_file, matched
from vitx.data.images import Files, Split
from vitx.files import shown
from vitx.registry import Registry, UserError, nearest

Images = Split | Files


@dataclass(frozen=True)
class Source:
    """A data set as it comes: `train`, and where it has them `val` and `test`."""

    splits: Mapping[str, Images]
    classes: tuple[str, ...]
    origin: str
    """What was read, for people."""
    peak: int = 255
    """Largest stored value of a pixel."""
    in_memory: bool = True
    """Whether pictures in files are small and alike, and so decoded once."""
    notes: tuple[str, ...] = ()
    """What was left out, for people."""


def digits(*, root: str = "", max_pixels: int = 0) -> Source:
    """1,797 scans of handwritten digits, 1×8×8, values 0 to 16, embedded in scikit-learn.

    Test set of Alpaydin and Kaynak's optical recognition data (UCI, 1998).
    """
    from sklearn.datasets import load_digits

    scans: Any = load_digits()
    scanned = torch.from_numpy(scans.images).to(torch.uint8)
    image = rearrange(scanned, "images h w -> images 1 h w")
    split = Split(image, torch.from_numpy(scans.target).long())
    classes = tuple(str(name) for name in scans.target_names)
    return Source({"train": split}, classes, "scikit-learn's digits", peak=16)


def cifar10(*, root: str, max_pixels: int) -> Source:
    """60,000 photographs of 10 classes, 3×32×32 (Krizhevsky 2009).

    `root` holds torchvision's batches, or pictures in `train/CLASS/` and `test/CLASS/`.
    """
    from torchvision.datasets import CIFAR10

    return _cifar(CIFAR10, root, max_pixels)


def cifar100(*, root: str, max_pixels: int) -> Source:
    """60,000 photographs of 100 classes, 3×32×32 (Krizhevsky 2009); `root` as in `cifar10`."""
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, root, max_pixels)


def places365(*, root: str, max_pixels: int, part: str = "val") -> Source:
    """Photographs of 365 scenes, resized to 256×256 (Zhou et al. 2017), in torchvision's folders.

    `part` is `val` (36,500 labelled images as one split) or `train-standard` (1.8 million for
    training, and those 36,500 as the test split, since the official test labels are not public).
    """
    from torchvision.datasets import Places365

    parts = {"val": ("val",), "train-standard": ("train-standard", "val")}
    if part not in parts:
        raise UserError(f"places365: part = {part!r} is not known; {nearest(part, parts)}")
    splits, classes = {}, ()
    for name, torchvisions in zip(("train", "test"), parts[part], strict=False):
        try:
            scenes = Places365(root, split=torchvisions, small=True, download=False)
        except RuntimeError as error:  # torchvision's word for missing or changed files
            raise UserError(f"data.root = {root!r} holds no Places365: {error}") from None
        items, targets = zip(*scenes.imgs, strict=True)
        splits[name] = Files(items, torch.tensor(targets), in_file, max_pixels)
        classes = tuple(scenes.classes)
    return Source(splits, classes, f"Places365 ({part}) in {root}", in_memory=False)


def imagefolder(*, root: str, max_pixels: int) -> Source:
    """Pictures in `train/CLASS/`, `val/CLASS/` and `test/CLASS/`, or all in `CLASS/`.

    Splits may have the usual other names, such as `Training`, and one folder may lie around all.
    """
    return _pictures(_folder(root), max_pixels, in_memory=False)


def hf(
    *, root: str, max_pixels: int, image: str = "", label: str = "", config: str = ""
) -> Source:  # fmt: skip
    """A data set of Hugging Face `datasets`: a name on the hub, or a folder that it wrote or reads.

    The columns of pictures and labels are found by type and name; `image` and `label` name them.
    `config` is one of several configurations.
    """
    splits, notes = hub.read(root, max_pixels=max_pixels, image=image, label=label, config=config)
    classes = splits["train"].classes
    origin = f"{root} (Hugging Face datasets)"
    files = matched(splits, classes, root)
    return Source(files, classes, origin, in_memory=False, notes=tuple(notes))


def fake(
    *, root: str = "", max_pixels: int = 0, images: int = 1000, size: int = 32, classes: int = 10,
    channels: int = 3,
) -> Source:  # fmt: skip
    """Noise around one random picture per class: a task without files that a model can learn."""
    if min(images, size, classes, channels) < 1:
        raise UserError("data.name = fake(…): images, size, classes and channels are at least 1")
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(classes, channels, size, size, generator=generator)
    target = torch.arange(images) % classes
    noise = torch.rand(images, channels, size, size, generator=generator)
    image = (255 * (0.5 * centres[target] + 0.5 * noise)).to(torch.uint8)
    names = tuple(f"class {number}" for number in range(classes))
    return Source({"train": Split(image, target)}, names, f"{images:,} made-up images")


SOURCES = Registry(
    "data.name", digits, cifar10, cifar100, places365, imagefolder, hf, fake,
    given=("root", "max_pixels"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a data set without reading it."""

    image: tuple[int, int]
    channels: int
    classes: int
    train: int
    """Images that the splits are taken from."""
    test: int = 0
    """Images of the data set's own test split; 0 if it has none."""


FACTS = {
    "digits": Facts(image=(8, 8), channels=1, classes=10, train=1797),
    "cifar10": Facts(image=(32, 32), channels=3, classes=10, train=50_000, test=10_000),
    "cifar100": Facts(image=(32, 32), channels=3, classes=100, train=50_000, test=10_000),
}


def _cifar(kind: Any, root: str, max_pixels: int) -> Source:
    folder = _folder(root)
    if (folder / kind.base_folder).is_dir():
        try:
            parts = {"train": kind(root, train=True), "test": kind(root, train=False)}
        except RuntimeError as error:  # torchvision's word for missing or changed files
            raise UserError(f"{folder / kind.base_folder}: {error}") from None
        splits = {}
        for name, photographs in parts.items():
            image = rearrange(torch.from_numpy(photographs.data), "images h w c -> images c h w")
            splits[name] = Split(image.contiguous(), torch.tensor(photographs.targets))
        classes = tuple(parts["train"].classes)
        return Source(splits, classes, f"torchvision's {kind.__name__} batches")
    if all((folder / name).is_dir() for name in ("train", "test")):
        return _pictures(folder, max_pixels, in_memory=True)
    raise UserError(
        f"data.root = {root!r} holds neither {kind.base_folder}/ nor train/ and test/ with a "
        "folder per class"
    )


def _pictures(folder: Path, max_pixels: int, *, in_memory: bool) -> Source:
    """Picture folders, with the classes of the training split, which comes first."""
    splits, origin, passed = folders.read(folder, max_pixels=max_pixels)
    classes = next(iter(splits.values())).classes
    notes = (f"{origin}: passed over {passed}",) if passed else ()
    files = matched(splits, classes, shown(folder))
    return Source(files, classes, origin, in_memory=in_memory, notes=notes)


def _folder(root: str) -> Path:
    if not root:
        raise UserError("data.root is empty; give the folder of the data, --data.root DIR")
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"data.root = {root!r} is not a folder")
    return folder
