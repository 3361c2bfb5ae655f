"""Pictures as matplotlib figures. Each function draws plain values and returns the figure.

Colours are Okabe and Ito's, which stay apart for colour-blind readers and in print; the reference
is drawn with open, the candidate with filled marks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from einops import rearrange, reduce
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

COLOURS = {"timm": "#D55E00", "vitx": "#0072B2"}
GREY = "#666666"
FONT = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True)
class Bar:
    """One line of a forest plot: a value with its interval, and the noise floor, where known."""

    label: str
    value: float
    low: float | None
    high: float | None
    floor: float | None


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as SVG or PNG, by the path's ending; the same values give the same file."""
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "vitx"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    return path


def ratios(bars: Sequence[Bar], *, title: str) -> Figure:
    """Speed ratios with 95 % intervals; the grey band around 1 is each comparison's noise floor."""
    figure, axes = _axes(5.2, 1.2 + 0.4 * len(bars))
    rows = range(len(bars))[::-1]
    for row, bar in zip(rows, bars, strict=True):
        if bar.floor is not None:
            axes.fill_betweenx(
                [row - 0.4, row + 0.4], 1 / (1 + bar.floor), 1 + bar.floor, color="#DDDDDD", lw=0
            )
        low, high = bar.low or bar.value, bar.high or bar.value
        span = [[bar.value - low], [high - bar.value]]
        axes.errorbar(bar.value, row, xerr=span, fmt="o", color=COLOURS["vitx"], capsize=3)
        axes.annotate(
            f"{bar.value:.3f}",
            (high, row),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(1, color=GREY, lw=0.8)
    axes.set_yticks(list(rows), [bar.label for bar in bars])
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.margins(x=0.18)
    axes.set_xlabel("images/s of vitx over timm's\n95 % interval; grey: noise floor")
    axes.set_title(title, loc="left", fontsize=9)
    return figure


def accuracies(values: Mapping[str, Sequence[float]], *, reading: float, label: str) -> Figure:
    """One dot a seed for each side, the mean as a bar, and a further reading as a dashed line."""
    figure, axes = _axes(5.2, 1.9)
    for row, (side, found) in enumerate(values.items()):
        jitter = np.linspace(-0.18, 0.18, len(found))
        filled = COLOURS[side] if side == "vitx" else "none"
        axes.scatter(found, row + jitter, edgecolor=COLOURS[side], facecolor=filled, s=22)
        axes.plot([np.mean(found)] * 2, [row - 0.35, row + 0.35], color=COLOURS[side], lw=2)
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
    figure, axes = _axes(5.2, 2.9)
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


def confusion(counts: np.ndarray, classes: Sequence[str], *, title: str) -> Figure:
    """Counts of true (rows) against predicted (columns) classes; the diagonal is left pale."""
    figure, axes = _axes(4.4, 4.2)
    wrong = counts.astype(float).copy()
    np.fill_diagonal(wrong, 0)
    axes.imshow(wrong, cmap="Blues", vmin=0, vmax=max(float(wrong.max()), 1.0))
    for row, column in np.ndindex(counts.shape):
        if counts[row, column]:
            dark = wrong[row, column] > 0.6 * max(wrong.max(), 1)
            colour = "white" if dark else "black"
            axes.text(
                column, row, str(counts[row, column]), ha="center", va="center", color=colour,
                fontsize=8,
            )  # fmt: skip
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, loc="left", fontsize=9)
    return figure


def attention_grid(
    images: Tensor, maps: Tensor, truth: Sequence[str], guess: Sequence[str]
) -> Figure:
    """Images above, the same with their attention below; a wrong prediction's title is red.

    `images` (n, c, h, w), `maps` (n, h, w) as `class_attention` gives them.
    """
    figure = Figure(figsize=(5.2, 5.2 * 2 / len(images) + 0.45), layout="constrained")
    grid = figure.subplots(2, len(images), squeeze=False)
    for column in range(len(images)):
        picture = reduce(images[column].float(), "c h w -> h w", "mean").cpu().numpy()
        above, below = grid[0, column], grid[1, column]
        above.imshow(picture, cmap="gray_r")
        below.imshow(picture, cmap="gray_r")
        below.imshow(maps[column].cpu().numpy(), cmap="viridis", alpha=0.65)
        right = truth[column] == guess[column]
        said = truth[column] if right else f"{truth[column]} not {guess[column]}"
        above.set_title(said, fontsize=8, color="#007755" if right else "#BB0000")
        for axes in (above, below):
            axes.set_axis_off()
    return figure


def class_attention(maps: Tensor, *, grid: tuple[int, int], prefix: int, size: tuple) -> Tensor:
    """What the class token reads of each pixel, averaged over blocks and heads: (b, h, w).

    `maps` (depth, b, heads, i, j) of `Vit.attention_maps`; patches are enlarged bilinearly to
    `size` and each image's map is scaled to [0, 1].
    """
    row = reduce(maps[:, :, :, 0, prefix:], "depth b heads j -> b j", "mean")
    image = rearrange(row, "b (y x) -> b 1 y x", y=grid[0], x=grid[1])
    large = rearrange(F.interpolate(image, size, mode="bilinear"), "b 1 h w -> b h w")
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    return (large - low) / (high - low).clamp_min(1e-12)


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib import rc_context

    with rc_context(FONT):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure, axes
