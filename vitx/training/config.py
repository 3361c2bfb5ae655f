"""The configuration of a training run, its version and its identity."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Annotated, Literal

from vitx.data.config import DataConfig
from vitx.data.sources import Facts
from vitx.model.config import ModelConfig
from vitx.registry import Slot, UserError, choose, resolve
from vitx.settings import (
    Natural,
    NotNegative,
    Positive,
    Rate,
    Whole,
    at_least,
    check_fields,
    flat,
    nearest_divisors,
    within,
)
from vitx.training.schedule import SCHEDULE

OPTIMIZERS = ("adamw", "adam", "sgd", "muon")
Seed = Annotated[int, at_least(0), within(0, 2**31, ends="[)", rule="must be less than 2**31")]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its learning rate over the steps, and which parameters it changes."""

    name: str = "adamw"
    """adamw, adam, sgd, muon (for the blocks' matrices, adamw for the rest), or timm's name."""
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.05
    decay: Literal["matrices", "all"] = "matrices"
    """What weight decay acts on: `matrices` and the patch kernel, not biases, gains, tokens and
    positions; or `all` parameters."""
    beta1: Rate = 0.9
    """Or the momentum, of optimizers that have one."""
    beta2: Rate = 0.999
    schedule: Slot = "cosine"
    warmup_steps: Natural = 0
    """Steps over which the rate grows linearly to `lr`, before the schedule."""
    clip: NotNegative = 0.0
    """Largest norm of the whole gradient; 0 for none."""
    layer_decay: Annotated[float, within(0, 1, ends="(]")] = 1.0
    """Factor of the learning rate from a block to the one below it (Clark et al. 2020)."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by patterns such as blocks.0.* or patch_embed.*"""
    label_smoothing: Rate = 0.0

    def __post_init__(self):
        check_fields(self, "optim.")
        if self.name not in OPTIMIZERS:
            from timm.optim import list_optimizers  # type: ignore[attr-defined]

            # Left out: what needs a second derivative, or a library that is not here.
            names = list_optimizers(exclude_filters=["adahessian", "bnb*", "fused*"])
            choose("optim.name", self.name, (*OPTIMIZERS, *map(str, names)))
        schedule = resolve(self.schedule, SCHEDULE)
        if not all(0 <= schedule(progress / 10) <= 1 for progress in range(11)):
            raise UserError(
                f"optim.schedule = {self.schedule!r} must stay between 0 and 1, the share of lr"
            )


RECIPE_VERSION = 1
"""What a configuration trains to. A change by which some configuration gets other weights, or other
final values, raises it, and runs of the version before are stale. A new variant, which no earlier
configuration names, does not."""

FREE = ("data.root", "data.workers", "log_every", "save_every", "keep_every")
"""Settings that a run which is resumed may change: no trained value depends on them."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: everything that its numbers depend on, but the machine."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    weights: str = ""
    """File of weights to start from, in any format that `vitx.load` knows; empty for the init."""
    steps: Whole = 1000
    batch: Whole = 64
    """Images per step, over all processes and accumulated parts."""
    accumulate: Whole = 1
    """Equal parts of a batch whose gradients are added up one after the other."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of matrix products and attention, by autocast; parameters stay in float32."""
    ema: Rate = 0.0
    """Decay of the moving average of the weights, which is then the result; 0 for none."""
    compile: bool = False
    """Train through torch.compile."""
    seed: Seed = 0
    """Seeds initial weights, order and augmentation."""
    seed_init: Seed = 0
    """Added to `seed` for the initial weights alone; likewise the two below."""
    seed_order: Seed = 0
    """For the order of the images, and what is left out or mixed with what."""
    seed_augment: Seed = 0
    """For augmentation, and for what is drawn inside the model."""
    curve: Literal["val", "test"] = "val"
    """Split that is evaluated during training, `val` or `test`; it chooses nothing."""
    eval_every: Whole = 100
    """Steps between two evaluations of the curve's split."""
    log_every: Whole = 50
    """Steps between two logs of the training loss and of what is reported; the steps between do
    not wait for the device."""
    save_every: Whole = 1000
    """Steps between two checkpoints."""
    keep_every: Natural = 0
    """Steps between two files of weights that stay, model-STEP.safetensors; 0 for the last only."""

    def __post_init__(self):
        check_fields(self)
        if self.batch % self.accumulate:
            raise UserError(
                f"accumulate = {self.accumulate} does not divide batch = {self.batch}; "
                f"nearest that does: {nearest_divisors(self.batch, self.accumulate)}"
            )
        if facts := self.data.facts:
            check_fit(self.model, self.data.name, facts)
        if self.data.facts and self.data.train_images < 1:
            raise UserError(
                f"data.val = {self.data.val} and data.test = {self.data.test} leave no image of "
                f"{self.data.facts.train} for training"
            )
        if 0 < self.data.train_images < self.batch and self.data.drop_last:
            raise UserError(
                f"batch = {self.batch} is larger than the training split of "
                f"{self.data.train_images}"
            )


def warm_up_warning(config: TrainConfig) -> str:
    """What is to be said of a warm-up that is not shorter than the run; else nothing."""
    steps, warm_up = config.steps, config.optim.warmup_steps
    if warm_up < steps:
        return ""
    return (
        f"optim.warmup_steps = {warm_up} is not shorter than steps = {steps}: the learning rate "
        f"ends at {(steps - 1) / warm_up:.0%} of optim.lr"
    )


def check_fit(model: ModelConfig, source: object, facts: Facts) -> None:
    """ValueError if a model does not take the images or give the classes of a data set."""
    for name, value, of_data in (
        ("image", model.size, facts.image),
        ("channels", model.channels, facts.channels),
        ("classes", model.classes, facts.classes),
    ):
        if value != of_data:
            raise UserError(
                f"model.{name} = {value} does not fit the data set {source}, which has {of_data}"
            )


def identity(config: TrainConfig) -> str:
    """A hash of all that a run's numbers depend on: every field, but for the `FREE` ones.

    The folder of the data counts where it alone says which data they are; a file of weights counts
    by its path, not by what is in it.
    """
    free = FREE if config.data.facts else tuple(name for name in FREE if name != "data.root")
    values = {name: value for name, value in flat(config).items() if name not in free}
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
