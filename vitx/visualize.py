"""Pictures as matplotlib figures. Each function draws plain values and returns the figure.

Colours are Okabe and Ito's, which stay apart for colour-blind readers and in print.
"""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter
from torch import Tensor

from vitx.stats import Interval

SPLITS = {"train": ("#666666", ":"), "val": ("#0072B2", "-"), "test": ("#D55E00", "--")}
COLOURS = {"timm": "#D55E00", "vitx": "#0072B2", "torchvision": "#009E73", "hf": "#CC79A7",
           "vit_pytorch": "#E69F00"}  # fmt: skip
CYCLE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MORE = tuple(to_hex(colour) for colour in colormaps["tab20"].colors)  # type: ignore[attr-defined]
MARKS, DASHES = "os^Dv<>", ("-", "--", ":", "-.")
GREY = "#666666"
FONT = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


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


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as SVG or PNG, by the path's ending; the same values give the same file.

    Text in an SVG stays text: outlines of letters would make most of the file.
    """
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "vitx", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    return path


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


def costs(
    runs: Mapping[str, tuple[float, Sequence[Sequence[tuple[float, float]]]]],
    *,
    claim: float,
    label: str,
) -> Figure:
    """Accuracy against CPU time; `runs` are by name their CPU seconds and their seeds' curves.

    A point is (share of the run, accuracy). Thin: a seed; thick: the mean; dashed grey: a claim.
    """
    figure, axes = canvas(6.4, 3.2)
    for (name, (seconds, seeds)), colour in zip(runs.items(), itertools.cycle(CYCLE), strict=False):
        minutes = [share * seconds / 60 for share, _ in seeds[0]]
        values = np.array([[value for _, value in seed] for seed in seeds])
        axes.plot(minutes, values.T, color=colour, lw=0.5, alpha=0.5)
        axes.plot(minutes, values.mean(axis=0), color=colour, lw=1.6, label=name)
    axes.axhline(claim, color=GREY, ls="--", lw=0.9)
    axes.annotate(
        label, (1, claim), (0, 3), xycoords=axes.get_yaxis_transform(),
        textcoords="offset points", ha="right", fontsize=8,
    )  # fmt: skip
    axes.set_xlabel("CPU time, minutes")
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(0.3, 1)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    return figure


@dataclass(frozen=True)
class Point:
    """A candidate beside a baseline: its speed ratio and its change of a metric."""

    label: str
    ratio: Interval
    change: Interval
    verdict: str


def tradeoff(points: Sequence[Point], *, metric: str, title: str) -> Figure:
    """Changes of a metric against ratios of speed, with intervals; the baseline is at (1, 0)."""
    figure, axes = canvas(5.6, 3.6)
    axes.axhline(0, color=GREY, lw=0.9)
    axes.axvline(1, color=GREY, lw=0.9)
    for point, colour in zip(points, itertools.cycle(CYCLE), strict=False):
        x, y = point.ratio, point.change
        axes.errorbar(
            x.value, y.value, color=colour, fmt="o", ms=4, lw=1.2, capsize=2,
            xerr=[[x.value - x.low], [x.high - x.value]],
            yerr=[[y.value - y.low], [y.high - y.value]],
            label=f"{point.label}: {point.verdict}",
        )  # fmt: skip
    axes.set_xlabel("images/s of a training step, as a multiple of the baseline's")
    axes.set_ylabel(f"change of {metric}")
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=7, loc="best")
    return figure


VERDICTS = {
    "better": ("^", "#009E73"),
    "worse": ("v", "#D55E00"),
    "equivalent": ("s", "#0072B2"),
}
"""Markers and colours; others are grey circles."""


def effects(points: Sequence[Point], *, label: str, title: str) -> Figure:
    """Changes of a share, in points, and ratios of speed beside them, a line an arm."""
    figure, (left, right) = canvas(7.2, 1.3 + 0.26 * len(points), columns=2)
    for row, point in zip(range(len(points))[::-1], points, strict=True):
        marker, colour = VERDICTS.get(point.verdict, ("o", GREY))
        parts = ((left, point.change, marker, colour), (right, point.ratio, "o", "black"))
        for axes, found, mark, ink in parts:
            span = [[found.value - found.low], [found.high - found.value]]
            axes.errorbar(found.value, row, xerr=span, fmt=mark, ms=4, color=ink, lw=1.1)
    left.axvline(0, color=GREY, lw=0.8)
    right.axvline(1, color=GREY, lw=0.8)
    left.set_yticks(range(len(points))[::-1], [point.label for point in points])
    right.set_yticks([])
    for axes in (left, right):
        axes.set_ylim(-0.6, len(points) - 0.4)
    left.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    left.set_xlabel(label)
    right.set_xlabel("images/s in training,\nover the baseline's")
    left.set_title(title, loc="left", fontsize=9)
    said = dict.fromkeys(point.verdict for point in points)
    marks = [VERDICTS.get(verdict, ("o", GREY)) for verdict in said]
    handles = [Line2D([], [], marker=m, color=c, ls="", ms=4) for m, c in marks]
    figure.legend(handles, said, frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    return figure


MOST_NAMED = 20
"""Classes up to which a confusion matrix has their names and its counts in words."""
SHORT = 3
"""Letters of a class name that have room below a column."""


def confusion(counts: np.ndarray, classes: Sequence[str], *, title: str) -> Figure:
    """Counts of true (rows) against predicted (columns) classes; the diagonal is left pale.

    Of many classes the numbers are left out and classes are counted from 0.
    """
    figure, axes = canvas(4.4, 4.2)
    wrong = counts.astype(float).copy()
    np.fill_diagonal(wrong, 0)
    shown = axes.imshow(wrong, cmap="Blues", vmin=0, vmax=max(float(wrong.max()), 1.0))
    named = len(classes) <= MOST_NAMED
    for row, column in np.ndindex(counts.shape):
        if counts[row, column] and named:
            dark = wrong[row, column] > 0.6 * max(wrong.max(), 1)
            colour = "white" if dark else "black"
            axes.text(
                column, row, str(counts[row, column]), ha="center", va="center", color=colour,
                fontsize=8,
            )  # fmt: skip
    if named:
        axes.set_xticks(range(len(classes)), classes)
        axes.set_yticks(range(len(classes)), classes)
        if max(map(len, classes)) > SHORT:
            for label in axes.get_xticklabels():
                label.set(rotation=45, ha="right", rotation_mode="anchor")
    else:
        figure.colorbar(shown, ax=axes, shrink=0.8, label="images of a wrong class")
    axes.set_xlabel("predicted" if named else "predicted class, by its number")
    axes.set_ylabel("true" if named else "true class, by its number")
    axes.set_title(title, loc="left", fontsize=9)
    return figure


def history(events: Sequence[Mapping[str, Any]], *, steps_an_epoch: int = 0) -> Figure:
    """Loss and accuracy of one run, a line a split; against epochs if their length is known."""
    figure, grid = canvas(7.2, 2.9, columns=2)
    unit = steps_an_epoch or 1
    for axes, what in zip(grid, ("loss", "accuracy"), strict=True):
        for split, (colour, style) in SPLITS.items():
            points = [(e["step"] / unit, e[f"{split}/{what}"]) for e in events
                      if f"{split}/{what}" in e]  # fmt: skip
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, lw=1.1, label=split)
        axes.set_xlabel("epoch" if steps_an_epoch else "step")
        axes.set_ylabel(what)
        axes.legend(frameon=False)
    grid[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def reliability(
    confidence: Sequence[float], accuracy: Sequence[float], images: Sequence[int], *, error: float
) -> Figure:
    """Accuracy against confidence, the area of a mark by its images; on the line is calibrated."""
    figure, axes = canvas(3.6, 3.4)
    axes.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls="--")
    size = 8 + 300 * np.asarray(images) / max(sum(images), 1)
    axes.scatter(confidence, accuracy, s=size, color=COLOURS["vitx"], alpha=0.8)
    axes.set_xlabel("confidence (largest probability)")
    axes.set_ylabel("accuracy")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title(f"expected calibration error {error:.1%}", loc="left", fontsize=9)
    return figure


def pictures(
    rows: Mapping[str, Sequence[Tensor]], *, titles: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """A labelled row of pictures each, (c, h, w) in [0, 1]; `titles` stand above single ones."""
    columns = max(len(found) for found in rows.values())
    figure = Figure(
        figsize=(1.3 + 0.75 * columns, (0.98 if titles else 0.78) * len(rows)), layout="constrained"
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, found) in zip(grid, rows.items(), strict=True):
        for number, axes in enumerate(line):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if number < len(found):
                _show(axes, found[number])
                if titles:
                    axes.set_title(titles[name][number], fontsize=7)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def attention_grid(
    images: Tensor,
    maps: Mapping[str, Tensor],
    truth: Sequence[str],
    guess: Sequence[str],
) -> Figure:
    """Images above, the same under each attention map below; a wrong prediction's title is red.

    `images` (n, c, h, w) in [0, 1]; each of `maps` (n, h, w), as `class_attention` gives them.
    """
    rows = {"": None} | dict(maps)
    figure = Figure(
        figsize=(0.6 + 0.72 * len(images), 0.45 + 0.78 * len(rows)), layout="constrained"
    )
    grid = figure.subplots(len(rows), len(images), squeeze=False)
    for line, (name, found) in zip(grid, rows.items(), strict=True):
        for column, axes in enumerate(line):
            _show(axes, images[column])
            if found is not None:
                axes.imshow(found[column].cpu().numpy(), cmap="viridis", alpha=0.65)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for axes, true, said in zip(grid[0], truth, guess, strict=True):
        right = true == said
        axes.set_title(
            true if right else f"{true}\ncalled {said}",
            fontsize=7,
            color="#007755" if right else "#BB0000",
        )
    return figure


def class_attention(
    maps: Tensor, *, grid: tuple[int, int], prefix: int, size: tuple, class_token: bool = True
) -> Tensor:
    """What the class token reads of each pixel, averaged over blocks and heads: (b, h, w).

    `maps` (depth, b, heads, i, j) of `Vit.attention_maps`. Without a class token it is what
    all patches read on average.
    """
    weights = reduce(maps, "depth b heads i j -> b i j", "mean")
    return enlarge(_read(weights, prefix, class_token), grid=grid, size=size)


def rollout(
    maps: Tensor, *, grid: tuple[int, int], prefix: int, size: tuple, class_token: bool = True
) -> Tensor:
    """Attention from the class token through all blocks to each pixel: (b, h, w).

    Abnar and Zuidema 2020, arXiv:2005.00928, eq. 1: the product over blocks of the heads' mean,
    half mixed with the identity for the residual path.
    """
    layers = reduce(maps, "depth b heads i j -> depth b i j", "mean")
    layers = (layers + torch.eye(layers.shape[-1], device=maps.device, dtype=maps.dtype)) / 2
    through = layers[0]
    for layer in layers[1:]:
        through = layer @ through
    return enlarge(_read(through, prefix, class_token), grid=grid, size=size)


def enlarge(row: Tensor, *, grid: tuple[int, int], size: tuple) -> Tensor:
    """Values of the patches (b, y·x), enlarged bilinearly to `size` and scaled to [0, 1] each."""
    image = rearrange(row, "b (y x) -> b 1 y x", y=grid[0], x=grid[1])
    large = rearrange(F.interpolate(image, size, mode="bilinear"), "b 1 h w -> b h w")
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    return (large - low) / (high - low).clamp_min(1e-12)


def positions(table: Tensor, *, grid: tuple[int, int]) -> Figure:
    """Cosine similarity of each patch's position with all others, a small map a patch.

    `table` (y·x, d). Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7.
    """
    unit = F.normalize(table.float(), dim=1)
    similar = rearrange(unit @ unit.T, "(y x) (v u) -> y x v u", y=grid[0], v=grid[0]).cpu()
    rows, columns = (np.unique(np.linspace(0, n - 1, min(n, 8)).astype(int)) for n in grid)
    figure = Figure(
        figsize=(0.55 * len(columns) + 1.0, max(0.55 * len(rows), 2.0)), layout="constrained"
    )
    plots = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes, (y, x) in zip(plots.flat, itertools.product(rows, columns), strict=True):
        axes.imshow(similar[y, x].numpy(), cmap="viridis", vmin=-1, vmax=1)
        axes.set_axis_off()
    figure.colorbar(plots[0, 0].images[0], ax=plots, label="cosine similarity", shrink=0.8)
    return figure


def filters(kernel: Tensor, *, count: int = 28) -> Figure:
    """The first principal components of a patch kernel (d, c, p, q), each scaled to [0, 1].

    Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7.
    """
    flat = rearrange(kernel.float(), "d c p q -> d (c p q)")
    flat = flat - flat.mean(dim=0)
    components = torch.linalg.svd(flat, full_matrices=False).Vh[:count]
    low, high = components.amin(dim=1, keepdim=True), components.amax(dim=1, keepdim=True)
    scaled = (components - low) / (high - low).clamp_min(1e-12)
    _, c, p, q = kernel.shape
    found = rearrange(scaled, "k (c p q) -> k c p q", c=c, p=p, q=q).cpu()
    if c not in (1, 3):
        found = found[:, :1]
    rows = [list(part) for part in found.split(7)]
    return pictures({f"from {7 * line + 1}": row for line, row in enumerate(rows)})


def _read(weights: Tensor, prefix: int, class_token: bool) -> Tensor:
    """What the class token, or without one the average patch, reads of the patches: (b, y·x)."""
    return weights[:, 0, prefix:] if class_token else weights[:, prefix:, prefix:].mean(dim=1)


def _show(axes: Any, picture: Tensor) -> None:
    """A grey or coloured picture (c, h, w) in [0, 1]."""
    if len(picture) == 3:
        axes.imshow(rearrange(picture, "c h w -> h w c").cpu().numpy())
    else:
        axes.imshow(picture[0].float().cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)


def _above(figure: Figure, title: str) -> None:
    """A title over the whole figure, in as many lines as it needs."""
    width = int(figure.get_figwidth() * 16)
    figure.suptitle(textwrap.fill(title, width), x=0.01, ha="left", fontsize=8)


def canvas(width: float, height: float, *, columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib import rc_context

    with rc_context(FONT):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(1, columns, squeeze=False)[0]
        for axes in grid:
            axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure, grid if columns > 1 else grid[0]
