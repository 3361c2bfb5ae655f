"""Charts of rates, ratios, memory and accuracies. Each draws plain values and returns a figure."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, PercentFormatter

from vitx.measure.comparison import Latency
from vitx.measure.stats import Interval
from vitx.pictures import COLOURS, CYCLE, GREY, canvas

MORE = tuple(to_hex(colour) for colour in colormaps["tab20"].colors)  # type: ignore[attr-defined]
MARKS, DASHES = "os^Dv<>", ("-", "--", ":", "-.")
WIDTH = 7.4
"""Inches of a chart; a page shows it at about 700 pixels."""
SMALL = 9
"""Points of labels."""


@dataclass(frozen=True)
class Bar:
    """A value with its interval, and of a ratio with its noise floor, where known."""

    label: str
    value: Interval
    floor: float | None = None
    colour: str = COLOURS["vitx"]


@dataclass(frozen=True)
class Line:
    """Images per second of a model by batch. Styles above 0 are dashed, with open marks."""

    label: str
    rates: Mapping[int, Interval]
    colour: str
    style: int = 0


@dataclass(frozen=True)
class Spot:
    """A point of a roofline: FLOP per byte and FLOP/s. Those of a label look alike."""

    label: str
    note: str
    colour: str
    intensity: float
    flops: float


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each model: the first of a library (the word before the colon) has that of the
    library, if it has one. Beyond 27 models colours come again."""
    chosen: dict[str, str] = {}
    for name in names:
        own = COLOURS.get(name.partition(":")[0])
        if own and own not in chosen.values():
            chosen[name] = own
    more = [colour for colour in (*CYCLE, *MORE) if colour not in COLOURS.values()]
    rest = (name for name in names if name not in chosen)
    return chosen | dict(zip(rest, itertools.cycle(more), strict=False))


def _titled(figure: Figure, title: str) -> Figure:
    """The figure with a title of one or more lines, wrapped to its width."""
    width = int(figure.get_figwidth() * 13)
    lines = [textwrap.fill(line, width) for line in title.splitlines()]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=SMALL + 1)
    return figure


def _span(interval: Interval) -> tuple[list[float], list[float]]:
    """How far the ends are from the value, as `errorbar` takes it."""
    return [interval.value - interval.low], [interval.high - interval.value]


def ratios(
    bars: Sequence[Bar], *, title: str, label: str = "images per second of vitx over timm's"
) -> Figure:
    """Speed ratios with 95 % intervals; the grey band around 1 is each comparison's noise floor."""
    heights = [0.2 + 0.16 * (1 + bar.label.count("\n")) for bar in bars]
    figure, axes = canvas(WIDTH, 1.2 + sum(heights))
    middles = _middles(heights)
    for middle, height, bar in zip(middles, heights, bars, strict=True):
        if bar.floor is not None:
            band = [middle - 0.45 * height, middle + 0.45 * height]
            ends = 1 / (1 + bar.floor), 1 + bar.floor
            axes.fill_betweenx(band, *ends, color="#DDDDDD", lw=0)
        value = bar.value
        axes.errorbar(
            value.value, middle, xerr=_span(value), fmt="o", ms=5, color=bar.colour, capsize=3
        )
        _beside(axes, f"{value.value:.3f}", (value.high, middle))
    axes.axvline(1, color=GREY, lw=0.8)
    axes.set_yticks(middles, [bar.label for bar in bars], fontsize=SMALL)
    axes.set_ylim(0, sum(heights))
    axes.margins(x=0.18)
    axes.set_xlabel(f"{label}\n95 % interval; grey: noise floor")
    return _titled(figure, title)


def _beside(axes: Any, text: str, place: tuple[float, float]) -> None:
    """A text to the right of a point."""
    axes.annotate(text, place, (5, 0), textcoords="offset points", va="center", fontsize=SMALL - 1)


def _middles(heights: Sequence[float]) -> list[float]:
    """Middles of lines of these heights, the first on top."""
    whole = sum(heights)
    ends = itertools.accumulate(heights)
    return [whole - end + height / 2 for end, height in zip(ends, heights, strict=True)]


def rates(lines: Sequence[Line], *, note: str, title: str) -> Figure:
    """Images per second against the batch, with a band for the interval."""
    figure, axes = canvas(WIDTH, 3.6 + 0.1 * len(lines))
    for line in lines:
        batches = sorted(line.rates)
        value, low, high = (
            np.array([getattr(line.rates[batch], end) for batch in batches])
            for end in ("value", "low", "high")
        )
        axes.fill_between(batches, low, high, color=line.colour, alpha=0.25, lw=0)
        axes.errorbar(
            batches,
            value,
            yerr=[value - low, high - value],
            color=line.colour,
            marker=MARKS[line.style],
            ms=4,
            lw=1.2,
            capsize=2,
            ls=DASHES[line.style],
            label=line.label,
            mfc="white" if line.style else line.colour,
        )
    batches = sorted({batch for line in lines for batch in line.rates})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(bottom=0)
    bands = "images per batch; bands: 95 % interval, or what the legend says"
    axes.set_xlabel(f"{bands}\n{note}".strip())
    axes.set_ylabel("images per second")
    figure.legend(frameon=False, fontsize=SMALL - 1, ncols=2, loc="outside lower left")
    return _titled(figure, title)


def roofline(spots: Sequence[Spot], *, peak: float, bandwidth: float, title: str) -> Figure:
    """FLOP/s against FLOP per byte, under what the machine's memory and products allow."""
    figure, axes = canvas(WIDTH, 4.0)
    ridge, reach = peak / bandwidth, [spot.intensity for spot in spots]
    ends = [min(ridge, *reach) / 4, max(ridge, *reach) * 4]
    roof = [ends[0] * bandwidth / 1e9, peak / 1e9, peak / 1e9]
    axes.plot([ends[0], ridge, ends[1]], roof, color=GREY, lw=1)
    labels = list(dict.fromkeys(spot.label for spot in spots))
    for spot in spots:
        number = labels.index(spot.label)
        place = (spot.intensity, spot.flops / 1e9)
        axes.plot(*place, MARKS[number % len(MARKS)], ms=5, alpha=0.8, color=spot.colour)
        shift = (-12 if number % 2 else 7, -3)
        axes.annotate(spot.note, place, shift, textcoords="offset points", fontsize=SMALL - 1)
    colour_of = {spot.label: spot.colour for spot in spots}
    for number, label in enumerate(labels):
        mark = MARKS[number % len(MARKS)]
        axes.plot([], [], mark, ms=5, color=colour_of[label], label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter())
    axes.set_xlabel("FLOP per byte that operations read and write; numbers: images per batch")
    axes.set_ylabel("GFLOP/s")
    figure.legend(frameon=False, fontsize=SMALL - 1, ncols=2, loc="outside lower left")
    peaks = f"peaks {peak / 1e9:,.0f} GFLOP/s and {bandwidth / 1e9:,.0f} GB/s"
    return _titled(figure, f"{title}\n{peaks}")


def latencies(models: Sequence[tuple[str, str, Latency]], *, title: str) -> Figure:
    """Quantiles of single calls, a line per model: its label, its colour, and its quantiles."""
    figure, axes = canvas(WIDTH, 1.5 + 0.38 * len(models))
    places = range(len(models))[::-1]
    for number, name in enumerate(("p50", "p90", "p99")):
        for place, (_, colour, latency) in zip(places, models, strict=True):
            seconds: Interval = getattr(latency, name)
            ms = Interval(*(1e3 * end for end in (seconds.value, seconds.low, seconds.high)))
            axes.errorbar(
                ms.value,
                place + 0.2 * (1 - number),
                xerr=_span(ms),
                fmt=MARKS[number],
                ms=4,
                color=colour,
                capsize=2,
            )
        axes.plot([], [], MARKS[number], ms=4, color=GREY, label=name)
    axes.set_yticks(list(places), [label for label, *_ in models], fontsize=SMALL)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms per call with one image\n95 % interval; of several runs median and range")
    figure.legend(frameon=False, fontsize=SMALL, ncols=3, loc="outside lower left")
    return _titled(figure, title)


def amounts(bars: Sequence[Bar], *, label: str, title: str) -> Figure:
    """A bar each, with its value and range."""
    figure, axes = canvas(WIDTH, 1.2 + 0.3 * len(bars))
    places = range(len(bars))[::-1]
    for place, bar in zip(places, bars, strict=True):
        value = bar.value
        axes.barh(place, value.value, color=bar.colour, height=0.6)
        if value.low < value.high:
            axes.errorbar(value.value, place, xerr=_span(value), color="black", capsize=2, lw=1)
        _beside(axes, f"{value.value:,.0f}", (value.high, place))
    axes.set_yticks(list(places), [bar.label for bar in bars], fontsize=SMALL)
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.margins(x=0.15)
    axes.set_xlabel(label)
    return _titled(figure, title)


def accuracies(values: Mapping[str, Sequence[float]], *, other: float | None, label: str) -> Figure:
    """One dot per seed for each side, the mean as a bar, another model's as a dashed line."""
    figure, axes = canvas(5.2, 1.9)
    for place, (side, accuracy) in enumerate(values.items()):
        jitter = np.linspace(-0.18, 0.18, len(accuracy))
        filled = COLOURS[side] if side == "vitx" else "none"
        axes.scatter(accuracy, place + jitter, edgecolor=COLOURS[side], facecolor=filled, s=22)
        mean = [float(np.mean(accuracy))] * 2
        axes.plot(mean, [place - 0.35, place + 0.35], color=COLOURS[side], lw=2)
    if other is not None:
        axes.axvline(other, color=GREY, ls="--", lw=0.9)
        _beside(axes, label, (other, len(values) - 0.35))
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(-0.6, len(values) - 0.2)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.set_xlabel("test accuracy, a dot per seed; bar: mean")
    return figure


def curves(runs: Mapping[str, Sequence[Sequence[tuple[int, float]]]], *, label: str) -> Figure:
    """Accuracy against training steps: a thin line per seed, thick: the mean of a side.

    A run is its steps with the accuracy after each.
    """
    figure, axes = canvas(5.2, 2.9)
    for side, curves_of_side in runs.items():
        style, colour = "-" if side == "vitx" else "--", COLOURS[side]
        for curve in curves_of_side:
            axes.plot(*zip(*curve, strict=True), color=colour, lw=0.5, alpha=0.35, ls=style)
        steps = [step for step, _ in curves_of_side[0]]
        mean = np.mean([[value for _, value in curve] for curve in curves_of_side], axis=0)
        axes.plot(steps, mean, color=colour, lw=1.6, ls=style, label=side)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(frameon=False)
    return figure
