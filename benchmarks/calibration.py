"""Trials of the timing: pairs that are the same, and slowdowns that were planted.

They are fixed beforehand, in number and in order, and each is timed with the quick run's settings.
They can be made in pieces, on several machines; every one that was made is kept.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import speed
from benchmarks.kinds import Trial, shares
from benchmarks.report.calibration import group
from benchmarks.stages import Job
from experiments.study.results import first, of_kind, read
from vitx.measure import worker
from vitx.measure.comparison import Comparison, Process
from vitx.measure.timing import PROTOCOL, TimingConfig
from vitx.training.provenance import environment

RESULT_OF_HERE = "1970-01-01T00:00:00Z-0"


def made(
    paths: Sequence[Path],
    config: TimingConfig,
    *,
    reference: str,
    batch: int,
    device: torch.device,
) -> list[Trial]:
    """The trials in these files that are of one group with those that would be made now: by the
    same configuration, protocol, model, batch and device, by as many threads of as many cores, on
    whatever processor.

    Of a trial that was made twice the first counts, whatever its verdict.
    """
    here = Trial(
        id=RESULT_OF_HERE,
        environment=environment(),
        device=str(device),
        reference=reference,
        candidate="",
        comparison=Comparison(
            config=config,
            verdict="",
            batch=batch,
            processes=(Process(None, None, forked=worker.forks(device)),),
        ),
        planted=shares()[0],
        planted_counted=0.0,
        trial=0,
        protocol=PROTOCOL,
        seconds=0.0,
    )
    trials = of_kind((result for path in paths for result in read(path, cut=True)), Trial)
    same = [trial for trial in trials if group(trial) == group(here)]
    return first(sorted(same, key=lambda trial: trial.when), lambda trial: trial.trial)


def trial(
    number: int, make: Callable[[], speed.Pair], config: TimingConfig, **how: Any
) -> dict[str, Any]:
    """The fields of a `Trial`. `how` are further arguments of `compare`."""
    start = time.perf_counter()
    values = speed.control(make(), config, shares()[number], **how)
    seconds = time.perf_counter() - start
    return values | {"trial": number, "protocol": PROTOCOL, "seconds": seconds}


def run(
    numbers: Sequence[int], make: Callable[[], speed.Pair], config: TimingConfig, job: Job
) -> None:
    """Make these trials of the model that `make` gives; a failed one is kept too."""
    places = {"folder": job.folder / "job", "cache": job.folder / "cache"}
    for number in numbers:
        result = job.add(Trial, **trial(number, make, config, **places))
        comparison = result.comparison
        ratio = comparison.ratio.value if comparison.ratio else float("nan")
        job.say(
            f"trial {number}, {result.planted:.0%} planted: {comparison.verdict}, ratio "
            f"{ratio:.3f}, {result.seconds:.0f} s"
        )
        for path in places["folder"].rglob("*.pt"):
            path.unlink()
