"""How often the timing is wrong: the rates that the trials give."""

import statistics
from collections.abc import Hashable, Iterable, Sequence

from benchmarks.kinds import TRIALS, Trial, shares
from experiments.study.pages import Table, machine
from experiments.study.results import Result, first, of_kind
from vitx.measure import stats

HEADER = ("planted", "work counted", "trials", "slower", "faster", "inconclusive", "failed",
          "rate (95 %, exact)", "seconds per trial", "settings", "protocol",
          "machine")  # fmt: skip
SHORT = HEADER[:6] + HEADER[7:9]
"""Of the table of one series."""


def group(trial: Trial) -> Hashable:
    """What trials share whose verdicts are counted together; the machine may be another."""
    comparison, at = trial.comparison, trial.environment
    forked = all(process.forked for process in comparison.processes)
    return (comparison.config, trial.reference, comparison.batch, trial.device, trial.protocol,
            forked, trial.origin, at.versions.get("torch"), at.versions.get("timm"), at.threads,
            at.affinity, at.cores, at.gpu)  # fmt: skip


def table(results: Sequence[Result]) -> Table:
    """How many of each kind were claimed to differ, with exact intervals, for each protocol.

    Where the trials of a protocol were made on several machines, those of each, then all.
    """
    body = []
    for series in _series(results):
        places: dict[str, list[Trial]] = {}
        for trial in series:
            places.setdefault(machine(trial), []).append(trial)
        if len(places) > 1:
            places["all of these"] = series
        for where, trials in places.items():
            for share in TRIALS:
                planted = [trial for trial in trials if trial.planted == share]
                if planted:
                    body.append((*_cells(planted), where))
    return Table(HEADER, body)


def short_table(results: Sequence[Result]) -> Table:
    """The rates of the latest protocol whose trials were all made, over all machines."""
    series = complete(results)
    planted = [[trial for trial in series if trial.planted == share] for share in TRIALS]
    body = [_cells(trials)[:-1] for trials in planted if trials]
    kept = [HEADER.index(name) for name in SHORT]
    return Table(SHORT, [tuple(line[k] for k in kept) for line in body])


def complete(results: Iterable[Result]) -> list[Trial]:
    """The trials of the latest series that has all of them; none if there is none."""
    whole = [series for series in _series(results) if len(series) == len(shares())]
    return max(whole, key=lambda series: max(trial.when for trial in series), default=[])


def summary(trials: Sequence[Trial]) -> str:
    """The rates of a series in a line, with the batch and the machines."""
    machines = list(dict.fromkeys(map(machine, trials)))
    where = machines[0] if len(machines) == 1 else f"{len(machines)} machines"
    words = []
    for share in TRIALS:
        planted = [trial for trial in trials if trial.planted == share]
        rate = _rate(planted)
        text = f"{_differing(planted)} of {len(planted)} ({rate.low:.0%} to {rate.high:.0%})"
        words.append(f"{share:.0%} more work: {text}" if share else f"false alarms: {text}")
    return f"batch {trials[0].comparison.batch}, on {where}: {'; '.join(words)}"


def _series(results: Iterable[Result]) -> list[list[Trial]]:
    """The trials of each protocol, configuration, model and device; of one made twice the first."""
    groups: dict[Hashable, list[Trial]] = {}
    for trial in of_kind(results, Trial):
        groups.setdefault(group(trial), []).append(trial)
    return [first(trials, lambda trial: trial.trial) for trials in groups.values()]


def _differing(trials: Sequence[Trial]) -> int:
    """How many trials with one planted share saw a difference; where work was planted, a slower
    model."""
    words = ("slower",) if trials[0].planted else ("slower", "faster")
    return sum(trial.comparison.verdict in words for trial in trials)


def _rate(trials: Sequence[Trial]) -> stats.Interval:
    return stats.proportion(_differing(trials), len(trials))


def _cells(trials: Sequence[Trial]) -> tuple[str, ...]:
    """The cells of the table for trials with one planted share."""
    share, config = trials[0].planted, trials[0].comparison.config
    verdicts = [trial.comparison.verdict for trial in trials]
    counted = [trial.planted_counted for trial in trials]
    seconds = [trial.seconds for trial in trials]
    rate = _rate(trials)
    return (
        f"{share:.0%} more work" if share else "nothing",
        f"{min(counted):.2%} to {max(counted):.2%}",
        f"{len(trials)} of {TRIALS[share]}",
        *(str(verdicts.count(word)) for word in ("slower", "faster", stats.INCONCLUSIVE, "failed")),
        f"{'found' if share else 'false alarms'}: {rate.value:.0%} "
        f"({rate.low:.0%} to {rate.high:.0%})",
        f"{statistics.median(seconds):.0f} (at most {max(seconds):.0f})",
        f"{trials[0].reference}, batch {trials[0].comparison.batch}, {config.processes} processes "
        f"of {config.pair_s:g} s, blocks of {config.block_s:g} s",
        str(trials[0].protocol),
    )
