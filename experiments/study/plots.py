"""Charts of answers and of what training costs. Each draws plain values and returns a figure."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from vitx.measure.stats import Interval
from vitx.pictures import CYCLE, GREY, canvas


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
    """Changes of a share, in points, and ratios of speed beside them, one line per arm."""
    figure, (left, right) = canvas(7.2, 1.3 + 0.26 * len(points), columns=2)
    for row, point in zip(range(len(points))[::-1], points, strict=True):
        marker, colour = VERDICTS.get(point.verdict, ("o", GREY))
        parts = ((left, point.change, marker, colour), (right, point.ratio, "o", "black"))
        for axes, interval, mark, ink in parts:
            span = [[interval.value - interval.low], [interval.high - interval.value]]
            axes.errorbar(interval.value, row, xerr=span, fmt=mark, ms=4, color=ink, lw=1.1)
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
    verdicts = dict.fromkeys(point.verdict for point in points)
    marks = [VERDICTS.get(verdict, ("o", GREY)) for verdict in verdicts]
    handles = [Line2D([], [], marker=m, color=c, ls="", ms=4) for m, c in marks]
    figure.legend(handles, verdicts, frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    return figure
