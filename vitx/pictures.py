"""What a model sees and learns, as matplotlib figures of plain values.

Colours are Okabe and Ito's, which stay apart for colour-blind readers and in print.
"""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

SPLITS = {"train": ("#666666", ":"), "val": ("#0072B2", "-"), "test": ("#D55E00", "--")}
COLOURS = {"timm": "#D55E00", "vitx": "#0072B2", "torchvision": "#009E73", "hf": "#CC79A7",
           "vit_pytorch": "#E69F00"}  # fmt: skip
CYCLE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#666666"
FONT = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as SVG or PNG, by the path's ending; the same values give the same file.

    Text in an SVG stays text: outlines of letters would make most of the file.
    """
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "vitx", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    return path


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
