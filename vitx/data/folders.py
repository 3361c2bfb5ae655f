"""Picture folders: which folders are splits and classes, and which files are pictures of them."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vitx.data.images import ENDINGS, MAX_PIXELS, Encoded, Files
from vitx.files import shown
from vitx.registry import UserError

SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "validation": "val", "valid": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Our splits by the names that they have elsewhere, in any case of letters."""


@dataclass(frozen=True)
class Labelled:
    """A split as it comes: its images, and the names of its own class numbers."""

    images: Files
    classes: tuple[str, ...]


@dataclass
class Passed:
    """What lies in picture folders and is not taken, counted by its kind."""

    kinds: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    """The first of them, for people."""

    def add(self, kind: str, path: str) -> None:
        self.kinds[kind] += 1
        if len(self.first) < MOST_NAMED:
            self.first.append(shown(path))

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.kinds.items()))
        total = self.kinds.total()
        more = ", …" if total > len(self.first) else ""
        return f"{total:,} file{'s' * (total > 1)}: {kinds} ({', '.join(self.first)}{more})"


MOST_NAMED = 5


def split_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Which of the names is which split. Raises ValueError if two of them are one."""
    theirs: dict[str, str] = {}
    for name in names:
        ours = SPLITS.get(name.casefold(), "")
        if ours in theirs:
            raise UserError(f"{where} holds both {theirs[ours]} and {name}, which mean one split")
        if ours:
            theirs[ours] = name
    return theirs


def read(root: Path, *, max_pixels: int) -> tuple[dict[str, Labelled], str, Passed]:
    """The splits in `root`, what was read, and what was passed over.

    `root` holds a folder per split with a folder per class in it, or a folder per class. One folder
    around either is looked through. Hidden folders and files are passed over.
    """
    passed = Passed()
    inner = _unwrapped(root)
    folders = _folders(inner)
    # A class may be called valid: a folder is a split if folders of classes lie in it.
    parts = split_names((f.name for f in folders if _folders(f)), shown(inner))
    if not parts:
        names = [shown(folder.name) for folder in folders]
        if len(names) > 1 and all(name.casefold() in SPLITS for name in names):
            raise UserError(
                f"{shown(inner)} holds {', '.join(names)}, which are named like splits and hold no "
                "folder per class"
            )
        parts = {"train": ""}
    outside = {f.name for f in folders} - set(parts.values()) if any(parts.values()) else set()
    for name in sorted(outside):
        for path, _ in pictures(inner / name, Passed()):
            passed.add(f"in {shown(name)}/, which is no split", path)
    parts = dict(sorted(parts.items(), key=lambda part: list(SPLITS.values()).index(part[0])))
    splits, taken = dict[str, Labelled](), dict[int, str]()
    for name, inside in parts.items():
        splits[name] = read_split(
            inner / inside, passed, taken, max_pixels=max_pixels, first=not splits
        )
    where = ", ".join(f"{shown(name)}/" for name in parts.values() if name) or f"{shown(inner)}/"
    return splits, f"picture folders {where}", passed


def read_split(
    folder: Path,
    passed: Passed,
    taken: dict[int, str],
    *,
    max_pixels: int = MAX_PIXELS,
    first: bool = True,
) -> Labelled:
    """Pictures of one folder per class; `taken` are the files of all splits so far.

    In the first split each class has pictures.
    """
    classes, items, target = list[str](), list[str](), list[int]()
    for of_class in sorted(_folders(folder), key=lambda path: order(path.name)):
        before = len(items)
        for path, file in pictures(of_class, passed):
            if (twin := taken.setdefault(file, path)) is path:
                items.append(path)
            elif Path(twin).is_relative_to(of_class):
                passed.add("links to pictures that are taken", path)
            else:
                raise UserError(f"{shown(twin)} and {shown(path)} are one file")
        if first and len(items) == before:
            raise UserError(
                f"{shown(of_class)} is a class without pictures, whose names end in "
                f"{', '.join(ENDINGS)}"
            )
        target += [len(classes)] * (len(items) - before)
        classes.append(shown(of_class.name))
    if not items:
        raise UserError(f"{shown(folder)} holds no folder per class with pictures")
    return Labelled(Files(items, torch.tensor(target), in_file, max_pixels), tuple(classes))


def pictures(folder: Path, passed: Passed) -> Iterator[tuple[str, int]]:
    """The pictures in a folder and below it, in order, each with the number of its file.

    Links back to where they lie are not followed.
    """
    device = os.stat(folder).st_dev
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        name, ending = entry.name, os.path.splitext(entry.name)[1].lower()
        if entry.is_dir():
            if not (_hidden(name) or _leads_back(Path(entry.path))):
                yield from pictures(Path(entry.path), passed)
        elif _hidden(name):
            passed.add("hidden", entry.path)
        elif ending not in ENDINGS:
            passed.add(shown(ending) or "without an ending", entry.path)
        else:
            # The number of a link is that of its file, if there is one.
            linked = os.stat(entry.path) if entry.is_symlink() and entry.is_file() else None
            place = (linked.st_dev, linked.st_ino) if linked else (device, entry.inode())
            yield entry.path, place[0] << 64 | place[1]


def in_file(path: str) -> Encoded:
    return Encoded(Path(path))


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder that may be splits or classes, in order."""
    inside = (path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name))
    return sorted(path for path in inside if not _leads_back(path))


def _leads_back(path: Path) -> bool:
    """Whether this is a link to a folder in which it lies itself."""
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def _unwrapped(root: Path) -> Path:
    """The folder of splits or classes: the root, or the only folder in it that holds folders."""
    folders = _folders(root)
    while len(folders) == 1 and (inner := _folders(folders[0])):
        if folders[0].name.casefold() in SPLITS:
            break
        root, folders = folders[0], inner
    return root


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def order(name: object) -> tuple[int, int, str]:
    """Names of classes in order, numbers by their value."""
    word = str(name)
    return (0, int(word), word) if word.removeprefix("-").isdecimal() else (1, 0, word)


def matched(
    splits: Mapping[str, Labelled], classes: tuple[str, ...], where: str
) -> dict[str, Files]:
    """The splits with the class numbers of `classes`, by name.

    Raises ValueError naming both lists where a split has a class that is none of them.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    result = {}
    for name, split in splits.items():
        if not set(split.classes) <= set(classes):
            raise UserError(
                f"{where}: {name} has the classes {listed(split.classes)}, train has "
                f"{listed(classes)}"
            )
        ours = torch.tensor([numbers[word] for word in split.classes], dtype=torch.long)
        result[name] = Files(
            split.images.items, ours[split.images.target], split.images.find,
            split.images.max_pixels, split.images.mode,
        )  # fmt: skip
    return result


def listed(names: Iterable[str], *, most: int = 8) -> str:
    """Names for people, at most so many of them."""
    words = list(names)
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
