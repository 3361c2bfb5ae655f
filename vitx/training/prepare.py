"""A run before its first step here: data and state, or a checkpoint, are read and checked."""

import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vitx import data
from vitx.data.dataset import Dataset
from vitx.files import UNREADABLE
from vitx.interop import weights
from vitx.model.compiler import needs_compiler
from vitx.registry import UserError
from vitx.settings import delta, flat, from_flat
from vitx.training import checkpoint, parallel
from vitx.training.config import FREE, TrainConfig
from vitx.training.parallel import ALONE, Part
from vitx.training.state import State, check, forward, init, unpack


class Clock:
    """Wall and CPU seconds of a run, over all the processes that it was resumed in."""

    def __init__(self):
        self.before = (0.0, 0.0)
        self._start = self._now()

    def read(self) -> tuple[float, float]:
        (wall, cpu), start, before = self._now(), self._start, self.before
        return before[0] + wall - start[0], before[1] + cpu - start[1]

    def _now(self) -> tuple[float, float]:
        times = os.times()
        own, children = times.user + times.system, times.children_user + times.children_system
        return time.perf_counter(), own + children


@dataclass(frozen=True)
class Training:
    """A run that is ready to start or to go on. `state` changes, the rest stays."""

    config: TrainConfig
    dataset: Dataset
    state: State
    clock: Clock
    fingerprint: str
    """Of the images and their splits."""

    @property
    def description(self) -> weights.Description:
        """What a file of the weights says of them."""
        dataset = self.dataset
        return weights.Description(self.config.model, dataset.classes, dataset.preprocessing)


def prepare(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    part: Part = ALONE,
    resume: Path | None = None,
    dataset: Dataset | None = None,
) -> Training:
    """Read the data and make the state, or take it from the checkpoint in the folder `resume`.

    `model` replaces the one that the configuration builds, `dataset` what is read. Writes nothing.
    Raises ValueError for settings that do not fit the data, or the run that is resumed.
    """
    clock = Clock()
    flat(config)  # what no checkpoint can record is refused before it is trained
    if config.compile:
        needs_compiler(device)
    if dataset is None:
        dataset = data.load(config.data, size=config.model.size)
    dataset = dataset.to(device)
    check_data(config, dataset, part)
    state = init(config, model=model, device=device, part=part, classes=dataset.classes)
    if config.weights and part.first:
        _compare_preprocessing(config, dataset)
    training = Training(config, dataset, state, clock, dataset.fingerprint)
    if resume is not None:
        _resume(training, resume)
    return training


ENTRIES = ("state", "config", "data", "skipped", "seconds")
"""What a checkpoint holds."""


def _resume(training: Training, folder: Path) -> None:
    """Put the folder's checkpoint into the state, the clock and the pictures skipped so far."""
    saved = checkpoint.load(folder)
    for entry in ENTRIES:
        if not isinstance(saved, dict) or entry not in saved:
            raise UserError(f"the checkpoint in {folder} holds no {entry!r}: start a new run")
    refuse_changes(training.config, saved["config"])
    if not training.dataset.is_of(saved["data"]):
        raise UserError(
            f"the data are not those of the run in {folder}: other images, or others in the "
            "splits; start a new run"
        )
    _settle(training.state, training.config)
    try:
        unpack(training.state, saved["state"])
    except UserError:
        raise
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"the checkpoint in {folder} is not of this model: {type(error).__name__}: {reason}"
        ) from None
    check(training.state)
    training.dataset.skipped[:] = union([training.dataset.skipped, saved["skipped"]])
    training.clock.before = tuple(saved["seconds"])


def _settle(state: State, config: TrainConfig) -> None:
    """One pass of several processes, which changes nothing once `unpack` has been there.

    PyTorch sorts its buckets of gradients anew after the first pass of every start, and three or
    more processes then add in another order: this way a resumed run adds in that of one that went
    on.
    """
    if state.part.alone:
        return
    count = max(config.batch // state.part.ranks // config.accumulate, 1)
    device, model = state.bad_step.device, config.model
    image = torch.zeros(count, model.channels, *model.size, device=device)
    target = torch.zeros(count, dtype=torch.long, device=device)
    loss, _ = forward(state, image, target, config)
    loss.backward()
    for optimizer in state.optimizers:
        optimizer.zero_grad()


def check_data(config: TrainConfig, dataset: Dataset, part: Part = ALONE) -> None:
    """ValueError if the data that was read does not fit the configuration."""
    data.check_batch(dataset, config.batch, part.ranks)
    for name, value, of_data in (
        ("channels", config.model.channels, len(dataset.mean)),
        ("classes", config.model.classes, len(dataset.classes)),
    ):
        if value != of_data:
            raise UserError(f"model.{name} = {value} does not fit the data, which have {of_data}")
    if dataset.size != config.model.size:
        raise UserError(f"model.image = {config.model.size} does not fit the data: {dataset.size}")
    if not len(getattr(dataset, config.curve)):
        raise UserError(
            f"curve = {config.curve!r}, but the data have no such split; set data.{config.curve}, "
            "the number of images to hold out, or choose the other split"
        )


def _compare_preprocessing(config: TrainConfig, dataset: Dataset) -> None:
    """Warn if the weights to start from were trained on otherwise normalised images."""
    theirs = weights.describe(config.weights, heads=config.model.heads).preprocessing
    ours = dataset.preprocessing
    if theirs is None or all(
        torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-3)
        for a, b in ((theirs.mean, ours.mean), (theirs.std, ours.std))
    ):
        return
    print(
        f"warning: {config.weights} was trained on images normalised by mean {_short(theirs.mean)} "
        f"and deviation {_short(theirs.std)}; data.normalise = {config.data.normalise!r} takes "
        f"{_short(ours.mean)} and {_short(ours.std)}",
        file=sys.stderr,
    )


def _short(values: Sequence[float]) -> str:
    """Numbers of the channels, for people."""
    return ", ".join(f"{value:.3f}" for value in values)


def refuse_changes(config: TrainConfig, before: Mapping[str, object]) -> None:
    """ValueError naming the first setting that differs from a checkpoint's and matters."""
    for name, value in delta(config, from_flat(TrainConfig, before)).items():
        if name not in FREE:
            raise UserError(
                f"{name} = {value!r}, but the run to resume was started with "
                f"{before.get(name)!r}; only {', '.join(FREE)} may change"
            )


def share_skipped(training: Training) -> None:
    """Tell every process which pictures any of them skipped; all call this together."""
    skipped = training.dataset.skipped
    skipped[:] = union(parallel.gathered(skipped, training.state.part))


def union(lists: Sequence[Sequence[str]]) -> list[str]:
    """What stands in any of them, once."""
    return list(dict.fromkeys(itertools.chain.from_iterable(lists)))
