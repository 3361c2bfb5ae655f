"""Whether this commit is slower than another: `python -m benchmarks.gate --against REV`.

Both are checked out into folders of their own. A round takes a block of each of three processes:
the other commit, the other commit again, this one. Exit status 1 says that this commit is slower by
more than the threshold and the noise floor, with its whole interval, or that its outputs or
gradients differ, in which case nothing is timed.
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.kinds import Gate
from benchmarks.speed import warm_up_s
from experiments import cli
from experiments.study.pages import ROOT
from experiments.study.results import Results
from vitx.measure.compare import summarise
from vitx.measure.comparison import Comparison
from vitx.measure.equality import SMALLEST, TOLERANCE, largest
from vitx.measure.machine import KEEP_MEMORY
from vitx.measure.timing import ARMS, Arm, Mode, PairTimes, TimingConfig, time_rounds
from vitx.model.config import size
from vitx.registry import UserError
from vitx.training import parallel, provenance, tracking

PROG = "python -m benchmarks.gate"
SIDE = ROOT / "benchmarks" / "gate_side.py"


@dataclass(frozen=True)
class Settings:
    """Time this commit in pairs with another; exit 1 if it is slower beyond the threshold."""

    against: str
    """A commit, branch or tag."""
    threshold: float = 0.03
    """Slowdown that is let pass."""
    model: str = "Ti/16"
    mode: tuple[Mode, ...] = ("inference", "training")
    batch: int = 2
    processes: int = 10
    seconds: float = 6.0
    """How long blocks are timed in a process."""
    block_s: float = 0.03
    limit_s: float = 600.0
    """A side that takes longer to answer is ended, and so is the gate."""
    out: Path = tracking.OUT
    """Folder of run folders."""
    device: str = ""
    """Device; empty for the accelerator of this machine, else the CPU."""


@dataclass(frozen=True)
class Timing:
    """A configuration of the gate, and where both commits are checked out."""

    model: str
    batch: int
    device: torch.device
    weights: Path
    """File of the weights that both sides have."""
    trees: Mapping[str, Path]
    config: TimingConfig

    @property
    def request(self) -> dict[str, object]:
        """What a side is to build."""
        return {
            "model": self.model,
            "batch": self.batch,
            "mode": self.config.mode,
            "device": str(self.device),
            "weights": str(self.weights),
        }


def main(args: list[str]) -> None:
    """Time every mode; print a line each, keep results, and say by the exit status how it went."""
    settings = cli.parse(Settings, args, prog=PROG)
    commits = check(settings)
    device = parallel.device(settings.device)
    results = Results(settings.out / "gate" / time.strftime("%Y%m%d-%H%M%S-gate"))
    if results.environment.dirty:
        print("what is not committed is left out: HEAD is timed")
    failed = False
    with tempfile.TemporaryDirectory(prefix="vitx-gate-") as folder, ExitStack() as stack:
        trees = {
            side: stack.enter_context(worktree(commit, Path(folder, side)))
            for side, commit in commits.items()
        }
        for mode in dict.fromkeys(settings.mode):
            config = TimingConfig(
                mode=mode, dtype="float32", processes=settings.processes, pair_s=settings.seconds,
                block_s=settings.block_s, warm_up_s=warm_up_s(device), limit_s=settings.limit_s,
            )  # fmt: skip
            weights = Path(folder, f"{mode}.pt")
            timing = Timing(settings.model, settings.batch, device, weights, trees, config)
            apart, comparison = compare(timing)
            result = results.add(
                Gate, **commits, model=settings.model, threshold=settings.threshold,
                outputs_apart=apart, failed=fails(comparison, settings.threshold),
                comparison=comparison, image=size(settings.model).size, device=str(device),
            )  # fmt: skip
            failed |= result.failed
            print(line(result), flush=True)
    print(results.path)
    if failed:
        raise SystemExit(1)


def check(settings: Settings) -> dict[str, str]:
    """The hash of each side's commit; ValueError for a setting that can't be."""
    cli.at_least(settings, batch=1, processes=2)
    for name in ("threshold", "seconds", "block_s", "limit_s"):
        if not 0 < getattr(settings, name) < math.inf:
            raise UserError(f"{name} = {getattr(settings, name)} must be positive and finite")
    if not settings.mode:
        raise UserError("mode names nothing to time")
    size(settings.model)
    commits = {}
    for side, revision in (("reference", settings.against), ("candidate", "HEAD")):
        commit = provenance.git("rev-parse", "--verify", f"{revision}^{{commit}}")
        if not commit:
            raise UserError(f"against = {revision!r} is no commit of this checkout")
        commits[side] = commit
    return commits


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """A commit's files in a folder of their own, until the block ends."""
    if provenance.git("worktree", "add", "--quiet", "--detach", str(folder), commit) is None:
        raise UserError(f"git can't check {commit} out into {folder}")
    try:
        yield folder
    finally:  # where git can't, it forgets the folder when that is gone
        provenance.git("worktree", "remove", "--force", str(folder))


def compare(timing: Timing) -> tuple[float, Comparison]:
    """The largest difference of outputs and gradients, and what was timed if they are equal."""
    base = Comparison(
        config=timing.config, verdict="not timed", batch=timing.batch, dtype="float32",
        device=str(timing.device),
    )  # fmt: skip
    apart, pairs = 0.0, []
    for number in range(timing.config.processes):
        difference, pair = time_pair(timing, number)
        apart = largest((apart, difference))
        if pair is None:
            reason = f"outputs or gradients differ by {apart:.1e}"
            return apart, replace(base, verdict="not equal", reason=reason)
        pairs.append(pair)
    return apart, summarise(base, pairs)


def fails(comparison: Comparison, threshold: float) -> bool:
    """Whether the gate fails: the whole interval is slower than the threshold and the floor."""
    if comparison.ratio is None or comparison.floor is None:
        return True
    return comparison.ratio.high < 1 / (1 + max(threshold, comparison.floor))


def time_pair(timing: Timing, number: int) -> tuple[float, PairTimes | None]:
    """The difference of both commits, and rounds of three fresh processes if they are equal."""
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        for arm in random.Random(number).sample(ARMS, len(ARMS)):
            tree = timing.trees["candidate" if arm == "candidate" else "reference"]
            side = Side(timing.request, tree, timing.config.limit_s)
            sides[arm] = stack.enter_context(side)
        apart = largest_error(sides["reference"].values, sides["candidate"].values)
        if not apart <= TOLERANCE:
            return apart, None
        arms = {name: Arm(side.block, timing.batch) for name, side in sides.items()}
        return apart, time_rounds(arms, timing.config, number, timing.device, tree=True)


def largest_error(before: Sequence[float], after: Sequence[float]) -> float:
    """Largest relative difference of outputs and gradients' norms; infinite if their number is."""
    if len(before) != len(after):
        return math.inf
    scale = largest(map(abs, before))
    return largest(
        abs(a - b) / max(abs(a), SMALLEST * scale) for a, b in zip(before, after, strict=True)
    )


@dataclass
class Side:
    """A process that times blocks of one checkout's model.

    Raises ValueError where it ends, or takes longer than `limit_s` to answer.
    """

    request: Mapping[str, object]
    tree: Path
    limit_s: float
    values: list[float] = field(init=False)
    """Outputs and norms of gradients in float64."""

    def __post_init__(self):
        self._errors = tempfile.TemporaryFile("w+", encoding="utf8")  # noqa: SIM115 (`__exit__`)
        environment = {**os.environ, **KEEP_MEMORY, "PYTHONPATH": str(self.tree)}
        self._program = subprocess.Popen(
            [sys.executable, str(SIDE)], env=environment, cwd=self.tree, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        built = self._ask(self.request)
        self.values = built["values"]
        if not Path(built["file"]).is_relative_to(self.tree.resolve()):
            raise UserError(f"{self.tree}: another vitx was imported, {built['file']}")

    def _ask(self, request: Mapping[str, object]) -> dict[str, Any]:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        limit = threading.Timer(self.limit_s, self._program.kill)
        limit.start()
        try:
            self._program.stdin.write(json.dumps(request) + "\n")
            self._program.stdin.flush()
            return json.loads(self._program.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise UserError(f"a side of the gate ended: {self._last_words()}") from None
        finally:
            limit.cancel()

    def _last_words(self) -> str:
        if self._program.wait() == -signal.SIGKILL:
            return f"killed, at the latest after {self.limit_s:g} s without an answer"
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or ["no word"])[-1]

    def block(self, iterations: int) -> float:
        """Seconds of so many iterations."""
        return self._ask({"block": iterations})["seconds"]

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._program.kill()
        self._program.communicate()
        self._errors.close()


def line(result: Gate) -> str:
    """A result for people."""
    comparison = result.comparison
    mode, ratio, floor = comparison.config.mode, comparison.ratio, comparison.floor
    if ratio is None or floor is None:
        return f"{mode}: {comparison.reason}: {result.outcome}"
    return (
        f"{mode}: {ratio.value:.3f} of the other's images per second ({ratio.low:.3f} to "
        f"{ratio.high:.3f}), floor ±{floor:.1%}, {comparison.verdict}; threshold "
        f"{result.threshold:.0%}: {result.outcome}"
    )


if __name__ == "__main__":
    cli.run(main)
