"""A split's images: in memory as one tensor, or in files that are decoded when they are read."""

import io
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int, UInt8
from torch import Tensor

from vitx.registry import UserError

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
class Files:
    """Pictures that are decoded one by one; `read(item)` gives a PIL image or raises BadImage."""

    items: Sequence[Any]
    target: Int[Tensor, " images"]
    read: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self.target)

    def take(self, indices: Sequence[int]) -> "Files":
        items = [self.items[index] for index in indices]
        return replace(self, items=items, target=self.target[indices])


def open_picture(
    source: str | Path | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS
) -> Any:
    """The picture in RGB. Raises BadImage with its name for what can't be decoded, is too large, or
    has 16 bits a pixel.

    The size is read from the header, before anything is decoded.
    """
    from PIL import Image

    name = name or str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged below
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    raise BadImage(
                        f"{name} has {width}×{height} pixels, more than {max_pixels:,} "
                        "(data.max_pixels)"
                    )
                if picture.mode.startswith("I;16"):
                    raise BadImage(f"{name} has 16 bits a pixel; convert it to 8 first")
                return picture.convert("RGB")
    except BadImage:
        raise
    # What Pillow raises for files that are cut off, empty, or of no known format.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(f"{name} can't be decoded: {error}") from None


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
