"""The main job: vitx against timm in equality, speed and accuracy, with a report.

`python -m benchmarks [--smoke | --full] [--out DIR]`. Results are on disk as soon as they are
known; the report is written anew after every stage.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from benchmarks import calibration, check, pretrained, render, speed, stages
from benchmarks.kinds import Check, EqualResult, Pretrained, shares
from benchmarks.report.calibration import table
from benchmarks.report.verdicts import headline
from experiments import cli
from experiments.study.results import FILE, Results, of_kind
from vitx.registry import UserError, nearest
from vitx.settings import flat
from vitx.training import parallel, tracking


@dataclass(frozen=True)
class Settings:
    """Compare vitx with timm: equality, paired speed, accuracy, report.

    The budget is told before the start. --smoke takes about a minute.
    """

    smoke: bool = False
    """Every stage, tiny, no verdicts."""
    full: bool = False
    """The careful run: S/16 too, compiled training, longer timing, 10 seeds, controls."""
    out: Path = tracking.OUT / "benchmarks"
    """Folder; a run makes its own inside, named by time."""
    device: str = ""
    """Device; empty for the accelerator of this machine, else the CPU."""
    wandb: str = ""
    """W&B mode: online, offline or disabled; empty for WANDB_MODE, else offline."""
    cifar10: str = ""
    """Folder of CIFAR-10's images; on a GPU accuracy is then compared on them, else on digits."""
    check: bool = False
    """Whether the device computes what the CPU does, in about a minute; nothing else."""
    calibrate: int | None = None
    """Make so many of the trials that say how often the timing is wrong; nothing else."""
    accuracy: str | None = None
    """A timm name, or a folder or file of timm's weights, whose accuracy is read on --data."""
    data: Path = Path("val")
    """Folder of --accuracy: one of pictures for each class."""
    batch: int = 64
    """Images per batch of --accuracy."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STAGE")] = ()
    """Stages to run: equality, speed, accuracy; in the full run controls and pilot too."""
    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ()
    """Of the models that the scale times, those to time now; all if empty."""


def main(args: list[str]) -> None:
    """Run the program that the settings ask for: the job, or one of its side programs."""
    settings = cli.parse(Settings, args, prog="python -m benchmarks")
    modes = ("smoke", "full", "check", "calibrate", "accuracy")
    values = {mode: getattr(settings, mode) for mode in modes}
    # --calibrate 0, which equals False, is a choice too.
    chosen = [mode for mode, value in values.items() if value is not None and value is not False]
    if len(chosen) > 1:
        raise UserError(f"--{', --'.join(modes)} exclude each other; choose one")
    cli.goes_with(settings, data="accuracy", batch="accuracy")
    programs = {"check": check_device, "calibrate": calibrate, "accuracy": read}
    for mode, program in programs.items():
        if mode in chosen:
            for name in ("only", "models", "cifar10"):
                if getattr(settings, name):
                    raise UserError(f"--{name} does not go with --{mode}")
            program(settings)
            return
    run_stages(settings)


def run_stages(settings: Settings) -> None:
    """Tell the budget, run the stages, print the verdicts and the places."""
    scale = stages.SMOKE if settings.smoke else stages.FULL if settings.full else stages.QUICK
    device = parallel.device(settings.device)
    scale = stages.narrow(stages.grown(scale, device, settings.cifar10), settings.models)
    every = stages.stages(scale)
    for name in settings.only:
        if name not in every:
            raise UserError(f"stage = {name!r} is not one of this scale; {nearest(name, every)}")
    chosen = {name: stage for name, stage in every.items() if name in (settings.only or every)}
    config = {"scale": scale.name, "device": str(device), **flat(scale.config)}
    with kept(settings, scale.name, config) as (run, results):
        job = stages.Job(scale, device, results, run)
        job.say(f"{scale.name} run on {device}; {run.where}")
        for name, (minutes, _) in chosen.items():
            job.say(f"budget: {name} about {minutes:.1f} min")
        for name, (_, stage) in tqdm(chosen.items(), unit="stage", disable=not sys.stderr.isatty()):
            job.say(f"{name} …")
            stage(job)
            stages.write_report(job)
        stages.finish(job)
        where = run.where
    print(f"\n{headline(results.kept).markdown()}\n")
    print(f"report: {job.folder / 'report.html'} and report.md; results: {results.path}\n{where}")
    if any(result.verdict == "not equal" for result in of_kind(results.kept, EqualResult)):
        raise SystemExit(1)


def check_device(settings: Settings) -> None:
    """Print whether the device computes what the CPU does; exit 1 if not."""
    device = parallel.device(settings.device)
    with kept(settings, "check", {"device": str(device)}) as (_, results):
        result = results.add(Check, **check.run(device))
        print(f"{check.text(result)}\nresult: {results.path}")
    if not all(result.within.values()):
        raise SystemExit(1)


def read(settings: Settings) -> None:
    """Print the accuracy of weights in timm and in vitx."""
    cli.at_least(settings, batch=1)
    device, model = parallel.device(settings.device), settings.accuracy or ""
    values = {"model": model, "device": str(device)}
    fields = pretrained.measure(model, settings.data, batch=settings.batch, device=device)
    with kept(settings, "accuracy", values) as (_, results):
        result = results.add(Pretrained, **fields)
        print(f"{pretrained.text(result)}\nresult: {results.path}")


def calibrate(settings: Settings) -> None:
    """Make the next trials of the calibration, and print what all of them say so far."""
    count = settings.calibrate or 0
    if count < 1:
        raise UserError(f"calibrate = {count} must be at least 1")
    device = parallel.device(settings.device)
    scale = stages.grown(stages.QUICK, device)
    files = [*render.RESULTS.glob("*.jsonl"), *settings.out.glob(f"*-calibration/{FILE}")]
    name, batch = scale.timed[0][0], scale.batch
    before = calibration.made(
        files, scale.config, reference=f"timm:{name}", batch=batch, device=device
    )
    done = {trial.trial for trial in before}
    left = [number for number in range(len(shares())) if number not in done]
    with kept(settings, "calibration", flat(scale.config)) as (run, results):
        job = stages.Job(scale, device, results, run)
        make = partial(speed.make_pair, name, batch=batch, device=device)
        calibration.run(left[:count], make, scale.config, job)
        print(f"{table([*before, *results.kept]).markdown()}\nresults: {results.path}")


@contextmanager
def kept(
    settings: Settings, name: str, values: Mapping[str, object]
) -> Iterator[tuple[tracking.Run, Results]]:
    """A run folder, named by time, and its results."""
    folder = settings.out / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    mode = settings.wandb or None
    with tracking.Run(
        settings.out, "benchmarks", folder.name, values, mode=mode, folder=folder
    ) as run:
        yield run, Results(folder)


if __name__ == "__main__":
    cli.run(main)
