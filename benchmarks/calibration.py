"""How often the timing is wrong: the trials that were made, and the rates that they give.

They can be made in pieces, on several machines; every one that was made is kept.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import speed, trials
from experiments.study import rows as rows_file
from experiments.study.pages import Row, Table, machine
from vitx.measure import stats, worker
from vitx.measure.timing import PROTOCOL, TimingConfig
from vitx.training import provenance


def made(
    paths: Sequence[Path], plan: TimingConfig, *, reference: str, batch: int, device: torch.device
) -> list[Row]:
    """The trials in these files of rows that say the same of the same: made with this plan,
    protocol, model, batch and device by as many threads of as many cores, on whatever processor.

    Of a trial that was made twice the first counts, whatever it said.
    """
    rows = sorted(
        (row for path in paths for row in rows_file.read(path, cut=True)), key=rows_file.when
    )
    here = {"reference": reference, "batch": batch, "device": str(device), "plan": vars(plan),
            "protocol": PROTOCOL, "forked": worker.forks(device),
            "environment": provenance.environment()}  # fmt: skip
    wanted = [row for row in rows if row.get("what") == trials.WHAT and _kind(row) == _kind(here)]
    return rows_file.first(wanted, "trial")


def _kind(row: Mapping[str, Any]) -> str:
    """What trials share whose verdicts are counted together; the machine may be another."""
    said = [row[key] for key in ("plan", "reference", "batch", "device")]
    environment = [row["environment"].get(key) for key in ("threads", "affinity", "cores", "gpu")]
    versions = [row["environment"]["versions"][name] for name in ("torch", "timm")]
    return json.dumps(
        [
            *said,
            row["protocol"],
            row.get("forked", False),
            row.get("origin"),
            *versions,
            *environment,
        ]
    )


def table(rows: Sequence[Row]) -> Table:
    """How many of each kind were claimed to differ, with exact intervals, for each protocol.

    Where the trials of a protocol were made on several machines, those of each, then all.
    """
    header = ("planted", "work counted", "trials", "said slower", "said faster", "inconclusive",
              "failed", "rate (95 %, exact)", "seconds a trial", "settings", "protocol",
              "machine")  # fmt: skip
    body = []
    for once in _series(rows):
        groups = {where: [row for row in once if machine(row) == where]
                  for where in dict.fromkeys(map(machine, once))}  # fmt: skip
        if len(groups) > 1:
            groups["all of these"] = once
        for where, group in groups.items():
            for share in trials.COUNTS:
                planted = [row for row in group if row["share"] == share]
                if planted:
                    body.append((*_rates(planted), where))
    return Table(header, body)


def whole(rows: Sequence[Row]) -> list[Row]:
    """The trials of the latest series that has all of them; none if there is none."""
    planted = dict(enumerate(trials.shares()))
    made = [some for some in _series(rows)
            if {row["trial"]: row["share"] for row in some} == planted]  # fmt: skip
    return max(made, key=lambda some: max(map(rows_file.when, some)), default=[])


def summary(rows: Sequence[Row]) -> str:
    """The rates of a series in a line, with the batch and the machines."""
    machines = list(dict.fromkeys(map(machine, rows)))
    where = machines[0] if len(machines) == 1 else f"{len(machines)} machines"
    words = []
    for share in trials.COUNTS:
        some = [row for row in rows if row["share"] == share]
        count = _differing(some)
        rate = stats.proportion(count, len(some))
        found = f"{count} of {len(some)} ({rate.low:.0%} to {rate.high:.0%})"
        words.append(f"{share:.0%} more work: {found}" if share else f"false alarms: {found}")
    return f"batch {rows[0]['batch']}, on {where}: {'; '.join(words)}"


def _series(rows: Sequence[Row]) -> list[list[Row]]:
    """The trials of each protocol, plan, model and device; of one made twice the first."""
    by: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("what") == trials.WHAT:
            by.setdefault(_kind(row), []).append(row)
    return [rows_file.first(some, "trial") for some in by.values()]


def _differing(rows: Sequence[Row]) -> int:
    """How many trials of one kind were said to differ: where work was planted, to be slower."""
    words = ("slower",) if rows[0]["share"] else ("slower", "faster")
    return sum(row["verdict"] in words for row in rows)


def _rates(rows: Sequence[Row]) -> tuple[str, ...]:
    """The cells of the table for trials of one kind with the same planted share."""
    share, words = rows[0]["share"], [row["verdict"] for row in rows]
    what = "found" if share else "false alarms"
    rate = stats.proportion(_differing(rows), len(rows))
    seconds = [row["seconds"] for row in rows]
    counted = [row["planted_counted"] for row in rows if "planted_counted" in row]
    return (
        f"{share:.0%} more work" if share else "nothing",
        f"{min(counted):.2%} to {max(counted):.2%}" if counted else "–",
        f"{len(rows)} of {trials.COUNTS[share]}",
        str(words.count("slower")),
        str(words.count("faster")),
        str(words.count(stats.INCONCLUSIVE)),
        str(sum(row["kind"] == "failure" for row in rows)),
        f"{what}: {rate.value:.0%} ({rate.low:.0%} to {rate.high:.0%})",
        f"{statistics.median(seconds):.0f} (at most {max(seconds):.0f})",
        _settings(rows[0]),
        str(rows[0]["protocol"]),
    )


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
    plan: TimingConfig,
    folder: Path,
    add: Callable[..., dict],
    say: Callable[[str], None],
) -> None:
    """Make these trials of the model that `make` gives, a row each; a failed one says so."""
    for number in numbers:
        kind, fields = trials.trial(
            number, make, plan, folder=folder / "job", cache=folder / "cache"
        )
        row = add(kind, **fields)
        say(
            f"trial {number}, {row['share']:.0%} planted: {row['verdict']}, ratio "
            f"{row['ratio'] or float('nan'):.3f}, {row['seconds']:.0f} s"
        )
        for path in (folder / "job").rglob("*.pt"):
            path.unlink()
