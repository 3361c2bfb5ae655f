"""Charts of throughput results, and files of tables and charts.

There is one chart of a kind for each setting, mode, dtype and reference. A model has one colour in
all of them.
"""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.report import entries, plots
from benchmarks.report.entries import Entry, how, write_csv
from benchmarks.report.tables import size_name
from benchmarks.report.throughput import pooled, timed
from experiments.study.pages import Table, machine
from experiments.study.results import Result
from vitx import pictures
from vitx.files import warn_once
from vitx.measure import stats
from vitx.measure.comparison import Latency, Utilisation
from vitx.measure.stats import Interval
from vitx.measure.timing import COMPILES

Colours = Mapping[str, str]
MOST_GROUPS, MOST_ENTRIES = 100, 100


def charts(results: Sequence[Result]) -> dict[str, Figure]:
    """Every chart that the results support, by a name that says what it shows.

    Of more settings than MOST_GROUPS, and of a setting with more entries than MOST_ENTRIES, there
    are tables only: a chart could not be read.
    """
    groups: dict[Hashable, list[Entry]] = {}
    for entry in timed(results):
        comparison = entry.result.comparison
        group = (comparison.config.mode, comparison.dtype, entry.reference, entry.place)
        groups.setdefault(group, []).append(entry)
    few = [group for group in groups.values() if len(group) <= MOST_ENTRIES][:MOST_GROUPS]
    if len(few) < len(groups):
        warn_once(f"charts show {len(few)} of {len(groups)} settings; the tables have all")
    colours = plots.colours(sorted({entry.name for group in few for entry in group}))
    drawn: dict[str, Figure] = {}
    numbers: Counter[str] = Counter()
    for group in few:
        title, name = _title(group[0]), _name(group[0])
        numbers[name] += 1
        number = numbers[name]
        for kind, draw in DRAWN.items():
            chart = draw(group, colours, title)
            if chart is not None:
                drawn[f"{kind}-{_numbered(name, number)}"] = chart
    return drawn


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _name(entry: Entry) -> str:
    """What the charts of an entry's group are of, as a part of file names."""
    comparison = entry.result.comparison
    model = size_name(entry.result.reference.rpartition(":")[2]) or "alone"
    dtype = "" if comparison.dtype == "float32" else f"-{comparison.dtype}"
    return re.sub(r"[^A-Za-z0-9_-]+", "-", f"{model}-{comparison.config.mode}{dtype}")


def _title(entry: Entry) -> str:
    comparison = entry.result.comparison
    beside = f"beside {entry.reference}" if entry.reference else "timed alone"
    mode = comparison.config.mode.capitalize()
    return f"{mode} in {comparison.dtype}, {beside}\n{machine(entry.result)}, setting {entry.place}"


def _throughput(group: Sequence[Entry], colours: Colours, title: str) -> Figure:
    by_line: dict[tuple[str, str], list[Entry]] = {}
    for entry in group:
        by_line.setdefault((entry.name, entry.compile), []).append(entry)
    lines = []
    for (name, compiled), line in by_line.items():
        runs = ", range of its runs" if any(entry.runs for entry in line) else ""
        rates = {entry.batch: entry.rate() for entry in line}
        label, style = f"{name}, {how(compiled)}{runs}", COMPILES.index(compiled)
        lines.append(plots.Line(label, rates, colours[name], style))
    paired = any(entry.result.comparison.ratio for entry in group)
    note = "of a model beside the reference: its ratio × the reference's rate" if paired else ""
    return plots.rates(lines, note=note, title=title)


def _ratios(group: Sequence[Entry], colours: Colours, title: str) -> Figure | None:
    bars = []
    for entry in group:
        comparison = entry.result.comparison
        if entry.side == "candidate" and comparison.ratio and comparison.floor is not None:
            label = f"{entry.label}{_limits(entry)}"
            colour = colours[entry.name]
            bars.append(plots.Bar(label, comparison.ratio, comparison.floor, colour))
    label = f"images per second over those of\n{group[0].reference}"
    return plots.ratios(bars, title=title, label=label) if bars else None


def _limits(entry: Entry) -> str:
    """What limits a ratio, in a line below its label."""
    comparison, words = entry.result.comparison, []
    if not entry.checked:
        macs = [side and side.macs for side in (comparison.candidate, comparison.reference)]
        work = f", {macs[0] / macs[1]:.3f}× the MACs" if macs[0] and macs[1] else ""
        words.append(f"not checked{work}")
    if comparison.verdict == stats.INCONCLUSIVE:
        words.append(stats.INCONCLUSIVE)
    return "\n" + ", ".join(words) if words else ""


def _roofline(group: Sequence[Entry], colours: Colours, title: str) -> Figure | None:
    """Not of compiled models: fused operations read and write less than is counted."""
    spots: list[plots.Spot] = []
    everything: list[Utilisation] = []
    for entry in group:
        counted = [
            (side.utilisation, side.utilisation.bytes, side.rate.median) for side in entry.sides
            if side.utilisation and side.utilisation.bytes and side.rate
        ]  # fmt: skip
        if counted and entry.compile == "none":
            everything += [used for used, *_ in counted]
            used, read, images_per_s = counted[-1]
            flops = used.flops / images_per_s * entry.rate().value
            note, colour = str(entry.batch), colours[entry.name]
            spots.append(plots.Spot(entry.name, note, colour, used.flops / read, flops))
    if not spots:
        return None
    return plots.roofline(
        spots,
        peak=max(used.peak_high for used in everything),
        bandwidth=max(used.bandwidth for used in everything),
        title=title,
    )


def _latency(group: Sequence[Entry], colours: Colours, title: str) -> Figure | None:
    models = []
    for entry in group:
        if every := entry.values(lambda side: side.latency):
            runs = f", {entry.runs}" if entry.runs else ""
            p50, p90, p99 = (
                pooled([getattr(latency, name) for latency in every])
                for name in ("p50", "p90", "p99")
            )
            label = f"{entry.name}, {how(entry.compile)}{runs}"
            models.append((label, colours[entry.name], Latency(every[-1].calls, p50, p90, p99)))
    return plots.latencies(models, title=title) if models else None


def _memory(group: Sequence[Entry], colours: Colours, title: str) -> Figure | None:
    bars = []
    for entry in group:
        if peaks := entry.values(lambda side: side.peak_mib):
            value = Interval(statistics.median(peaks), min(peaks), max(peaks))
            bars.append(plots.Bar(entry.label, value, colour=colours[entry.name]))
    where = "the process" if group[0].result.device.startswith("cpu") else "the device"
    label = f"peak MiB of {where}, compiling included\nof several runs median and range"
    return plots.amounts(bars, label=label, title=title) if bars else None


DRAWN: dict[str, Callable[[Sequence[Entry], Colours, str], Figure | None]] = {
    "throughput": _throughput,
    "ratios": _ratios,
    "roofline": _roofline,
    "latency": _latency,
    "memory": _memory,
}


def write(
    results: Sequence[Result],
    folder: Path,
    *,
    tables: Mapping[str, Callable[[Sequence[Result]], Table]],
    ending: str = ".svg",
) -> list[Path]:
    """Every table as markdown and CSV, every chart as SVG or PNG; the paths.

    `measurements.csv` holds the numbers of throughput results with all their digits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, table in tables.items():
        shown = table(results)
        if not shown.body:
            continue
        paths += [folder / f"{name}.md", folder / f"{name}.csv"]
        paths[-2].write_text(shown.markdown() + "\n", encoding="utf8")
        shown.write_csv(paths[-1])
    if entries.cells(results):
        paths.append(folder / "measurements.csv")
        write_csv(results, paths[-1])
    for name, chart in charts(results).items():
        paths.append(pictures.save(chart, folder / f"{name}{ending}"))
    return paths
