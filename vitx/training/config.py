"""The configuration of a training run, its version and its identity."""

import hashlib
import json
from dataclasses import dataclass, field

from vitx.data.config import DataConfig
from vitx.data.sources import Facts
from vitx.model.config import ModelConfig
from vitx.registry import Slot, choose, resolve
from vitx.settings import (
    check_int,
    check_number,
    check_positive,
    check_rate,
    flat,
    nearest_divisors,
)
from vitx.training.schedule import SCHEDULE

OPTIMIZERS = ("adamw", "adam", "sgd", "muon")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its learning rate over the steps, and which parameters it changes."""

    name: str = "adamw"
    """adamw, adam, sgd, muon (for the blocks' matrices, adamw for the rest), or timm's name."""
    lr: float = 1e-3
    weight_decay: float = 0.05
    decay: str = "matrices"
    """What weight decay acts on: `matrices` and the patch kernel, not biases, gains, tokens and
    positions; or `all` parameters."""
    beta1: float = 0.9
    """Or the momentum, of optimizers that have one."""
    beta2: float = 0.999
    schedule: Slot = "cosine"
    warmup_steps: int = 0
    """Steps over which the rate grows linearly to `lr`, before the schedule."""
    clip: float = 0.0
    """Largest norm of the whole gradient; 0 for none."""
    layer_decay: float = 1.0
    """Factor of the learning rate from a block to the one below it (Clark et al. 2020)."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by patterns such as blocks.0.* or patch_embed.*"""
    label_smoothing: float = 0.0

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            from timm.optim import list_optimizers  # type: ignore[attr-defined]

            # Left out: what needs a second derivative, or a library that is not here.
            found = list_optimizers(exclude_filters=["adahessian", "bnb*", "fused*"])
            others = (str(name) for name in found)
            choose("optim.name", self.name, (*OPTIMIZERS, *others))
        check_positive("optim.lr", self.lr)
        check_positive("optim.weight_decay", self.weight_decay, zero=True)
        check_positive("optim.clip", self.clip, zero=True)
        for name in ("beta1", "beta2", "label_smoothing"):
            check_rate(f"optim.{name}", getattr(self, name))
        choose("optim.decay", self.decay, ("matrices", "all"))
        check_number("optim.layer_decay", self.layer_decay)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay = {self.layer_decay} must lie in (0, 1]")
        check_int("optim.warmup_steps", self.warmup_steps, 0)
        schedule = resolve(self.schedule, SCHEDULE)
        if not all(0 <= schedule(progress / 10) <= 1 for progress in range(11)):
            raise ValueError(
                f"optim.schedule = {self.schedule!r} must stay between 0 and 1, the share of lr"
            )


RECIPE_VERSION = 1
"""What a configuration trains to. A change by which some configuration gets other weights, or other
final values, raises it, and runs of the version before are stale. A new variant, which no earlier
configuration names, does not."""

FREE = ("data.root", "data.workers", "log_every", "save_every", "keep_every")
"""Settings that a run which is resumed may change: no trained value depends on them."""

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: everything that its numbers depend on, but the machine."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    weights: str = ""
    """File of weights to start from, in any format that `vitx.load` knows; empty for the init."""
    steps: int = 1000
    batch: int = 64
    """Images a step, over all processes and accumulated parts."""
    accumulate: int = 1
    """Equal parts of a batch whose gradients are added up one after the other."""
    precision: str = "float32"
    """Of matrix products and attention, by autocast; parameters stay in float32."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is then the result; 0 for none."""
    compile: bool = False
    """Train through torch.compile."""
    seed: int = 0
    """Seeds initial weights, order and augmentation."""
    seed_init: int = 0
    """Added to `seed` for the initial weights alone; likewise the two below."""
    seed_order: int = 0
    """For the order of the images, and what is left out or mixed with what."""
    seed_augment: int = 0
    """For augmentation, and for what is drawn inside the model."""
    curve: str = "val"
    """Split that is read during training, `val` or `test`; it chooses nothing."""
    eval_every: int = 100
    """Steps between two readings of the curve's split."""
    log_every: int = 50
    """Steps between two readings of the training loss; the steps between do not wait for the
    device."""
    save_every: int = 1000
    """Steps between two checkpoints."""
    keep_every: int = 0
    """Steps between two files of weights that stay, model-STEP.safetensors; 0 for the last only."""

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "eval_every", "log_every", "save_every"):
            check_int(name, getattr(self, name), 1)
        check_int("keep_every", self.keep_every, 0)
        for name in ("seed", "seed_init", "seed_order", "seed_augment"):
            check_int(name, getattr(self, name), 0)
            if getattr(self, name) >= 2**31:
                raise ValueError(f"{name} = {getattr(self, name)} must be less than 2**31")
        check_rate("ema", self.ema)
        choose("precision", self.precision, PRECISIONS)
        choose("curve", self.curve, ("val", "test"))
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate = {self.accumulate} does not divide batch = {self.batch}; "
                f"nearest that does: {nearest_divisors(self.batch, self.accumulate)}"
            )
        if facts := self.data.facts:
            check_fit(self.model, self.data.name, facts)
        if self.data.facts and self.data.train_images < 1:
            raise ValueError(
                f"data.val = {self.data.val} and data.test = {self.data.test} leave no image of "
                f"{self.data.facts.train} for training"
            )
        if 0 < self.data.train_images < self.batch and self.data.drop_last:
            raise ValueError(
                f"batch = {self.batch} is larger than the training split of "
                f"{self.data.train_images}"
            )


def check_fit(model: ModelConfig, name: object, facts: Facts) -> None:
    """ValueError if a model does not take the images or give the classes of a data set."""
    for what, value, wanted in (
        ("image", model.size, facts.image),
        ("channels", model.channels, facts.channels),
        ("classes", model.classes, facts.classes),
    ):
        if value != wanted:
            raise ValueError(
                f"model.{what} = {value} does not fit the data set {name}, which has {wanted}"
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
