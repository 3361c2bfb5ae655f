"""Throughput and latency of models, over batches, precisions and compile modes, each with its cost.

`python -m benchmarks.throughput --models vitx:S/16 hf:S/16 --reference timm:vit_small_patch16_224`
times every combination of what is given, each in processes of its own within limits of time and
memory. One that fails is a result that says so; the others go on, and --resume makes what is
missing. With a reference every model is timed in pairs with it, after both were checked equal where
the weights of one can become those of the other.
"""

import hashlib
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.configuration import Configuration, child, timed
from benchmarks.kinds import Throughput
from benchmarks.report import charts
from benchmarks.report.entries import AUTO
from benchmarks.report.throughput import TABLES, throughput_table, verdict
from benchmarks.speed import usual, warm_up_s
from experiments import cli
from experiments.study.pages import floor_text, interval_text
from experiments.study.results import Result, Results, of_kind
from vitx.files import read_json
from vitx.measure import machine, timing
from vitx.measure.comparison import Rate
from vitx.measure.stats import Interval
from vitx.measure.timing import TimingConfig
from vitx.registry import UserError, choose
from vitx.training import parallel, tracking
from vitx.training.provenance import environment

MOST_MEMORY = 0.8
"""Share of the machine's memory that a configuration may take if nothing is said."""
MOST_SECONDS = 1e6
"""Of the limit of a process; the system's timers take no more than some years."""
GROUP = "throughput"
PROG = "python -m benchmarks.throughput"


@dataclass(frozen=True)
class Settings:
    """Time models by themselves, or in pairs with a reference."""

    models: tuple[str, ...] = ()
    """vitx:S/16, vitx:TIMM_NAME, timm:NAME, torchvision:S/16, torchvision:NAME, hf:S/16, hf:FOLDER,
    vit_pytorch:S/16, or python:FILE:FUNCTION, which gives a module; vitx:Ti/16 if none is named, on
    a GPU B/16."""
    reference: str = ""
    """A model that all others are timed in pairs with."""
    unchecked: bool = False
    """The models are meant to compute something else than the reference, with weights of the same
    names: their outputs are not compared, and their ratios get no verdict."""
    batch: tuple[str, ...] = ("8",)
    """Images per batch; auto for the one with most images/s of the model, not of the reference."""
    dtype: tuple[str, ...] = ()
    """float32 if none is named, on a GPU bfloat16."""
    compile: tuple[str, ...] = ("none",)
    mode: tuple[str, ...] = ("inference",)
    processes: int = 10
    seconds: float = 6.0
    """How long blocks are timed in a process after the warm-up: in pairs at least six of each
    model, of a model alone at least one."""
    limit_s: float = 900.0
    """A process that takes longer is ended, and its configuration is a failure; so it is if making
    and checking the models takes longer."""
    limit_gib: float = 0.0
    """Memory of the machine, not of a GPU, that a configuration may take with all its processes; 0
    for 80 % of what there is. With --batch auto its own process has no limit."""
    mean: bool = False
    """Also read rates as timm's benchmark does: the mean of 40 calls of one process."""
    resume: bool = False
    """Go on with the newest run of the same settings; what has a result, failed too, is left."""
    out: Path = tracking.OUT
    """Folder of run folders."""
    wandb: str = ""
    """W&B mode: online, offline or disabled; empty for WANDB_MODE, else offline."""
    device: str = ""
    """Device; empty for the accelerator of this machine, else the CPU."""


def main(args: list[str]) -> None:
    """Check the settings, time what has no result yet, print and keep it."""
    settings = cli.parse(Settings, args, prog=PROG)
    model, dtype = usual(parallel.device(settings.device))
    settings = replace(
        settings, models=settings.models or (f"vitx:{model}",), dtype=settings.dtype or (dtype,)
    )
    every = configurations(settings)
    values = {name: _plain(value) for name, value in vars(settings).items()}
    values["versions"] = versions([*settings.models, settings.reference])
    group = settings.out / tracking.group_of(GROUP)
    folder = _newest(group, values) if settings.resume else None
    mode = settings.wandb or None
    with tracking.Run(
        settings.out, GROUP, _label(settings), values, mode=mode, folder=folder
    ) as run:
        results = Results(run.folder)
        done = {result.configuration for result in of_kind(results.kept, Throughput)}
        for number, configuration in enumerate(every, 1):
            if configuration.key in done:
                continue
            print(f"[{number} of {len(every)}] {configuration} …", flush=True)
            result = results.add(Throughput, **timed(configuration, run.folder / "work"))
            run.log({tracking.ROW: len(results.kept), **_numbers(result)})
            print(f"  {line(result)}", flush=True)
        shutil.rmtree(run.folder / "work", ignore_errors=True)
        run.summarise(_summary(of_kind(results.kept, Throughput)))
        show(results.kept, run)
        print(f"results: {results.path}\n{run.where}")


def versions(names: Sequence[str]) -> dict[str, object]:
    """What results of these models depend on beside the settings: declared versions, those of
    packages, and the files of a person's own models."""
    # What a person's file imports may stand beside it; so may what is no Python of today.
    folders = {Path(name.split(":")[1]).parent for name in names if name.startswith("python:")}
    files = sorted({path for folder in folders for path in folder.glob("*.py") if path.is_file()})
    content = b"".join(path.name.encode() + path.read_bytes() for path in files)
    here = environment()
    return {
        "protocol": timing.PROTOCOL,
        "version": here.version,
        "packages": here.versions,
        "files": hashlib.sha256(content).hexdigest()[:16],
    }


def show(results: Sequence[Result], run: tracking.Run) -> None:
    """Tables and charts of the results into the run's folder and W&B."""
    shown = throughput_table(results)
    run.table("throughput", shown.header, shown.body)
    for path in charts.write(results, run.figures, tables=TABLES, ending=".png"):
        if path.suffix == ".png":
            run.figure(path.stem, path)


def configurations(settings: Settings) -> list[Configuration]:
    """Every combination; ValueError for a value that can't be."""
    device = parallel.device(settings.device)
    for name in filter(None, (*settings.models, settings.reference)):
        peers.check(name)
    for name, choices in (
        ("dtype", timing.DTYPES[1:]),
        ("mode", timing.MODES),
        ("compile", timing.COMPILES),
    ):
        for word in getattr(settings, name):
            choose(name, word, choices)
    for dtype in settings.dtype:
        _check_dtype(dtype, device)
    for name in ("batch", "mode", "compile"):
        if not getattr(settings, name):
            raise UserError(f"{name} names nothing to time")
    cli.goes_with(settings, unchecked="reference")
    if not settings.limit_s < MOST_SECONDS:
        raise UserError(f"limit_s = {settings.limit_s:g} must be less than {MOST_SECONDS:,.0f}")
    if not 0 < settings.seconds < math.inf:
        raise UserError(f"seconds = {settings.seconds} must be positive and finite")
    batches = [_batch(word) for word in settings.batch]
    config = TimingConfig(
        processes=settings.processes,
        pair_s=settings.seconds,
        warm_up_s=warm_up_s(device),
        limit_s=settings.limit_s,
        limit_gib=settings.limit_gib or round(MOST_MEMORY * machine.memory_gib(), 1),
        details=True,
        mean=settings.mean,
    )
    names = [name for name in dict.fromkeys(settings.models) if name != settings.reference]
    if not names:
        raise UserError("models names no other model than the reference")
    return [
        Configuration(
            model=name,
            reference=settings.reference,
            batch=batch,
            config=replace(config, mode=mode, dtype=dtype, compile=compiled),
            device=str(device),
            unchecked=settings.unchecked,
        )
        for name in names
        for mode in dict.fromkeys(settings.mode)
        for batch in dict.fromkeys(batches)
        for dtype in dict.fromkeys(settings.dtype)
        for compiled in dict.fromkeys(settings.compile)
    ]


def _batch(word: str) -> int:
    if word == AUTO:
        return 0
    if not word.isdecimal() or int(word) < 1:
        raise UserError(f"batch = {word!r} must be a whole number, at least 1, or {AUTO}")
    return int(word)


def _check_dtype(dtype: str, device: torch.device) -> None:
    if device.type != "cuda" or dtype != "bfloat16":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"dtype = {dtype!r}: {torch.cuda.get_device_name(device)} has no bfloat16")


def line(result: Throughput) -> str:
    """A result for people."""
    comparison, rate = result.comparison, result.comparison.candidate.rate
    if result.untimed or rate is None:
        return f"{comparison.verdict}: {comparison.reason}"
    text = f"{_rate(rate).value:,.1f} images/s"
    if rate.mean:
        text += f" ({rate.mean.low:,.1f} to {rate.mean.high:,.1f} within this run)"
    if comparison.ratio and comparison.floor is not None:
        text += (
            f"; {interval_text(comparison.ratio)} of the reference's, floor "
            f"{floor_text(comparison)}, {verdict(result)}"
        )
    elif comparison.reason:
        text += f", {comparison.verdict}: {comparison.reason}"
    return text


def _numbers(result: Throughput) -> dict[str, float]:
    """What goes to W&B of a result."""
    comparison, rate = result.comparison, result.comparison.candidate.rate
    if result.untimed or rate is None:
        return {}
    config = comparison.config
    words = (result.candidate, config.mode, comparison.batch, comparison.dtype, config.compile)
    name = "/".join(map(str, words))
    ratio = {f"{name}/ratio": comparison.ratio.value} if comparison.ratio else {}
    return {f"{name}/{tracking.IMAGES_PER_S}": _rate(rate).value} | ratio


def _summary(results: Sequence[Throughput]) -> dict[str, float]:
    """Final values; the rate and its interval if there is one configuration, as in a sweep."""
    values: dict[str, float] = {tracking.ROW: len(results)}
    rates = [r.comparison.candidate.rate for r in results if not r.untimed]
    if len(results) != 1 or not rates or (rate := rates[0]) is None:
        return values
    ends = {"median": rate.median, "low": rate.low, "high": rate.high}
    if rate.mean:
        ends |= {"mean": rate.mean.value, "mean_low": rate.mean.low, "mean_high": rate.mean.high}
    values[tracking.IMAGES_PER_S] = _rate(rate).value
    return values | {f"{tracking.IMAGES_PER_S}_{end}": value for end, value in ends.items()}


def _rate(rate: Rate) -> Interval:
    """The rate over processes; of one process its median."""
    return rate.mean or Interval(rate.median, rate.median, rate.median)


def _label(settings: Settings) -> str:
    first, *more = settings.models
    return f"{first} and {len(more)} more" if more else first


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else str(value)


def _newest(group: Path, values: Mapping[str, object]) -> Path | None:
    """The newest run folder of the same settings and versions, but for how it was called.

    Raises ValueError if there is none.
    """
    free = ("resume", "wandb", "out")
    same = {name: value for name, value in values.items() if name not in free}
    folders = [
        path.parent
        for path in group.glob("*/config.json")
        if {k: v for k, v in read_json(path).items() if k not in free} == same
    ]
    if not folders:
        raise UserError(f"{group} holds no run of these settings and versions to resume")
    return max(folders, key=lambda path: path.stat().st_mtime)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        machine.end_with_parent()
        cli.run(lambda args: child(Path(args[0])), sys.argv[2:])
    else:
        cli.run(main)
