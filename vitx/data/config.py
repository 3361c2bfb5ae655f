"""Which images, how they are split, and how they are varied."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from vitx.data.images import MAX_PIXELS
from vitx.data.sources import FACTS, SOURCES, Facts
from vitx.registry import Slot, UserError, resolve
from vitx.settings import (
    Natural,
    NotNegative,
    Rate,
    Share,
    Whole,
    at_least,
    check_fields,
    within,
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, how they are split, and how they are varied in training."""

    name: Slot = "digits"
    """A source: digits, cifar10, cifar100, places365, imagefolder, hf or fake."""
    root: str = ""
    """Folder of the data, or its name on the Hugging Face hub."""
    train: Natural = 0
    """Images to train on, a random part; 0 for all that validation and test leave."""
    val: Natural = 0
    """Images for validation: a random part of the data set's own split, if it has one, else held
    out of the training images; 0 for all of its own split."""
    test: Natural = 0
    """Images for the test, as for validation."""
    stratified: bool = True
    """Held-out parts have the classes' shares of the whole."""
    split_seed: Annotated[
        int, at_least(0), within(0, 2**32 - 1, ends="[)", rule="must be less than 2**32 - 1")
    ] = 0
    """Fixes which image is in which split; not varied between seeds of a comparison."""
    drop_last: bool = True
    """Leave out an epoch's last images that fill no batch; else they are a smaller batch."""
    resize: Literal["crop", "squash"] = "crop"
    """How larger images get the model's size: the shorter side and then the centre (`crop`), or
    both sides, whatever the aspect (`squash`). Data sets in memory have the model's size."""
    normalise: Literal["data", "half", "imagenet"] = "data"
    """Mean and deviation: of the training split (`data`), ½ and ½ (`half`), or `imagenet`."""
    flip: Share = 0.0
    """Share of images mirrored left and right."""
    crop: Annotated[float, within(0, 1, ends="(]")] = 1.0
    """Smallest area of a random resized crop, as a share of the image; 1 for none."""
    rotate: Annotated[float, within(0, 180, rule="must lie between 0 and 180 degrees")] = 0.0
    """Largest rotation in degrees, either way."""
    scale: Rate = 0.0
    """Largest relative change of size, either way."""
    shear: Rate = 0.0
    """Largest horizontal shear, either way."""
    shift: Rate = 0.0
    """Largest shift as a fraction of the image, either way, on each axis."""
    randaugment: str = ""
    """timm's words for RandAugment, such as rand-m9-mstd0.5; only for images read from files."""
    erase: Share = 0.0
    """Share of images with a random box erased."""
    mixup: NotNegative = 0.0
    """α of mixup's Beta(α, α); 0 for none. With cutmix too, either is drawn for a batch."""
    cutmix: NotNegative = 0.0
    workers: Natural = 0
    """Processes that read images from files; 0 for this one. It changes no image."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What to do with a picture that can't be decoded: `stop`, or `skip` it and list it."""
    max_pixels: Whole = MAX_PIXELS
    """Larger pictures are refused before they are decoded."""

    def __post_init__(self):
        check_fields(self, "data.")
        resolve(self.name, SOURCES)
        if self.randaugment:
            _check_randaugment(self.randaugment)

    @property
    def facts(self) -> Facts | None:
        """What is known of the named data set without reading it, if anything."""
        return FACTS.get(self.name) if isinstance(self.name, str) else None

    @property
    def has_val(self) -> bool:
        """Whether there are images for validation, as far as that is known without the data."""
        return self.val > 0 or self.facts is None

    @property
    def train_images(self) -> int:
        """Images to train on, as far as they are known without reading the data; else 0."""
        if self.train or self.facts is None:
            return self.train
        return self.facts.train - self.val - (0 if self.facts.test else self.test)


def _check_randaugment(words: str) -> None:
    # By its form: to ask timm itself would import it for every configuration, and timm passes over
    # what it does not know. n0 would pick no operation.
    number = r"(m|mmax)\d+|n[1-9]\d*|inc[01]|(mstd|p)\d+(\.\d+)?|t(weights|3aw|3a)"
    if not re.fullmatch(rf"rand(-({number}))*", words):
        raise UserError(
            f"data.randaugment = {words!r} must be timm's words, such as rand-m9-mstd0.5"
        )
