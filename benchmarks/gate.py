"""Whether this commit is slower than another: `python -m benchmarks.gate --against REV`.

Both are checked out into folders of their own. Every round asks three processes for a block each,
in random order: the other commit, the other commit again, this one. Exit status 1 says that this
one is slower by more than the threshold and the noise floor, with its whole interval, or that its
outputs or gradients are others, in which case nothing is timed.
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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.study.pages import ROOT
from experiments.study.rows import Rows
from vitx.measure import stats
from vitx.measure.equality import SMALLEST, TOLERANCE, largest
from vitx.measure.machine import KEEP_MEMORY
from vitx.measure.timing import ARMS, MODES, iterations_of, log_ratios, orders
from vitx.model.config import size
from vitx.registry import choose
from vitx.training import parallel, provenance, tracking

PROG = "python -m benchmarks.gate"
WHAT = "gate"
SIDE = ROOT / "benchmarks" / "gate_side.py"


@dataclass(frozen=True)
class Settings:
    """Time this commit in pairs with another; exit 1 if it is slower beyond the threshold."""

    against: str
    """A commit, branch or tag."""
    threshold: float = 0.03
    """Slowdown that is let pass."""
    model: str = "Ti/16"
    mode: tuple[str, ...] = ("inference", "training")
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


def main(args: list[str]) -> None:
    """Time every mode; print a line each, keep rows, and say by the exit status how it went."""
    settings = cli.parse(Settings, args, prog=PROG)
    commits = check(settings)
    if provenance.environment()["dirty"]:
        print("what is not committed is left out: HEAD is timed")
    failed = False
    rows = Rows(settings.out / "gate" / time.strftime("%Y%m%d-%H%M%S-gate"))
    with tempfile.TemporaryDirectory(prefix="vitx-gate-") as folder, ExitStack() as stack:
        trees = {
            side: stack.enter_context(worktree(commit, Path(folder, side)))
            for side, commit in commits.items()
        }
        for mode in dict.fromkeys(settings.mode):
            row = rows.add("speed", **compare(settings, mode, commits, trees, Path(folder)))
            failed |= row["failed"]
            print(line(row), flush=True)
    print(rows.path)
    if failed:
        raise SystemExit(1)


def check(settings: Settings) -> dict[str, str]:
    """The hash of each side's commit; ValueError for a setting that can't be."""
    cli.at_least(settings, batch=1, processes=2)
    for name in ("threshold", "seconds", "block_s", "limit_s"):
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{name} = {getattr(settings, name)} must be positive and finite")
    if not settings.mode:
        raise ValueError("mode names nothing to time")
    for mode in settings.mode:
        choose("mode", mode, MODES)
    size(settings.model)
    commits = {}
    for side, revision in (("reference", settings.against), ("candidate", "HEAD")):
        commit = provenance.git("rev-parse", "--verify", f"{revision}^{{commit}}")
        if not commit:
            raise ValueError(f"against = {revision!r} is no commit of this checkout")
        commits[side] = commit
    return commits


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """A commit's files in a folder of their own, until the block ends."""
    if provenance.git("worktree", "add", "--quiet", "--detach", str(folder), commit) is None:
        raise ValueError(f"git can't check {commit} out into {folder}")
    try:
        yield folder
    finally:  # where git can't, it forgets the folder when that is gone
        provenance.git("worktree", "remove", "--force", str(folder))


def compare(
    settings: Settings, mode: str, commits: dict[str, str], trees: dict[str, Path], folder: Path
) -> dict[str, Any]:
    """The fields of a row: ratio, floor, verdict, and whether the gate fails."""
    device = str(parallel.device(settings.device))
    asked = {
        "model": settings.model, "batch": settings.batch, "mode": mode, "device": device,
        "weights": str(folder / f"{mode}.pt"),
    }  # fmt: skip
    records: list[dict[str, Any]] = []
    apart = 0.0
    while len(records) < settings.processes and apart <= TOLERANCE:
        records.append(process(asked, trees, settings, len(records)))
        apart = largest((apart, records[-1]["apart"]))
    labels = {
        "what": WHAT, **commits,
        "model": settings.model, "mode": mode, "compile": "none", "dtype": "float32",
        "batch": settings.batch, "device": device, "threshold": settings.threshold,
        "outputs_apart": apart, "processes": len(records), "seconds": settings.seconds,
        "block_s": settings.block_s,
    }  # fmt: skip
    if not apart <= TOLERANCE:
        reason = f"outputs or gradients differ by {apart:.1e}"
        return labels | {"verdict": "not equal", "reason": reason, "failed": True, "ratio": None,
                         "noise_floor": None}  # fmt: skip
    ratio = stats.paired_ratio([record["log_ratio"] for record in records])
    floor = stats.noise_floor([record["log_ratio_again"] for record in records])
    return labels | {
        "ratio": ratio.value,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "noise_floor": floor,
        "verdict": stats.speed_verdict(ratio, floor),
        "log_ratios": [record["log_ratio"] for record in records],
        "log_ratios_again": [record["log_ratio_again"] for record in records],
        "failed": ratio.high < 1 / (1 + max(settings.threshold, floor)),
        "raw": [record["rounds"] for record in records],
    }


def process(
    asked: dict[str, Any], trees: dict[str, Path], settings: Settings, number: int
) -> dict[str, Any]:
    """Three fresh processes, and rounds of a block each; none if the commits are not equal."""
    rng = random.Random(number)
    made = rng.sample(ARMS, len(ARMS))
    with ExitStack() as stack:
        sides = {
            arm: stack.enter_context(Side(asked, trees[tree], settings.limit_s))
            for arm in made
            for tree in ["candidate" if arm == "candidate" else "reference"]
        }
        before, after = (sides[arm].hello["values"] for arm in ("reference", "candidate"))
        apart = largest_error(before, after)
        if not apart <= TOLERANCE:
            return {"apart": apart}
        for side in sides.values():  # warm-up
            side.block(1)
        once = {arm: side.block(3) for arm, side in sides.items()}
        iterations = iterations_of(once, settings.block_s)
        round_s = sum(count * once[arm] for arm, count in iterations.items())
        wanted = max(6, round(settings.seconds / round_s))
        rounds = []
        for order in orders(rng, ARMS):
            if len(rounds) >= wanted and len(rounds) % 6 == 0:
                break
            rounds.append({arm: sides[arm].block(iterations[arm]) for arm in order})
    times = {arm: [each[arm] for each in rounds] for arm in ARMS}
    found = log_ratios(times, dict.fromkeys(ARMS, asked["batch"]))
    return {"apart": apart, "rounds": rounds, **found}


def largest_error(before: Sequence[float], after: Sequence[float]) -> float:
    """Largest relative difference of outputs and gradients' norms; infinite if their number is."""
    if len(before) != len(after):
        return math.inf
    scale = largest(map(abs, before))
    return largest(
        abs(a - b) / max(abs(a), SMALLEST * scale) for a, b in zip(before, after, strict=True)
    )


class Side:
    """A process that times blocks of one checkout's model.

    Raises ValueError where it ends, or takes longer than `limit_s` to answer.
    """

    def __init__(self, asked: dict[str, Any], tree: Path, limit_s: float):
        self.limit_s = limit_s
        self.errors = tempfile.TemporaryFile("w+", encoding="utf8")  # noqa: SIM115 (`__exit__`)
        environment = {**os.environ, **KEEP_MEMORY, "PYTHONPATH": str(tree)}
        self.program = subprocess.Popen(
            [sys.executable, str(SIDE)], env=environment, cwd=tree, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        self.hello = self.ask(asked)
        if not Path(self.hello["file"]).is_relative_to(tree.resolve()):
            raise ValueError(f"{tree}: another vitx was imported, {self.hello['file']}")

    def ask(self, value: dict[str, Any]) -> dict[str, Any]:
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        limit = threading.Timer(self.limit_s, self.program.kill)
        limit.start()
        try:
            self.program.stdin.write(json.dumps(value) + "\n")
            self.program.stdin.flush()
            return json.loads(self.program.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise ValueError(f"a side of the gate ended: {self._last_words()}") from None
        finally:
            limit.cancel()

    def _last_words(self) -> str:
        if self.program.wait() == -signal.SIGKILL:
            return f"killed, at the latest after {self.limit_s:g} s without an answer"
        self.errors.seek(0)
        return (self.errors.read().strip().splitlines() or ["no word"])[-1]

    def block(self, iterations: int) -> float:
        return self.ask({"block": iterations})["seconds"]

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.program.kill()
        self.program.communicate()
        self.errors.close()


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    if row["ratio"] is None:
        return f"{row['mode']}: {row['reason']}: {result(row)}"
    return (
        f"{row['mode']}: {row['ratio']:.3f} of the other's images/s ({row['ratio_low']:.3f} to "
        f"{row['ratio_high']:.3f}), floor ±{row['noise_floor']:.1%}, {row['verdict']}; threshold "
        f"{row['threshold']:.0%}: {result(row)}"
    )


def result(row: dict[str, Any]) -> str:
    """Whether the gate fails by a row, for people."""
    if row["failed"]:
        return "FAILED"
    return "passed: not shown to be slower" if row["verdict"] == stats.INCONCLUSIVE else "passed"


if __name__ == "__main__":
    cli.run(main)
