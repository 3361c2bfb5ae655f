"""Figures of throughput rows, and files of tables and figures.

There is one figure of a kind for each setting, mode, dtype and reference. A model has one colour in
all of them.
"""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.report import matrix, plots
from benchmarks.report.matrix import Entry, Rendering, how
from experiments.study.pages import Row
from vitx.measure import stats
from vitx.measure.timing import COMPILES


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Every figure that the rows support, by a name that says what it shows."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in matrix.entries(rows):
        row = entry.row
        if row["kind"] == "speed":
            group = (row["mode"], row["dtype"], entry.reference, matrix.setting(row))
            groups.setdefault(group, []).append(entry)
    names = sorted({entry.name for some in groups.values() for entry in some})
    colours = plots.colours(names)
    found = {}
    for group, some in groups.items():
        mode, dtype, reference, where = group
        beside = f"beside {reference}" if reference else "timed alone"
        title = f"{mode}, {dtype}, {beside}: {where}"
        model = re.sub(r"[^A-Za-z0-9_]+", "-", some[0].row["reference"] or "alone")
        end = f"{model}-{mode}-{dtype}-{matrix.short(str(group))}"
        for kind, draw in DRAWN.items():
            drawn = draw(some, colours, title)
            if drawn is not None:
                found[f"{kind}-{end}"] = drawn
    return found


def _throughput(entries: Sequence[Entry], colours: Mapping[str, str], title: str) -> Figure:
    lines: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        lines.setdefault((entry.name, entry.row["compile"]), []).append(entry)
    drawn = []
    for (name, compiled), some in lines.items():
        runs = ", range of its runs" if any(entry.runs for entry in some) else ""
        points = sorted((entry.row["batch"], *entry.rate()) for entry in some)
        drawn.append(plots.Line(f"{name}, {how(compiled)}{runs}", points, colours[name],
                                    style=COMPILES.index(compiled)))  # fmt: skip
    paired = any(entry.row["ratio"] is not None for entry in entries)
    label = "images/s: the reference's × ratio" if paired else "images/s"
    return plots.rates(drawn, label=label, title=title)


def _ratios(entries: Sequence[Entry], colours: Mapping[str, str], title: str) -> Figure | None:
    bars = []
    for entry in entries:
        row = entry.row
        if entry.side == "candidate" and row["ratio_low"] is not None:
            label = f"{entry.label}{_limits(entry)}"
            ends = row["ratio_low"], row["ratio_high"], row["noise_floor"]
            bars.append(plots.Bar(label, row["ratio"], *ends, colour=colours[entry.name]))
    label = f"images/s over those of {entries[0].reference}"
    return plots.ratios(bars, title=title, label=label) if bars else None


def _limits(entry: Entry) -> str:
    """What limits a ratio, in a line below its label."""
    row, said = entry.row, []
    if not entry.checked:
        macs = row["macs"]
        known = all(macs.get(side) for side in matrix.SIDES)
        work = f", {macs['candidate'] / macs['reference']:.3f}× the MACs" if known else ""
        said.append(f"not checked{work}")
    if row["verdict"] == stats.INCONCLUSIVE:
        said.append(stats.INCONCLUSIVE)
    return "\n" + ", ".join(said) if said else ""


def _roofline(entries: Sequence[Entry], colours: Mapping[str, str], title: str) -> Figure | None:
    """Not of compiled models: fused operations read and write less than is counted."""
    spots, found = [], []
    for entry in entries:
        timed = [(used, row["images_per_s"][entry.side]["median"]) for row in entry.rows
                 if (used := row["utilisation"].get(entry.side, {})).get("bytes")]  # fmt: skip
        if timed and entry.row["compile"] == "none":
            found += [used for used, _ in timed]
            used, images_per_s = timed[-1]
            flops = used["flops"] / images_per_s * entry.rate()[0]
            batch, colour = str(entry.row["batch"]), colours[entry.name]
            intensity = used["flops"] / used["bytes"]
            spots.append(plots.Spot(entry.name, batch, colour, intensity, flops))
    if not spots:
        return None
    return plots.roofline(
        spots,
        peak=max(used["peak_high"] for used in found),
        bandwidth=max(used["bandwidth"] for used in found),
        title=title,
    )


def _latency(entries: Sequence[Entry], colours: Mapping[str, str], title: str) -> Figure | None:
    lines = []
    for entry in entries:
        if found := entry.of("latency"):
            runs = f", {entry.runs}" if entry.runs else ""
            spans = {
                name: matrix.interval_of([one[name] for one in found]) for name in matrix.QUANTILES
            }
            label = f"{entry.name}, {how(entry.row['compile'])}{runs}"
            lines.append((label, colours[entry.name], spans))
    return plots.latencies(lines, title=title) if lines else None


def _memory(entries: Sequence[Entry], colours: Mapping[str, str], title: str) -> Figure | None:
    bars = []
    for entry in entries:
        if found := [float(mib) for mib in entry.of("peak_mib")]:
            more = " (with compiling)" if entry.row["compile"] != "none" else ""
            ends = statistics.median(found), min(found), max(found)
            bars.append(plots.Bar(f"{entry.label}{more}", *ends, colour=colours[entry.name]))
    where = "the process" if entries[0].row["device"].startswith("cpu") else "the device"
    label = f"peak MiB of {where}\nof several runs median and range"
    return plots.amounts(bars, label=label, title=title) if bars else None


Drawing = Callable[[Sequence[Entry], Mapping[str, str], str], Figure | None]
DRAWN: dict[str, Drawing] = {
    "throughput": _throughput,
    "ratios": _ratios,
    "roofline": _roofline,
    "latency": _latency,
    "memory": _memory,
}


def write(
    rows: Sequence[Row],
    folder: Path,
    *,
    tables: Mapping[str, Rendering] = matrix.TABLES,
    pictures: str = ".svg",
) -> list[Path]:
    """Every table as markdown and CSV, every figure as SVG or PNG; the paths.

    `measurements.csv` holds the numbers of throughput rows with all their digits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, table in tables.items():
        shown = table(rows)
        if not shown.body:
            continue
        paths.append(folder / f"{name}.md")
        paths[-1].write_text(shown.markdown() + "\n", encoding="utf8")
        paths.append(folder / f"{name}.csv")
        shown.write_csv(paths[-1])
    if matrix.cells(rows):
        paths.append(folder / "measurements.csv")
        matrix.write_csv(rows, paths[-1])
    for name, figure in figures(rows).items():
        paths.append(pictures.save(figure, folder / f"{name}{pictures}"))
    return paths
