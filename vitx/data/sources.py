"""Sources of images: each function reads one data set and gives its own splits.

A source takes `root` and `max_pixels` from the configuration; further knobs are its own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from vitx.data.images import Files, Split, open_picture
from vitx.registry import Registry, UserError, nearest

Images = Split | Files

SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
"""Our splits by the names that they have elsewhere."""


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
    read = partial(_read_file, max_pixels=max_pixels)
    splits, classes = {}, ()
    for name, torchvisions in zip(("train", "test"), parts[part], strict=False):
        try:
            scenes = Places365(root, split=torchvisions, small=True, download=False)
        except RuntimeError as error:  # torchvision's word for missing or changed files
            raise UserError(f"data.root = {root!r} holds no Places365: {error}") from None
        items, targets = zip(*scenes.imgs, strict=True)
        splits[name] = Files(items, torch.tensor(targets), read)
        classes = tuple(scenes.classes)
    return Source(splits, classes, f"Places365 ({part}) in {root}", in_memory=False)


def imagefolder(*, root: str, max_pixels: int) -> Source:
    """Pictures in `train/CLASS/`, `val/CLASS/` and `test/CLASS/`, or all in `CLASS/`."""
    folder = _folder(root)
    # A class may be called valid: under the other names of a split lie folders.
    inner = [
        name for name, ours in SPLITS.items()
        if (folder / name).is_dir()
        and (name == ours or any(path.is_dir() for path in (folder / name).iterdir()))
    ]  # fmt: skip
    parts = {name: folder / inside for name, inside in _split_names(inner, root).items()}
    return _folders(parts or {"train": folder}, max_pixels, in_memory=False)


def hf(*, root: str, max_pixels: int, image: str = "", label: str = "") -> Source:
    """A data set of Hugging Face `datasets`: a name on the hub, or a folder that it wrote.

    The columns of pictures and of class labels are found by their type; name them if there is
    more than one.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError("data.name = 'hf' needs datasets: pip install -e '.[hf]'") from error
    if not root:
        raise UserError("data.root is empty; hf needs a name on the hub or a folder")
    saved = Path(root, "dataset_dict.json").exists() or Path(root, "state.json").exists()
    try:
        loaded: Any = datasets.load_from_disk(root) if saved else datasets.load_dataset(root)
    except ValueError as error:
        raise UserError(f"data.root = {root!r} can't be read by datasets: {error}") from error
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    parts: dict[str, Any] = {name: loaded[key] for name, key in _split_names(loaded, root).items()}
    if "train" not in parts:
        raise UserError(f"{root} has no split named train; it has {', '.join(loaded)}")
    features = parts["train"].features
    picture = _column(features, image, datasets.Image, "image")
    labels = _column(features, label, datasets.ClassLabel, "label")
    splits = {
        name: _hub_files(part.cast_column(picture, datasets.Image(decode=False)), picture, labels,
                         f"{root} {name}", max_pixels)
        for name, part in parts.items()
    }  # fmt: skip
    classes = tuple(features[labels].names)
    return Source(splits, classes, f"{root} (Hugging Face datasets)", in_memory=False)


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


def _split_names(there: Iterable[str], where: str) -> dict[str, str]:
    """Which of the names there is which split; ValueError if two of them are one."""
    theirs: dict[str, str] = {}
    for name in there:
        if (ours := SPLITS.get(name)) in theirs:
            raise UserError(f"{where} holds both {theirs[ours]} and {name}, which mean one split")
        if ours:
            theirs[ours] = name
    return theirs


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
    folders = {name: folder / name for name in ("train", "test")}
    if all(path.is_dir() for path in folders.values()):
        return _folders(folders, max_pixels, in_memory=True)
    raise UserError(
        f"data.root = {root!r} holds neither {kind.base_folder}/ nor train/ and test/ with a "
        "folder per class"
    )


def _folders(parts: Mapping[str, Path], max_pixels: int, *, in_memory: bool) -> Source:
    """Splits of one folder per class; all must have the classes of the first."""
    from torchvision.datasets import ImageFolder

    read = partial(_read_file, max_pixels=max_pixels)
    splits: dict[str, Images] = {}
    classes: list[str] = []
    for name, folder in parts.items():
        try:
            pictures = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise UserError(f"{folder} holds no folder per class with pictures: {error}") from None
        if classes and pictures.classes != classes:
            odd = sorted(set(pictures.classes) ^ set(classes))
            raise UserError(f"{folder} has other classes than the split before it: {odd[:3]}")
        classes = pictures.classes
        items, targets = zip(*pictures.samples, strict=True)
        splits[name] = Files(items, torch.tensor(targets), read)
    where = ", ".join(f"{name}/" for name in parts)
    return Source(splits, tuple(classes), f"picture folders {where}", in_memory=in_memory)


def _hub_files(part: Any, picture: str, label: str, name: str, max_pixels: int) -> Files:
    labels, classes = part[label], part.features[label].num_classes
    for row, number in enumerate(labels):
        if number is None or not 0 <= number < classes:
            raise UserError(f"{name}, row {row}: the label {number} is none of {classes} classes")
    target = torch.tensor(labels)
    read = partial(_read_row, part=part, picture=picture, name=name, max_pixels=max_pixels)
    return Files(range(len(part)), target, read)


def _read_file(path: str, *, max_pixels: int) -> object:
    return open_picture(Path(path), max_pixels=max_pixels)


def _read_row(row: int, *, part: Any, picture: str, name: str, max_pixels: int) -> Any:
    stored = part[row][picture]
    label = f"{name}, row {row}"
    if stored["bytes"] is None:
        return open_picture(Path(stored["path"]), name=label, max_pixels=max_pixels)
    return open_picture(stored["bytes"], name=label, max_pixels=max_pixels)


def _column(features: Mapping[str, object], named: str, kind: type, what: str) -> str:
    if named:
        if named not in features:
            raise UserError(f"hf: {what} = {named!r} is no column; {nearest(named, features)}")
        if not isinstance(features[named], kind):
            raise UserError(f"hf: {what} = {named!r} is no column of {kind.__name__} values")
        return named
    columns = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(columns) != 1:
        raise UserError(
            f"hf: {len(columns)} columns hold {kind.__name__} values "
            f"({', '.join(columns) or ', '.join(features)}); name one with hf({what}='…')"
        )
    return columns[0]


def _folder(root: str) -> Path:
    if not root:
        raise UserError("data.root is empty; give the folder of the data, --data.root DIR")
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"data.root = {root!r} is not a folder")
    return folder
