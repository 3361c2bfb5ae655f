"""Runs by what they are: found again by the identity of their settings, and never repeated."""

import hashlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vitx import data
from vitx.data.config import DataConfig
from vitx.files import Busy, Lock, read_json
from vitx.interop import weights
from vitx.registry import UserError
from vitx.settings import flat, from_flat, override
from vitx.training import provenance, tracking, vectorize
from vitx.training.config import FREE, TrainConfig, identity
from vitx.training.prepare import prepare
from vitx.training.state import Diverged
from vitx.training.trainer import Stopped, keep, train

BESIDE = ("recipe", "device")
"""What config.json holds besides the configuration."""
FAILURE = "failure.json"
POLL_S = 2.0
"""Seconds between two looks at runs that other workers have in hand."""


@dataclass(frozen=True)
class Ended:
    """A run that has ended: with its final values, or with the error that ended it."""

    folder: Path
    device: str
    values: dict[str, Any]
    environment: dict[str, object]
    error: str = ""

    @property
    def stale(self) -> bool:
        """Whether another version made it."""
        return self.environment.get("version") != provenance.version()

    @property
    def images(self) -> str:
        """The fingerprint of its images and their splits; empty for a run that failed."""
        return self.values.get("fingerprint", "")


def ended(out: Path) -> dict[str, Ended]:
    """The runs under `out` that have ended, by identity; of several the newest of this version."""
    runs: dict[str, Ended] = {}
    for path in sorted(out.glob("*/*/config.json"), key=lambda path: path.stat().st_mtime):
        config, environment, summary, failure = (
            read_json(path.with_name(name))
            for name in ("config.json", "environment.json", "summary.json", FAILURE)
        )
        if not (summary or failure):
            continue
        try:
            key = identity(configuration(config))
        except (ValueError, TypeError):  # of a program that is no trainer, or of another version
            continue
        device, error = config.get("device", "cpu"), failure.get("error", "")
        run = Ended(path.parent, device, summary, environment, error)
        if key not in runs or runs[key].stale or not run.stale:
            runs[key] = run
    return runs


def read_config(run: Path) -> TrainConfig:
    """The configuration of a run folder."""
    path = run / "config.json"
    absent = [n for n in (path.name, weights.FILE, "summary.json") if not (run / n).exists()]
    if absent:
        raise UserError(f"{run} is no folder of a finished run: no {' or '.join(absent)}")
    if not (values := read_json(path)):
        raise UserError(f"{path} can't be read, so its run can't be told")
    return configuration(values)


def lasting(config: TrainConfig) -> dict[str, Any]:
    """The settings that a result keeps: without folders of this machine, and what may vary."""
    return {name: value for name, value in flat(config).items() if name not in FREE}


def configuration(values: dict[str, Any]) -> TrainConfig:
    """The configuration in the values of a config.json. Raises ValueError for unknown ones."""
    return from_flat(TrainConfig, {k: v for k, v in values.items() if k not in BESIDE})


@dataclass(frozen=True)
class Job:
    """A run to make: where, under which name, with which settings."""

    group: str
    name: str
    config: TrainConfig

    @property
    def key(self) -> str:
        return identity(self.config)

    def folder(self, out: Path) -> Path:
        """Its folder, which is the same for every worker of this version."""
        name = tracking.file_name(self.name)
        version = hashlib.sha256(provenance.version().encode()).hexdigest()[:4]
        return out / self.group / f"{name}-{self.key[:8]}{version}"


def missing(jobs: Sequence[Job], runs: Mapping[str, Ended], *, fresh: bool = False) -> list[Job]:
    """The runs that are not among the ended ones; `fresh` leaves those of another version out."""
    return [job for job in jobs if job.key not in runs or (fresh and runs[job.key].stale)]


@dataclass(frozen=True, kw_only=True)
class How:
    """How runs are made. Values depend on it by rounding, and by what is drawn on the device."""

    out: Path
    device: torch.device
    wandb: str | None = None
    lanes: int = 1
    """Runs that differ in seed, learning rate or decay only and are trained as one program."""
    fresh: bool = False
    """Make again what another version made."""


def work(jobs: Sequence[Job], how: How) -> None:
    """Make the runs that are missing, beside any other worker that does the same.

    Each run is locked by its worker; the kernel lets go of the lock when a worker dies, and the
    next one goes on from the run's last checkpoint. Raises ValueError naming the runs for which
    the memory did not suffice, when all others are made.
    """
    too_large: dict[str, str] = {}

    def made(together: Sequence[Job]) -> bool:
        try:
            return make(together, how)
        except torch.OutOfMemoryError as error:
            too_large.update({job.key: f"{job.name}: {error}" for job in together})
            return True

    while left := missing(jobs, ended(how.out), fresh=how.fresh):
        left = [job for job in left if job.key not in too_large]
        if not left:
            break
        if not any([made(together) for together in _together(left, how.lanes)]):
            time.sleep(POLL_S)  # all are in other workers' hands
    if too_large:
        raise UserError(
            f"{len(too_large)} runs are not made, their memory did not suffice; the first is "
            f"{next(iter(too_large.values()))}"
        )


def check_lanes(jobs: Sequence[Job], how: How) -> None:
    """ValueError naming the setting for which some of these can't be trained side by side."""
    for together in _together(jobs, how.lanes):
        if len(together) > 1:
            vectorize.check([job.config for job in together])


def make(jobs: Sequence[Job], how: How) -> bool:
    """Make these runs, or go on with them; False if all have ended or are in others' hands.

    A run that diverges has ended too, with its error. Raises what other faults raise.
    """
    with ExitStack() as held:
        mine = [job for job in jobs if _claim(job, how, held)]
        if len(mine) > 1:
            _make_lanes(mine, how)
        elif mine:
            _make(mine[0], how)
    return bool(mine)


def _claim(job: Job, how: How, held: ExitStack) -> bool:
    """Take a run that is missing, until `held` is closed; False if it is not to be had."""
    try:
        lock = held.enter_context(closing(Lock(how.out / "claims" / job.key)))
    except Busy:
        return False
    if missing([job], ended(how.out), fresh=how.fresh):
        return True
    lock.close()
    return False


def _make(job: Job, how: How) -> None:
    folder, dataset = job.folder(how.out), _dataset(job.config)
    begun_on = read_json(folder / "config.json").get("device", "").partition(":")[0]
    resume = folder if begun_on == how.device.type and any(folder.glob("*.ckpt")) else None
    if begun_on and begun_on != how.device.type:
        print(f"{job.name} was begun on {begun_on}, and starts anew on {how.device.type}")
    try:
        training = prepare(job.config, device=how.device, resume=resume, dataset=dataset)
    except Diverged:  # killed after it had saved that, and before it had said so
        training = prepare(job.config, device=how.device, dataset=dataset)
    with _folder_of(job, how) as run:
        try:
            train(training, run, folder=folder)
        except Diverged as error:
            run.write(FAILURE, {"error": str(error)})
        except Stopped as stopped:
            print(f"{job.name}: {stopped}; the same command goes on", file=sys.stderr)
            raise


def _make_lanes(jobs: Sequence[Job], how: How) -> None:
    """As `_make`, side by side; a kill loses them all, so they are for short runs."""
    dataset, configs = _dataset(jobs[0].config), [job.config for job in jobs]
    lanes = vectorize.train(configs, dataset=dataset, device=how.device)
    for job, lane in zip(jobs, lanes, strict=True):
        with _folder_of(job, how) as run:
            run.rewind(0)
            for event in lane.events:
                run.log(event)
            if lane.result is None:
                run.write(FAILURE, {"error": lane.error})
            else:
                keep(run, lane.training, lane.result, lanes=len(jobs))


def _folder_of(job: Job, how: How) -> tracking.Run:
    values = {"recipe": job.group, "device": str(how.device)} | flat(job.config)
    folder = job.folder(how.out)
    return tracking.Run(how.out, job.group, job.name, values, mode=how.wandb, folder=folder)


def sources(environments: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Commit, version and machine of runs, each combination once."""
    names = ("commit", "dirty", "version", "cpu", "gpu", "threads")
    each = [{name: one.get(name) for name in names} for one in environments]
    return [one for place, one in enumerate(each) if one not in each[:place]]


def devices(each: Iterable[str]) -> str:
    """What was computed on, each kind once: cpu, or cpu and cuda."""
    return " and ".join(sorted({device.partition(":")[0] for device in each}))


def _together(jobs: Sequence[Job], most: int) -> list[list[Job]]:
    """Jobs that may be lanes of one program, at most so many each; in the order given."""
    alike: dict[str, list[Job]] = {}
    for job in jobs:
        same = identity(override(job.config, **vectorize.COMMON)) if most > 1 else job.key
        alike.setdefault(same, []).append(job)
    return [
        group[start : start + most]
        for group in alike.values()
        for start in range(0, len(group), most)
    ]


def _dataset(config: TrainConfig) -> data.Dataset:
    return _read(config.data, config.model.size)


@lru_cache(maxsize=2)
def _read(config: DataConfig, size: tuple[int, int]) -> data.Dataset:
    """Data once for all runs of a worker; training adds nothing but pictures that it skipped."""
    return data.load(config, size=size)
