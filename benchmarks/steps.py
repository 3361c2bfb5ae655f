"""Whole training steps, data included, in pairs: `python -m benchmarks.steps --root DIR`.

`benchmarks.step_pairs` holds what is compared. Every process has three arms, the reference twice; a
block is a run of steps, and a round holds a block of each arm.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.kinds import Start, Step
from benchmarks.step_pairs import CONFIG, PAIRS, TrainingSide
from experiments import cli
from experiments.study.results import Results
from vitx import data
from vitx.measure.compare import speed
from vitx.measure.comparison import Comparison, Side
from vitx.measure.equality import TOLERANCE
from vitx.measure.machine import keep_memory
from vitx.measure.timing import TimingConfig
from vitx.model.cost import forward_macs
from vitx.model.vit import build
from vitx.registry import UserError, choose
from vitx.settings import override
from vitx.training import tracking
from vitx.training.state import init, step

LIMIT_S = 3600.0
"""A process that takes longer is ended, and its comparison is a failure."""
SHORT_S = 0.001
"""Less than one iteration takes: a block is one, and a process has one set of rounds."""


@dataclass(frozen=True)
class Settings:
    """Time whole training steps on CIFAR-10 in pairs; results go to a run folder."""

    root: str
    """Folder of CIFAR-10, as for experiments.train."""
    only: tuple[str, ...] = ()
    """Comparisons; empty for all of them."""
    processes: int = 5
    steps: int = 15
    """Steps of a block."""
    out: Path = tracking.OUT


def main(args: list[str]) -> None:
    """Run every comparison in fresh processes; print and keep a result for each."""
    settings = cli.parse(Settings, args, prog="python -m benchmarks.steps")
    cli.at_least(settings, processes=2, steps=1)
    for name in settings.only:
        choose("only", name, PAIRS)
    dataset = data.load(override(CONFIG.data, root=settings.root))
    results = Results(settings.out / "steps" / time.strftime("%Y%m%d-%H%M%S-steps"))
    seconds = [first_step(settings.root) for _ in range(settings.processes)]
    print(f"first step {median(seconds):.1f} s after the start of the program")
    results.add(Start, recipe="scratch-cifar10", seconds=tuple(seconds))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(dataset, Path(folder, "data.pt"))
        for name in settings.only or PAIRS:
            print(line(results.add(Step, **compared(name, settings, Path(folder)))), flush=True)
    print(results.path)


def compared(name: str, settings: Settings, folder: Path) -> dict[str, object]:
    """The values of a comparison's result; models that differ are not timed."""
    pair = PAIRS[name]
    config = TimingConfig(
        mode="training", compile="default" if pair.config.compile else "none", dtype="float32",
        processes=settings.processes, pair_s=SHORT_S, block_s=SHORT_S, limit_s=LIMIT_S,
    )  # fmt: skip
    error = pair.error() if pair.error else None
    image = torch.zeros(1, pair.config.model.channels, *pair.config.model.size)
    if error is None or error <= TOLERANCE:
        reference, candidate = (
            TrainingSide(name, side, settings.steps, folder / "data.pt")
            for side in ("reference", "candidate")
        )
        comparison = speed(reference, candidate, image, config=config)
    else:
        reason = f"logits differ by {error:.1e} in float64"
        comparison = Comparison(config=config, verdict="not equal", reason=reason, dtype="float32")
    macs = Side(macs=forward_macs(build(pair.config.model), image))
    return {
        "name": name,
        "reference": pair.reference,
        "candidate": pair.candidate,
        "image": pair.config.model.size,
        "logits_error": error,
        "data_share": data_share(folder, settings.steps) if name == "timm" else None,
        "comparison": replace(
            comparison,
            batch=pair.config.batch,
            device="cpu",
            candidate=comparison.candidate | macs,
        ),
    }


def first_step(root: str) -> float:
    """Seconds from the start of the training program to the end of its first step, data read."""
    command = [sys.executable, "-m", "experiments.train", "scratch-cifar10"]
    flags = ["--data.root", root, "--log-every", "1", "--wandb", "disabled"]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        program = subprocess.Popen(
            [*command, *flags, "--out", folder], stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert program.stdout is not None
        try:
            reached = any(line.startswith("step 1 ") for line in program.stdout)
            seconds = time.perf_counter() - start
        finally:
            program.kill()
            program.wait()
        errors.seek(0)
        if not reached:
            last = (errors.read().strip().splitlines() or ["no word"])[-1]
            raise UserError(f"{' '.join(command)} ended before a step: {last}")
    return seconds


def data_share(folder: Path, steps: int) -> float:
    """The part of a step's time that goes into its batch."""
    keep_memory()
    dataset: data.Dataset = torch.load(folder / "data.pt", weights_only=False)  # of `main`
    state = init(CONFIG)
    stream = data.batches(dataset, batch=CONFIG.batch, seed=1)
    batch_s = step_s = 0.0
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(stream)
        middle = time.perf_counter()
        step(state, batch, CONFIG)
        batch_s, step_s = batch_s + middle - start, step_s + time.perf_counter() - middle
    return batch_s / (batch_s + step_s)


def line(result: Step) -> str:
    """A result for people."""
    comparison = result.comparison
    ratio, floor = comparison.ratio, comparison.floor
    if ratio is None or floor is None:
        return f"{result.name}: {comparison.verdict}: {comparison.reason}"
    rates = [side.rate.median for side in comparison.sides.values() if side.rate]
    return (
        f"{result.name}: {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}), floor "
        f"±{floor:.1%}: {comparison.verdict}; {rates[0]:,.0f} and {rates[1]:,.0f} images per second"
    )


if __name__ == "__main__":
    cli.run(main)
