"""Tables of throughput results: ratios, rates, costs, latency, stages, what compiling saves."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from benchmarks.kinds import CHECKED, PHASES, Throughput
from benchmarks.report.entries import (
    AUTO,
    Entry,
    cells,
    commit,
    entries,
    how,
    setting,
    settings,
)
from experiments.study.pages import Columns, Table, floor_text, interval_text, ratio_text, table
from experiments.study.results import Result
from vitx.measure import stats
from vitx.measure.breakdown import STAGES
from vitx.measure.comparison import Comparison, Latency, Side
from vitx.measure.stats import Interval
from vitx.measure.timing import COMPILES

QUANTILES = ("p50", "p90", "p99")
"""Of the seconds of single calls."""
MOST_REMAINDER = 0.05
"""Share of a call beyond which what belongs to no stage is marked."""
UNKNOWN_STAGES = "its modules do not have timm's names"
State = Literal["cold", "warm"]
"""Of the cache of compiled code."""


def _batch(entry: Entry) -> str:
    """The batch, and whether it is the model's best one."""
    if entry.side == "reference" or entry.result.batch_asked != AUTO:
        return str(entry.batch)
    return f"{entry.batch} ({AUTO})" if entry.batch else AUTO


START: Columns = {
    "setting": lambda entry: str(entry.place),
    "mode": lambda entry: entry.result.comparison.config.mode,
    "dtype": lambda entry: entry.result.comparison.dtype,
    "compile": lambda entry: entry.compile,
    "batch": _batch,
    "model": lambda entry: entry.name,
}
"""The columns that say which model in which configuration a line is of."""


def timed(results: Sequence[Result]) -> list[Entry]:
    """The entries that have something to show."""
    return [entry for entry in entries(results) if not entry.result.untimed]


def settings_table(results: Sequence[Result]) -> Table:
    """What results of a setting share, and the commits that they were made by."""
    body = []
    of_setting: dict[str, list[Throughput]] = {where: [] for where in settings(results)}
    for cell in cells(results):
        of_setting[setting(cell)].append(cell)
    for number, (where, here) in enumerate(of_setting.items(), 1):
        commits = ", ".join(dict.fromkeys(map(commit, here)))
        body.append((str(number), str(len(here)), commits, where))
    return Table(("setting", "results", "commits", "machine, process and protocol"), body)


def summary_table(results: Sequence[Result]) -> Table:
    """Ratios to the reference: a line per model, a column for each batch and compile mode."""
    columns: dict[tuple[int, int, str], str] = {}
    lines: dict[tuple[str, ...], dict[tuple[int, int, str], str]] = {}
    for entry in entries(results):
        if entry.side == "reference" or not entry.reference:
            continue
        column = COMPILES.index(entry.compile), entry.batch, _batch(entry)
        columns[column] = f"batch {_batch(entry)}, {how(entry.compile)}"
        place, mode, dtype, *_ = (cell(entry) for cell in START.values())
        line = lines.setdefault((place, mode, dtype, entry.reference, entry.name), {})
        line[column] = _summary(entry)
    ordered = sorted(columns)
    body = [
        (*line, *(texts.get(column, "–") for column in ordered)) for line, texts in lines.items()
    ]
    header = ("setting", "mode", "dtype", "reference", "model")
    return Table((*header, *(columns[column] for column in ordered)), body)


def _summary(entry: Entry) -> str:
    """The ratio with its interval, and what limits it."""
    comparison = entry.result.comparison
    if entry.result.untimed:
        return comparison.verdict
    plain = entry.checked and comparison.verdict in ("faster", "slower")
    if comparison.floor is None or plain:
        return ratio_text(comparison)
    return f"{ratio_text(comparison)}, {verdict(entry.result)}"


def verdict(result: Throughput) -> str:
    """What may be said of a ratio: of models whose outputs were not checked, which may compute
    something else, neither faster nor slower."""
    comparison = result.comparison
    if comparison.ratio is None or result.checked == CHECKED:
        return comparison.verdict
    inconclusive = comparison.verdict == stats.INCONCLUSIVE
    return "not checked" + (f", {stats.INCONCLUSIVE}" if inconclusive else "")


def throughput_table(results: Sequence[Result]) -> Table:
    """Each model in each configuration: its rate, and its ratio to the reference; failures too."""
    header = (*START, "images/s (range of runs, or by ratio)", "reference", "ratio (95 %)", "floor",
              "verdict", "outputs")  # fmt: skip
    body = []
    for entry in entries(results):
        comparison: Comparison = entry.result.comparison
        start = tuple(cell(entry) for cell in START.values())
        beside = entry.reference or "–"
        reason = f": {comparison.reason}" if comparison.reason else ""
        if entry.result.untimed:
            body.append((*start, "–", beside, "–", "–", comparison.verdict + reason, "–"))
        elif entry.side == "reference":
            runs = f"reference, {entry.runs}" if entry.runs else "reference"
            body.append((*start, _rate(entry), "–", "–", "–", runs, "–"))
        else:
            ratio = ratio_text(comparison) if comparison.ratio else "–"
            judged = verdict(entry.result) + reason
            body.append((*start, _rate(entry), beside, ratio, floor_text(comparison), judged,
                         entry.result.checked))  # fmt: skip
    return Table(header, body)


def _rate(entry: Entry) -> str:
    """A rate with its ends; those of a single run, over processes, say nothing of other runs."""
    rate = entry.rate()
    if not entry.has_range:
        return f"{rate.value:,.1f} (one process)"
    run = "" if entry.beside or entry.runs else ", within a run"
    return f"{rate.value:,.1f} ({rate.low:,.1f} to {rate.high:,.1f}{run})"


def spread(values: Sequence[float], form: str) -> str:
    """The median of several values with their range, one value as it is, a dash for none."""
    if not values:
        return "–"
    middle, low, high = (form.format(of(values)) for of in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def cost_table(results: Sequence[Result]) -> Table:
    """What each model costs: work, parameters, memory, compiling, and how near the peak it runs.

    Of a reference's several runs the median and the range.
    """

    def macs(entry: Entry) -> str:
        return spread([macs / 1e9 for macs in entry.values(lambda side: side.macs)], "{:.3f}")

    def compiling(state: State) -> Callable[[Entry], str]:
        def cell(entry: Entry) -> str:
            seconds = entry.values(lambda side: side.compile_s)
            return spread([getattr(each, state) for each in seconds], "{:.0f}")

        return cell

    columns: Columns = {
        "GMAC per image, forward": macs,
        "parameters": lambda entry: spread(entry.values(lambda side: side.parameters), "{:,.0f}"),
        "peak MiB": _memory,
        "compile s cold": compiling("cold"),
        "compile s warm": compiling("warm"),
        "MFU, in its own run": _utilisation,
        "peak TFLOP/s": _peak,
    }
    return table(timed(results), START | columns)


def _memory(entry: Entry) -> str:
    """Peak memory, of a GPU's run that of the host too, and what is included."""
    peak = spread(entry.values(lambda side: side.peak_mib), "{:.0f}")
    host = spread(entry.values(lambda side: side.host_mib), ", host {:.0f}")
    compiled = entry.values(lambda side: side.compile_s) and peak != "–"
    return peak + host.removeprefix("–") + (", compiling included" if compiled else "")


def _utilisation(entry: Entry) -> str:
    """The share of the fastest product's rate, or why there is none."""
    used = entry.values(lambda side: side.utilisation)
    shares = [each.mfu for each in used if each.mfu is not None]
    if not shares:
        return used[-1].why if used else "–"
    steady = f", {len(shares)} of {len(used)} runs steady" if len(shares) < len(used) else ""
    return spread(shares, "{:.0%}") + steady


def _peak(entry: Entry) -> str:
    """The rate of the fastest product, over all runs, and the data sheet's."""
    used = entry.values(lambda side: side.utilisation)
    if not used:
        return "–"
    low, high = min(each.peak_low for each in used), max(each.peak_high for each in used)
    sheet = used[-1].data_sheet
    known = f", data sheet {sheet / 1e12:.3g}" if sheet else ""
    return f"{low / 1e12:.3g} to {high / 1e12:.3g}{known}"


def break_even_table(results: Sequence[Result]) -> Table:
    """Images after which compiling has paid for itself: its seconds over what it saves per image,
    from pairs of blocks of the same model, compiled and not, in one process.

    The images' ends are those of what is saved; where they do not tell, nor does the table. Of a
    reference's several runs the median and the range.
    """
    ends = "ms per image (95 % in one process, or range of runs)"
    header = (*START, f"saved {ends}", "cold: images", "warm: images")
    body = []
    for entry in timed(results):
        both = entry.values(lambda side: (side.saved, side.compile_s) if side.saved else None)
        pairs = [(saved.seconds, seconds) for saved, seconds in both if saved and seconds]
        if not pairs:
            continue
        saved = pooled([each for each, _ in pairs])
        if saved.high <= 0:
            images = ["never"] * 2
        elif saved.low <= 0:
            images = ["not told apart"] * 2
        else:
            cold = statistics.median(seconds.cold for _, seconds in pairs)
            warm = statistics.median(seconds.warm for _, seconds in pairs)
            images = [
                f"{s / saved.value:,.0f} ({s / saved.high:,.0f} to {s / saved.low:,.0f})"
                for s in (cold, warm)
            ]
        start = tuple(cell(entry) for cell in START.values())
        body.append((*start, interval_text(_ms(saved), "+.3f"), *images))
    return Table(header, body)


def _ms(seconds: Interval) -> Interval:
    return Interval(1e3 * seconds.value, 1e3 * seconds.low, 1e3 * seconds.high)


def pooled(intervals: Sequence[Interval]) -> Interval:
    """A value with its interval; of several runs the median and the range."""
    if len(intervals) == 1:
        return intervals[0]
    values = [interval.value for interval in intervals]
    return Interval(statistics.median(values), min(values), max(values))


def latency_table(results: Sequence[Result]) -> Table:
    """Milliseconds of single calls with one image, each waited for, in one process: its intervals
    say nothing of other processes. Of a reference's several runs the median and the range."""

    def calls(entry: Entry) -> str:
        count = spread([each.calls for each in _latencies(entry)], "{:,.0f}")
        return count + (f", {entry.runs}" if entry.runs else "")

    def quantile(name: str) -> Callable[[Entry], str]:
        def cell(entry: Entry) -> str:
            intervals = [getattr(latency, name) for latency in _latencies(entry)]
            return interval_text(_ms(pooled(intervals)), ".2f")

        return cell

    ends = "ms (95 %, or range of runs)"
    columns = {"calls of one process": calls}
    columns |= {f"{name} {ends}": quantile(name) for name in QUANTILES}
    return table([entry for entry in timed(results) if _latencies(entry)], START | columns)


def _latencies(entry: Entry) -> list[Latency]:
    return entry.values(lambda side: side.latency)


def stage_table(results: Sequence[Result]) -> Table:
    """Where an eager inference call spends its time, as shares of the sum of its stages, which are
    waited for one by one."""

    def sums(entry: Entry) -> str:
        return _sums(_stages(entry)) if _stages(entry) else UNKNOWN_STAGES

    def share(name: str) -> Callable[[Entry], str]:
        def cell(entry: Entry) -> str:
            if not _stages(entry):
                return "–"
            part = _share(_stages(entry), name)
            marked = name == "remainder" and abs(part) > MOST_REMAINDER
            return f"{part:.1%}" + (f", above {MOST_REMAINDER:.0%}" if marked else "")

        return cell

    shown = [entry for entry in timed(results) if _stages(entry) or _stages_unknown(entry)]
    columns = {"sum of stages ms": sums} | {name: share(name) for name in STAGES}
    return table(shown, START | columns)


def _stages(entry: Entry) -> list[dict[str, float]]:
    return entry.values(lambda side: side.stages)


def _stages_unknown(entry: Entry) -> bool:
    """Whether stages were looked for and are not known."""
    config = entry.result.comparison.config
    return config.mode == "inference" and config.compile == "none" and config.details


def phase_table(results: Sequence[Result]) -> Table:
    """Where an eager training step spends its time, as shares of the sum of its phases."""

    def phases(entry: Entry) -> list[dict[str, float]]:
        return entry.values(lambda side: side.phases)

    def share(name: str) -> Callable[[Entry], str]:
        return lambda entry: f"{_share(phases(entry), name):.1%}"

    columns: Columns = {"sum of phases ms": lambda entry: _sums(phases(entry))}
    shares = {name: share(name) for name in PHASES}
    return table([entry for entry in timed(results) if phases(entry)], START | columns | shares)


def _sums(parts: Sequence[Mapping[str, float]]) -> str:
    return spread([1e3 * sum(each.values()) for each in parts], "{:.1f}")


def _share(parts: Sequence[Mapping[str, float]], name: str) -> float:
    """A part's share of the whole; of several runs the median."""
    return statistics.median(each[name] / sum(each.values()) for each in parts)


def mean_table(results: Sequence[Result]) -> Table:
    """Rates by this protocol, and as timm's benchmark reports them: a mean of one process. Of a
    reference's several runs the median and the range."""

    def both(side: Side) -> tuple[float, float] | None:
        if side.rate is None or not side.mean_images_per_s:
            return None
        return side.rate.mean.value if side.rate.mean else side.rate.median, side.mean_images_per_s

    def cell(of: Callable[[float, float], float], form: str) -> Callable[[Entry], str]:
        return lambda entry: spread(list(itertools.starmap(of, entry.values(both))), form)

    columns: Columns = {
        "images/s over processes": cell(lambda rate, _: rate, "{:,.1f}"),
        "images/s, mean of 40 calls": cell(lambda _, mean: mean, "{:,.1f}"),
        "apart, in the same run": cell(lambda rate, mean: mean / rate - 1, "{:+.1%}"),
    }
    return table([entry for entry in timed(results) if entry.values(both)], START | columns)


TABLES: dict[str, Callable[[Sequence[Result]], Table]] = {
    "throughput-settings": settings_table,
    "throughput-ratios": summary_table,
    "throughput": throughput_table,
    "throughput-costs": cost_table,
    "latency": latency_table,
    "stages": stage_table,
    "phases": phase_table,
    "break-even": break_even_table,
    "means": mean_table,
}
