"""From a decoded picture to a uint8 tensor of the model's size, in worker processes."""

import itertools
import random
import signal
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


def evaluation(resize: str, size: tuple[int, int]) -> Any:
    """The whole picture at the model's size (`squash`), or its centre (`crop`)."""
    from torchvision.transforms import v2

    if resize == "squash":
        return v2.Resize(size, antialias=True)
    larger = (round(size[0] / CENTRE), round(size[1] / CENTRE))
    return v2.Compose([Cover(larger), v2.CenterCrop(size)])


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
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Cover:
    """Resize a picture to the smallest size that covers `size`, without changing its aspect."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(self, picture: Any) -> object:
        from torchvision.transforms.functional import resize

        factor = max(self.size[0] / picture.height, self.size[1] / picture.width)
        size = [round(side * factor) for side in (picture.height, picture.width)]
        return resize(picture, size, antialias=True)
