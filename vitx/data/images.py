"""A split's images: in memory as one tensor, or in files that are decoded when they are read."""

import io
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int, UInt8
from torch import Tensor

from vitx.files import shown
from vitx.registry import UserError

ENDINGS = (".apng", ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
           ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")  # fmt: skip
"""Of the names of files that are taken as pictures, in lower case."""
END, READERS = 4096, 8
"""Bytes at either end of an encoded picture that a fingerprint takes, and threads that read."""
MAX_PIXELS = 50_000_000
"""Larger pictures are refused before they are decoded, by default."""
PORTION = 2_000
"""Pictures that a process decodes at a time; fewer are decoded in this one."""


class BadImage(UserError):
    """A picture that can't be used; says which and why."""


@dataclass(frozen=True)
class Split:
    """Images in memory and their class numbers."""

    image: UInt8[Tensor, "images c h w"]
    target: Int[Tensor, " images"]

    def __len__(self) -> int:
        return len(self.target)

    def take(self, indices: Sequence[int] | Tensor) -> "Split":
        return Split(self.image[indices], self.target[indices])

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.image.to(device), self.target.to(device))


@dataclass(frozen=True)
class Encoded:
    """A picture before it is decoded: its file or its bytes, and its name for people."""

    source: Path | bytes
    name: str = ""
    """Needed for bytes."""


@dataclass(frozen=True)
class Files:
    """Pictures that are decoded one by one; `find(item)` says where, or raises BadImage."""

    items: Sequence[Any]
    target: Int[Tensor, " images"]
    find: Callable[[Any], Encoded] = Encoded
    max_pixels: int = MAX_PIXELS
    mode: str = ""
    """Pillow's mode that a picture is converted to before RGB, such as L."""

    def __len__(self) -> int:
        return len(self.target)

    def take(self, indices: Sequence[int]) -> "Files":
        items = [self.items[index] for index in indices]
        return replace(self, items=items, target=self.target[indices])

    def ends(self) -> Iterator[bytes]:
        """Of every picture its size and its first and last bytes; nothing of one that is absent."""
        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(self._ends, self.items)

    def _ends(self, item: Any) -> bytes:
        try:
            source = self.find(item).source
            if isinstance(source, bytes):
                return f"{len(source)}:".encode() + source[:END] + source[-END:]
            if not source.is_file():
                return b""
            with source.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                first = file.read(END)
                file.seek(max(size - END, 0))
                return f"{size}:".encode() + first + file.read(END)
        except (OSError, BadImage):  # it is named when it is read
            return b""

    def read(self, item: Any) -> Any:
        """The picture, as `open_picture` gives it."""
        found = self.find(item)
        return open_picture(
            found.source, name=found.name, max_pixels=self.max_pixels, mode=self.mode
        )


def open_picture(
    source: str | Path | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS, mode: str = ""
) -> Any:
    """The picture in RGB, upright: its EXIF orientation is applied.

    `mode` is one of Pillow's, which it is converted to first. Raises BadImage with its name for
    what can't be decoded, is too large, or has values that 8 bits can't hold. The size is read from
    the header, before anything is decoded.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not isinstance(source, bytes):
        source, name = Path(source), name or shown(source)
        if source.exists() and not source.is_file():  # to open a pipe would wait for ever
            raise BadImage(f"{name} is no regular file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged below
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                _check_size(opened, name, max_pixels)
                decoded = ImageOps.exif_transpose(opened)
                _check_depth(decoded, name)
                return (decoded.convert(mode) if mode else decoded).convert("RGB")
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"{name} can't be decoded: it is of no format that Pillow knows") from None
    except Exception as error:  # a decoder raises whatever it meets, of any class
        reason = str(error) or type(error).__name__
        raise BadImage(f"{name} can't be decoded: {reason}") from None


def _check_size(picture: Any, name: str, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise BadImage(
            f"{name} has {width}×{height} pixels, more than {max_pixels:,} (data.max_pixels)"
        )


def _check_depth(picture: Any, name: str) -> None:
    """BadImage for values that RGB would clip: more than 8 bits, and floats."""
    if picture.mode == "F" or picture.mode.startswith("I;16"):
        kind = "floats" if picture.mode == "F" else "16 bits"
        raise BadImage(f"{name} has {kind} per pixel; convert it to 8 bits first")
    if picture.mode == "I" and not 0 <= min(ends := picture.getextrema()) <= max(ends) <= 255:
        raise BadImage(
            f"{name} has 32 bits per pixel, with values from {ends[0]} to {ends[1]}; convert it "
            "to 8 bits first"
        )


def read_all(files: Files, *, skip: bool) -> tuple[Split, list[str]]:
    """Decode pictures of one size into memory; the split, and what was skipped as bad.

    Raises BadImage for the first bad one unless `skip`, and ValueError if sizes differ. Many are
    decoded by several processes: for small pictures Python's lock makes threads slower than one.
    """
    starts = range(0, len(files), PORTION)
    portions = [files.take(range(k, min(k + PORTION, len(files)))) for k in starts]
    processes = min(torch.get_num_threads(), len(portions))
    if processes > 1:
        with Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            decoded = pool.map(_decode, portions, chunksize=1)
    else:
        decoded = [_decode(portion) for portion in portions]
    bad = [why for portion in decoded for why in portion.bad]
    sizes = set().union(*(portion.sizes for portion in decoded))
    if bad and not (skip and sizes):
        raise BadImage(bad[0])
    if len(sizes) != 1:
        raise UserError(f"pictures of one size were expected, not of {sorted(sizes)[:3]}")
    pixels = np.concatenate([portion.pixels for portion in decoded if portion.sizes])
    image = rearrange(torch.from_numpy(pixels), "images h w c -> images c h w").contiguous()
    return Split(
        image, torch.from_numpy(np.concatenate([portion.target for portion in decoded]))
    ), bad


@dataclass(frozen=True)
class _Portion:
    """Decoded pictures; plain values, which another process can send."""

    pixels: np.ndarray
    """(images, h, w, c), if they have one size."""
    target: np.ndarray
    sizes: set[tuple[int, ...]]
    bad: list[str]


def _decode(files: Files) -> _Portion:
    """A fault is a value: the pool would raise it as its own, and the first in time."""
    pixels: list[np.ndarray] = []
    good, bad = list[int](), list[str]()
    for index, item in enumerate(files.items):
        try:
            pixels.append(np.asarray(files.read(item)))
        except BadImage as error:
            bad.append(str(error))
        else:
            good.append(index)
    sizes = {picture.shape for picture in pixels}
    stacked = np.stack(pixels) if len(sizes) == 1 else np.empty(0)
    return _Portion(stacked, files.target[good].numpy(), sizes, bad)
