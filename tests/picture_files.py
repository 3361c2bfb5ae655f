"""Pictures and folders of pictures that tests read."""

from pathlib import Path

import numpy as np
from PIL import Image


def picture(size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    """Noise of a size (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def folders(
    root: Path,
    *,
    splits: tuple[str, ...] = ("train", "test"),
    classes: tuple[str, ...] | list[str] = ("ant", "bee", "cat"),
    each: int = 6,
    size: tuple[int, int] = (40, 30),
) -> Path:
    """Write `each` pictures to `root/SPLIT/CLASS/` and return `root`."""
    number = 0
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for _ in range(each):
                picture(size, number).save(folder / f"{number:04}.png")
                number += 1
    return root
