"""How often the timing is wrong: pairs that are the same, and slowdowns that were planted.

The trials are fixed beforehand, in number and in order, and each is timed with the quick run's
settings. They can be made in pieces; every one that was made is kept.
"""

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import speed
from experiments import rows as rows_file
from experiments.pages import Row, Table, machine
from vitx import compare, equality, job, stats, timing, tracking
from vitx import machine as machine_state
from vitx.timing import Plan

COUNTS = {0.0: 60, 0.03: 30, 0.05: 30}
"""Trials by the planted share of further work."""
WHAT = "trial"
PROTOCOL = (
    *(
        Path(str(module.__file__))
        for module in (stats, machine_state, equality, timing, job, compare, speed)
    ),
    Path(__file__),
)
"""The files whose statements decide what a trial says."""


def trials() -> list[float]:
    """The planted share of every trial, in the order in which they are made."""
    shares = [share for share, count in COUNTS.items() for _ in range(count)]
    random.Random(0).shuffle(shares)
    return shares


def made(
    paths: Sequence[Path], plan: Plan, *, reference: str, batch: int, device: torch.device
) -> list[Row]:
    """The trials in these files of rows that say the same of the same: made with this plan, code,
    model, batch and device by as many threads on a machine like this one.

    Of a trial that was made twice the first counts, whatever it said.
    """
    rows = sorted(
        (row for path in paths for row in rows_file.read(path, cut=True)), key=rows_file.when
    )
    here = {"reference": reference, "batch": batch, "device": str(device), "plan": vars(plan),
            "protocol": protocol(), "forked": job.forks(device),
            "environment": tracking.environment()}  # fmt: skip
    wanted = [row for row in rows if row.get("what") == WHAT and _kind(row) == _kind(here)]
    return rows_file.first(wanted, "trial")


@lru_cache(maxsize=1)
def protocol() -> str:
    """A hash of the code that decides what a trial says, with PyTorch's and timm's versions."""
    return tracking.code_of(PROTOCOL, "torch", "timm")


def _kind(row: Mapping[str, Any]) -> str:
    """What trials share whose verdicts are counted together."""
    said = [row[key] for key in ("plan", "protocol", "reference", "batch", "device")]
    environment = [row["environment"].get(key) for key in ("threads", "affinity", "cpu_id")]
    return json.dumps([*said, row.get("forked", False), machine(dict(row)), *environment])


def trial(
    number: int, make: Callable[[], speed.Pair], plan: Plan, **how: Any
) -> tuple[str, dict[str, Any]]:
    """One trial: the kind and the fields of its row. `how` are further arguments of `compare`."""
    share, start = trials()[number], time.perf_counter()
    pair = make()
    if share:
        kind, fields = speed.plant(pair, plan, share=share, **how)
    else:
        kind, fields = speed.null(pair, plan, **how)
    said = {"what": WHAT, "trial": number, "share": share, "protocol": protocol()}
    return kind, fields | said | {"seconds": time.perf_counter() - start}


def table(rows: Sequence[Row]) -> Table:
    """How many of each kind were claimed to differ, with exact intervals, for each protocol."""
    header = ("planted", "work counted", "trials", "said slower", "said faster", "inconclusive",
              "failed", "rate (95 %, exact)", "seconds a trial", "settings", "protocol",
              "machine")  # fmt: skip
    by: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row.get("what") == WHAT:
            by.setdefault((_kind(row), row["share"]), []).append(row)
    body = []
    for kind in dict.fromkeys(kind for kind, _ in by):
        for share in COUNTS:
            some = rows_file.first(by.get((kind, share), []), "trial")
            if not some:
                continue
            settings, where = _settings(some[0]), machine(some[0])
            words = [row["verdict"] for row in some]
            claimed = sum(word in (("slower", "faster") if share == 0 else ("slower",))
                          for word in words)  # fmt: skip
            rate = stats.proportion(claimed, len(some))
            what = "false alarms" if share == 0 else "found"
            seconds = [row["seconds"] for row in some]
            counted = [row["planted_counted"] for row in some if "planted_counted" in row]
            body.append(
                (f"{share:.0%} more work" if share else "nothing",
                 f"{min(counted):.2%} to {max(counted):.2%}" if counted else "–", str(len(some)),
                 str(words.count("slower")), str(words.count("faster")),
                 str(words.count(stats.INCONCLUSIVE)),
                 str(sum(row["kind"] == "failure" for row in some)),
                 f"{what}: {rate.value:.0%} ({rate.low:.0%} to {rate.high:.0%})",
                 f"{statistics.median(seconds):.0f} (at most {max(seconds):.0f})", settings,
                 some[0]["protocol"][:6], where)
            )  # fmt: skip
    return Table(header, body)


def _settings(row: Row) -> str:
    """What a trial timed and how, for people."""
    plan = row["plan"]
    return (
        f"{row['reference']}, batch {row['batch']}, {plan['processes']} processes of "
        f"{plan['pair_s']:g} s, blocks of {plan['block_s']:g} s"
    )


def run(
    numbers: Sequence[int],
    make: Callable[[], speed.Pair],
    plan: Plan,
    folder: Path,
    add: Callable[..., dict],
    say: Callable[[str], None],
) -> None:
    """Make these trials of the model that `make` gives, a row each; a failed one says so."""
    for number in numbers:
        kind, fields = trial(number, make, plan, folder=folder / "job", cache=folder / "cache")
        row = add(kind, **fields)
        say(
            f"trial {number}, {row['share']:.0%} planted: {row['verdict']}, ratio "
            f"{row['ratio'] or float('nan'):.3f}, {row['seconds']:.0f} s"
        )
        for path in (folder / "job").rglob("*.pt"):
            path.unlink()
