"""Charts of rates, ratios, memory and accuracies. Each draws plain values and returns a figure."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, PercentFormatter

from vitx.pictures import COLOURS, CYCLE, GREY, _above, canvas

MORE = tuple(to_hex(colour) for colour in colormaps["tab20"].colors)  # type: ignore[attr-defined]
MARKS, DASHES = "os^Dv<>", ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Bar:
    """A value with its interval, and of a ratio with its noise floor, where known."""

    label: str
    value: float
    low: float | None
    high: float | None
    floor: float | None = None
    colour: str = COLOURS["vitx"]


@dataclass(frozen=True)
class Line:
    """Rates of a model: (batch, rate, low, high). Styles above 0 are dashed, with open marks."""

    label: str
    points: Sequence[tuple[int, float, float, float]]
    colour: str
    style: int = 0


@dataclass(frozen=True)
class Spot:
    """A point of a roofline: FLOP a byte and FLOP/s. Those of a label look alike."""

    label: str
    note: str
    colour: str
    intensity: float
    flops: float


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each model: the first of a library (the word before the colon) has that of the
    library, if it has one. Beyond 27 models colours come again."""
    found: dict[str, str] = {}
    for name in names:
        own = COLOURS.get(name.partition(":")[0])
        if own and own not in found.values():
            found[name] = own
    more = [colour for colour in (*CYCLE, *MORE) if colour not in COLOURS.values()]
    rest = (name for name in names if name not in found)
    return found | dict(zip(rest, itertools.cycle(more), strict=False))


def ratios(
    bars: Sequence[Bar], *, title: str, label: str = "images/s of vitx over timm's"
) -> Figure:
    """Speed ratios with 95 % intervals; the grey band around 1 is each comparison's noise floor."""
    heights = [0.26 + 0.13 * bar.label.count("\n") for bar in bars]
    figure, axes = canvas(7.2, 1.2 + sum(heights))
    rows = _rows(heights)
    for row, height, bar in zip(rows, heights, bars, strict=True):
        if bar.floor is not None:
            axes.fill_betweenx([row - 0.45 * height, row + 0.45 * height], 1 / (1 + bar.floor),
                               1 + bar.floor, color="#DDDDDD", lw=0)  # fmt: skip
        low, high = bar.low or bar.value, bar.high or bar.value
        span = [[bar.value - low], [high - bar.value]]
        axes.errorbar(bar.value, row, xerr=span, fmt="o", ms=5, color=bar.colour, capsize=3)
        axes.annotate(f"{bar.value:.3f}", (high, row), (5, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axes.axvline(1, color=GREY, lw=0.8)
    axes.set_yticks(rows, [bar.label for bar in bars], fontsize=8)
    axes.set_ylim(0, sum(heights))
    axes.margins(x=0.18)
    axes.set_xlabel(f"{label}\n95 % interval; grey: noise floor")
    _above(figure, title)
    return figure


def _rows(heights: Sequence[float]) -> list[float]:
    """Middles of lines of these heights, the first on top."""
    whole = sum(heights)
    ends = itertools.accumulate(heights)
    return [whole - end + height / 2 for end, height in zip(ends, heights, strict=True)]


def rates(lines: Sequence[Line], *, label: str, title: str) -> Figure:
    """Images/s against the batch, with a band for the interval."""
    figure, axes = canvas(7.2, 3.4 + 0.08 * len(lines))
    for line in lines:
        batch, value, low, high = zip(*line.points, strict=True)
        axes.fill_between(batch, low, high, color=line.colour, alpha=0.25, lw=0)
        axes.errorbar(batch, value, yerr=[np.subtract(value, low), np.subtract(high, value)],
                      color=line.colour, marker=MARKS[line.style], ms=4, lw=1.2, capsize=2,
                      ls=DASHES[line.style], label=line.label,
                      mfc="white" if line.style else line.colour)  # fmt: skip
    batches = sorted({batch for line in lines for batch, *_ in line.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images a batch; bands: 95 % interval, or what the legend says")
    axes.set_ylabel(label)
    _above(figure, title)
    figure.legend(frameon=False, fontsize=7, ncols=2, loc="outside lower left")
    return figure


def roofline(spots: Sequence[Spot], *, peak: float, bandwidth: float, title: str) -> Figure:
    """FLOP/s against FLOP a byte, under what the machine's memory and products allow."""
    figure, axes = canvas(7.2, 3.8)
    ridge, reach = peak / bandwidth, [spot.intensity for spot in spots]
    ends = [min(ridge, *reach) / 4, max(ridge, *reach) * 4]
    axes.plot([ends[0], ridge, ends[1]], [ends[0] * bandwidth / 1e9, peak / 1e9, peak / 1e9],
              color=GREY, lw=1)  # fmt: skip
    labels = list(dict.fromkeys(spot.label for spot in spots))
    for spot in spots:
        number = labels.index(spot.label)
        place = (spot.intensity, spot.flops / 1e9)
        axes.plot(*place, MARKS[number % len(MARKS)], ms=5, alpha=0.8, color=spot.colour)
        side = -12 if number % 2 else 7
        axes.annotate(spot.note, place, (side, -3), textcoords="offset points", fontsize=7)
    for number, label in enumerate(labels):
        colour = next(spot.colour for spot in spots if spot.label == label)
        axes.plot([], [], MARKS[number % len(MARKS)], ms=5, color=colour, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter())
    axes.set_xlabel("FLOP a byte that operations read and write; numbers: images a batch")
    axes.set_ylabel("GFLOP/s")
    _above(figure, f"{title}; peaks {peak / 1e9:,.0f} GFLOP/s, {bandwidth / 1e9:,.0f} GB/s")
    figure.legend(frameon=False, fontsize=7, ncols=3, loc="outside lower left")
    return figure


def latencies(
    models: Sequence[tuple[str, str, Mapping[str, tuple[float, float, float]]]], *, title: str
) -> Figure:
    """Quantiles of single calls in seconds, a line a model: value and the ends of its interval.

    A model is its label, its colour, and its quantiles by name.
    """
    figure, axes = canvas(7.2, 1.3 + 0.36 * len(models))
    rows = range(len(models))[::-1]
    for number, name in enumerate(("p50", "p90", "p99")):
        for row, (_, colour, found) in zip(rows, models, strict=True):
            value, low, high = (1e3 * each for each in found[name])
            place = row + 0.2 * (1 - number)
            axes.errorbar(value, place, xerr=[[value - low], [high - value]], fmt=MARKS[number],
                          ms=4, color=colour, capsize=2)  # fmt: skip
        axes.plot([], [], MARKS[number], ms=4, color=GREY, label=name)
    axes.set_yticks(list(rows), [label for label, *_ in models], fontsize=8)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms of a call with one image\n95 % interval; of several runs median and range")
    _above(figure, title)
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower left")
    return figure


def amounts(bars: Sequence[Bar], *, label: str, title: str) -> Figure:
    """A bar each, with its value."""
    figure, axes = canvas(7.2, 1.1 + 0.26 * len(bars))
    rows = range(len(bars))[::-1]
    for row, bar in zip(rows, bars, strict=True):
        low, high = bar.low or bar.value, bar.high or bar.value
        span = [[bar.value - low], [high - bar.value]]
        axes.barh(row, bar.value, color=bar.colour, height=0.6)
        if low < high:
            axes.errorbar(bar.value, row, xerr=span, color="black", capsize=2, lw=1)
        axes.annotate(f"{bar.value:,.0f}", (high, row), (4, 0), textcoords="offset points",
                      va="center", fontsize=7)  # fmt: skip
    axes.set_yticks(list(rows), [bar.label for bar in bars], fontsize=8)
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.margins(x=0.15)
    axes.set_xlabel(label)
    _above(figure, title)
    return figure


def accuracies(
    values: Mapping[str, Sequence[float]], *, reading: float | None, label: str
) -> Figure:
    """One dot a seed for each side, the mean as a bar, and a further reading as a dashed line."""
    figure, axes = canvas(5.2, 1.9)
    for row, (side, found) in enumerate(values.items()):
        jitter = np.linspace(-0.18, 0.18, len(found))
        filled = COLOURS[side] if side == "vitx" else "none"
        axes.scatter(found, row + jitter, edgecolor=COLOURS[side], facecolor=filled, s=22)
        axes.plot([np.mean(found)] * 2, [row - 0.35, row + 0.35], color=COLOURS[side], lw=2)
    if reading is not None:
        axes.axvline(reading, color=GREY, ls="--", lw=0.9)
        axes.annotate(
            label, (reading, len(values) - 0.45), (3, 0), textcoords="offset points", fontsize=8
        )
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(-0.6, len(values) - 0.2)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.set_xlabel("test accuracy, a dot a seed; bar: mean")
    return figure


def curves(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], *, metric: str) -> Figure:
    """A metric against training steps, a thin line a seed, a thick line for the mean of a side."""
    figure, axes = canvas(5.2, 2.9)
    for side, sides_runs in runs.items():
        style = "-" if side == "vitx" else "--"
        for events in sides_runs:
            steps, values = [e["step"] for e in events], [e[metric] for e in events]
            axes.plot(steps, values, color=COLOURS[side], lw=0.5, alpha=0.35, ls=style)
        steps = [event["step"] for event in sides_runs[0]]
        mean = np.mean([[event[metric] for event in events] for events in sides_runs], axis=0)
        axes.plot(steps, mean, color=COLOURS[side], lw=1.6, ls=style, label=side)
    axes.set_xlabel("step")
    axes.set_ylabel(metric.replace("/", " "))
    if "accuracy" in metric:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    else:
        axes.set_yscale("log")
    axes.legend(frameon=False)
    return figure
