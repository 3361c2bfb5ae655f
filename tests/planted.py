"""Small models for tests of the benchmark, four of which go wrong when they are timed."""

import os
import time

import torch
from torch import nn

from vitx.model.config import ModelConfig
from vitx.model.vit import Vit
from vitx.settings import override

CONFIG = ModelConfig(image=16, patch=4, width=24, depth=2, heads=3, classes=5)


class Small(Vit):
    image = (3, 16, 16)


def small() -> nn.Module:
    return Small(CONFIG)


def same() -> nn.Module:
    return Small(CONFIG)


def deep() -> nn.Module:
    return Small(override(CONFIG, depth=3))


def wide() -> nn.Module:
    return Small(override(CONFIG, width=48))


def others_names() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    model.image = (3, 16, 16)
    return model


class Undefined(nn.Linear):
    """Without names of weights that another could have, so that nothing is checked."""

    image = (3, 16, 16)

    def forward(self, image):
        return super().forward(image.flatten(1)) / 0


def undefined() -> nn.Module:
    return Undefined(3 * 16 * 16, 5)


class Planted(Small):
    """Behaves while it is built and checked, and not in the processes that time it."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.home = os.getpid()

    def forward(self, image, *, mask=None):
        if os.getpid() != self.home:
            self.go_wrong()
        return super().forward(image, mask=mask)

    def go_wrong(self) -> None:
        raise NotImplementedError


class Crash(Planted):
    def go_wrong(self) -> None:
        raise RuntimeError("the kernel is broken")


class Hang(Planted):
    def go_wrong(self) -> None:
        time.sleep(1000)


class Hungry(Planted):
    def go_wrong(self) -> None:
        kept = []
        while True:
            kept.append(torch.ones(2**26))
            time.sleep(0.02)


class Wrong(Small):
    def forward(self, image, *, mask=None):
        return 1.001 * super().forward(image, mask=mask)


def crash() -> nn.Module:
    return Crash(CONFIG)


def hang() -> nn.Module:
    return Hang(CONFIG)


def hungry() -> nn.Module:
    return Hungry(CONFIG)


def wrong() -> nn.Module:
    return Wrong(CONFIG)
