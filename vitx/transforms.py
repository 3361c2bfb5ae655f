"""From a decoded picture to a uint8 tensor of the model's size, in worker processes."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitx.config import DataConfig
from vitx.images import BadImage, Files

CENTRE = 0.875
"""Share of the resized picture's side that the centre crop keeps (Krizhevsky et al. 2012)."""


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
    shorter = round(min(size) / CENTRE)
    return v2.Compose([v2.Resize(shorter, antialias=True), v2.CenterCrop(size)])


class Pictures(Dataset):
    """Pictures by key (seed, row): decoded, transformed, with class number and what was wrong.

    All draws of a picture depend on its key alone, never on the worker or on what came before.
    """

    def __init__(self, files: Files, transform: Any, *, skip: bool):
        self.files, self.transform, self.skip = files, transform, skip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | None, int, str]:
        from torchvision.transforms.functional import pil_to_tensor

        seed, row = key
        random.seed(seed)  # timm's RandAugment draws from both
        np.random.seed(seed % 2**32)  # noqa: NPY002
        target = int(self.files.target[row])
        try:
            picture = self.files.read(self.files.items[row])
        except BadImage as error:
            if not self.skip:
                raise
            return None, target, str(error)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return pil_to_tensor(self.transform(picture)), target, ""


def collate(
    found: list[tuple[Tensor | None, int, str]],
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Images and class numbers of what could be decoded, its places in the batch, and the rest's
    faults."""
    good = [(place, image, target) for place, (image, target, _) in enumerate(found)
            if image is not None]  # fmt: skip
    if not good:
        raise BadImage(f"no picture of a batch can be used: {found[0][2]}")
    places, images, targets = zip(*good, strict=True)
    faults = [why for *_, why in found if why]
    return torch.stack(images), torch.tensor(targets), torch.tensor(places), faults
