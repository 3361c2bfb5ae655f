"""From a decoded picture to a uint8 tensor of the model's size, in worker processes."""

import atexit
import itertools
import random
import signal
from functools import cache
from multiprocessing import active_children
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitx.data.config import DataConfig
from vitx.data.images import BadImage, Files
from vitx.model.preprocessing import CENTRE


def training(config: DataConfig, size: tuple[int, int]) -> Any:
    """Random resized crop, flip and RandAugment, as far as the configuration asks for them."""
    from torchvision.transforms import v2

    steps: list[Any] = []
    if config.crop < 1:
        steps.append(v2.RandomResizedCrop(size, scale=(config.crop, 1.0), antialias=True))
    else:
        steps.append(evaluation(config.resize, size))
    if config.flip:
        steps.append(v2.RandomHorizontalFlip(config.flip))
    if config.randaugment:
        from timm.data.auto_augment import rand_augment_transform

        # What a turn or shift uncovers gets ImageNet's mean colour, as in timm.
        colour = {"img_mean": (124, 116, 104)}
        steps.append(rand_augment_transform(config.randaugment, colour))
    return v2.Compose(steps)


def evaluation(
    resize: str, size: tuple[int, int], *, filter: str = "bilinear", centre: float = CENTRE
) -> Any:
    """The whole picture at the model's size (`squash`), or its centre (`crop`)."""
    from torchvision.transforms import InterpolationMode, v2

    if resize == "squash":
        return v2.Resize(size, InterpolationMode[filter.upper()], antialias=True)
    return Centre(size, (int(size[0] / centre), int(size[1] / centre)), filter)


class Pictures(Dataset):
    """Pictures by key (seed, index): decoded, transformed, with class number and what was wrong.

    All draws of a picture depend on its key alone, never on the worker or on what came before. A
    picture that can't be used is black, with class number -1; if `replace`, the next one of the
    split that can be used stands in its place, so that every batch has its size.
    """

    def __init__(self, files: Files, transform: Any, size: tuple[int, int], *, replace: bool):
        self.files, self.transform, self.size, self.replace = files, transform, size, replace

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, list[str]]:
        from torchvision.transforms.functional import pil_to_tensor

        seed, index = key
        picture, place, faults = None, index, []
        for tried in range(MOST_REPLACED if self.replace else 1):
            place = (index + tried) % len(self.files)
            try:
                picture = self.files.read(self.files.items[place])
                break
            except BadImage as error:
                faults.append(str(error))
        if picture is None:
            return torch.zeros(3, *self.size, dtype=torch.uint8), -1, faults
        random.seed(seed)  # timm's RandAugment draws from both
        np.random.seed(seed % 2**32)  # noqa: NPY002
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not a GPU's, from which models draw
            return pil_to_tensor(self.transform(picture)), int(self.files.target[place]), faults


MOST_REPLACED = 100
"""How many successive bad pictures are replaced by the next."""


def collate(samples: list[tuple[Tensor, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    """Images, class numbers and faults of a batch."""
    images, targets, faults = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(targets), list(itertools.chain(*faults))


def calm(worker: int) -> None:
    """A worker leaves signals to its parent, which saves and then ends it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@cache
def end_workers_at_exit() -> None:
    """Kill workers that an error left alive: Python asks them by SIGTERM, and waits for ever."""
    atexit.register(lambda: [child.kill() for child in active_children() if child.daemon])


class Centre:
    """The centre of a picture that is resized to cover `covered` (h, w), its aspect unchanged.

    The values are those of torchvision and timm, which resize all of it. Of a picture so thin that
    this would take MOST_COVERED times the memory, only what is kept is resized.
    """

    def __init__(self, size: tuple[int, int], covered: tuple[int, int], filter: str):
        self.size, self.covered, self.filter = size, covered, filter

    def __call__(self, picture: Any) -> object:
        from PIL.Image import Resampling

        filter, (h, w) = Resampling[self.filter.upper()], self.covered
        if h * picture.width >= w * picture.height:
            w = int(h * picture.width / picture.height)
        else:
            h = int(w * picture.height / picture.width)
        top, left = round((h - self.size[0]) / 2), round((w - self.size[1]) / 2)
        bottom, right = top + self.size[0], left + self.size[1]
        if h * w <= MOST_COVERED * self.covered[0] * self.covered[1]:
            return picture.resize((w, h), filter).crop((left, top, right, bottom))
        y, x = picture.height / h, picture.width / w
        kept = (left * x, top * y, min(right * x, picture.width), min(bottom * y, picture.height))
        return picture.resize(self.size[::-1], filter, kept)


MOST_COVERED = 64
"""A picture is resized whole to so many times the area that is asked for, at most."""
