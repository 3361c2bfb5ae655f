"""What a model sees and learns, as matplotlib figures of plain values.

Colours are Okabe and Ito's, which stay apart for colour-blind readers and in print.
"""

import itertools
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from matplotlib import font_manager, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter, MaxNLocator, PercentFormatter
from torch import Tensor

from vitx.model.config import ModelConfig
from vitx.registry import name_of

SPLITS = {"train": ("#666666", ":"), "val": ("#0072B2", "-"), "test": ("#D55E00", "--")}
COLOURS = {"timm": "#D55E00", "vitx": "#0072B2", "torchvision": "#009E73", "hf": "#CC79A7",
           "vit_pytorch": "#E69F00"}  # fmt: skip
CYCLE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#666666"
FONT = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as SVG or PNG, by the path's ending; the same values give the same file.

    Text in an SVG stays text: outlines of letters would make most of the file. Words are drawn as
    they are: `$` begins no formula, and letters that no font here has are boxes.
    """
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    for text in _words(figure):
        text.set_parse_math(False)
        if max(map(ord, text.get_text()), default=0) >= FIRST_CJK:
            text.set_fontfamily([*rcParams["font.family"], *_cjk_fonts()])
    with rc_context({"svg.hashsalt": "vitx", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    return path


FIRST_CJK = 0x2E80
"""The first character of the blocks of Chinese, Japanese and Korean."""
CJK_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "IPAGothic",
    "Hiragino Sans", "PingFang SC", "Microsoft YaHei", "MS Gothic", "Malgun Gothic",
    "Arial Unicode MS",
)  # fmt: skip


def _words(figure: Figure) -> list[Text]:
    """All texts of a figure but the numbers at its axes, some of which are formulas."""
    numbers: set[Text] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)]
            if not isinstance(axis.get_major_formatter(), FixedFormatter | FuncFormatter):
                numbers.update(labels)
    return [text for text in figure.findobj(Text) if text not in numbers]  # type: ignore[misc]


@cache
def _cjk_fonts() -> list[str]:
    """Those of the fonts that this machine has."""
    here = set(font_manager.get_font_names())
    return [name for name in CJK_FONTS if name in here]


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


def history(events: Sequence[Mapping[str, Any]], *, steps_per_epoch: int = 0) -> Figure:
    """Loss and accuracy of one run, a line per split; against epochs if their length is known."""
    figure, grid = canvas(7.2, 2.9, columns=2)
    unit = steps_per_epoch or 1
    for axes, what in zip(grid, ("loss", "accuracy"), strict=True):
        for split, (colour, style) in SPLITS.items():
            points = [(e["step"] / unit, e[f"{split}/{what}"]) for e in events
                      if f"{split}/{what}" in e]  # fmt: skip
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, lw=1.1, label=split)
        axes.set_xlabel("epoch" if steps_per_epoch else "step")
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
    lines: Mapping[str, Sequence[Tensor]], *, titles: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """A labelled line of pictures each, (c, h, w) in [0, 1]; `titles` stand above single ones."""
    columns = max(len(shown) for shown in lines.values())
    figure, grid = _grid(lines, columns, (1.3 + 0.75 * columns, (0.98 if titles else 0.78)))
    for line, (name, shown) in zip(grid, lines.items(), strict=True):
        for number, (axes, picture) in enumerate(zip(line, shown, strict=False)):
            _show(axes, picture)
            if titles:
                axes.set_title(titles[name][number], fontsize=7)
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
    lines = {"": None} | dict(maps)
    figure, grid = _grid(lines, len(images), (0.6 + 0.72 * len(images), 0.9))
    for line, attention in zip(grid, lines.values(), strict=True):
        for column, axes in enumerate(line):
            _show(axes, images[column])
            if attention is not None:
                axes.imshow(attention[column].cpu().numpy(), cmap="viridis", alpha=0.65)
    for axes, true, predicted in zip(grid[0], truth, guess, strict=True):
        right = true == predicted
        title = true if right else f"{true}\ncalled\n{predicted}"
        axes.set_title(title, fontsize=7, color="#007755" if right else "#BB0000")
    return figure


def _grid(
    names: Collection[str], columns: int, size: tuple[float, float]
) -> tuple[Figure, np.ndarray]:
    """Axes for small pictures, a named line each; `size` is the width and the height of a line."""
    figure = Figure(figsize=(size[0], size[1] * len(names)), layout="constrained")
    grid = figure.subplots(len(names), columns, squeeze=False)
    for line, name in zip(grid, names, strict=True):
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return figure, grid


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


def enlarge(patches: Tensor, *, grid: tuple[int, int], size: tuple) -> Tensor:
    """Values of the patches (b, y·x), enlarged bilinearly to `size` and scaled to [0, 1] each."""
    image = rearrange(patches, "b (y x) -> b 1 y x", y=grid[0], x=grid[1])
    large = rearrange(F.interpolate(image, size, mode="bilinear"), "b 1 h w -> b h w")
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    return (large - low) / (high - low).clamp_min(1e-12)


def positions(table: Tensor, *, grid: tuple[int, int]) -> Figure:
    """Cosine similarity of each patch's position with all others, a small map per patch.

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
    kernels = rearrange(scaled, "k (c p q) -> k c p q", c=c, p=p, q=q).cpu()
    if c not in (1, 3):
        kernels = kernels[:, :1]
    lines = [list(part) for part in kernels.split(7)]
    return pictures({f"{7 * k + 1} to {7 * k + len(part)}": part for k, part in enumerate(lines)})


def architecture(config: ModelConfig) -> Figure:
    """The model as a block diagram, with the shape of one image's tensor after each part.

    Axis names are those of `vitx.model.axes`, numbers those of the configuration.
    """
    parts = _parts(config)
    height = max(0.56 * len(parts) + 0.2, 5.0)
    figure = Figure(figsize=(8, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 8), ylim=(0, height))
    axes.set_axis_off()
    step = (height - 0.2) / len(parts)
    for number, (name, shape) in enumerate(parts):
        y = height - 0.1 - step * (number + 0.5)
        _node(axes, (1.4, y), name, width=2.3, dark=name.startswith("Block"))
        axes.text(2.7, y, shape, va="center", fontsize=8.5, linespacing=1.3)
        if number:
            _arrow(axes, (1.4, y + step - 0.18), (1.4, y + 0.18))
        if name.startswith("Block"):
            for side in (-1, 1):
                end = height / 2 + side * (height / 2 - 0.15)
                axes.plot((3.7, 4.75), (y + side * 0.1, end), color=GREY, lw=0.7, ls=":")
    _block(axes, config, height)
    return figure


def _parts(config: ModelConfig) -> list[tuple[str, str]]:
    """Parts of a model from the image to the logits, and the shape that each gives."""
    c, d = config, config.width
    (h, w), (p, q), patches = c.size, c.patch_size, math.prod(c.grid)
    tokens = f"n × d\n{c.prefix + patches} × {d}"
    prefix = [
        word
        for word, count in (("class token", c.class_token), ("registers", c.registers))
        if count
    ]
    positions = [] if c.position == "none" else ["positions"]
    stem = c.patchify == "stem"
    parts = [
        ("Image", f"c × h × w\n{c.channels} × {h} × {w}"),
        ("", "") if stem else ("Patches", f"(y·x) × (c·p·q)\n{patches} × {c.channels * p * q}"),
        ("Convolutional stem" if stem else "Patch embedding", f"(y·x) × d\n{patches} × {d}"),
        ("+ " + ", ".join([*prefix, *positions]), tokens),
        (f"Block × {c.depth}", tokens),
        ("Norm", tokens) if c.final_norm else ("", ""),
        (f"Pool: {c.pool if isinstance(c.pool, str) else name_of(c.pool)}", f"d\n{d}"),
        ("Norm", f"d\n{d}") if c.fc_norm else ("", ""),
        ("Head", f"classes\n{c.classes}") if c.classes else ("", ""),
    ]
    return [(name, shape) for name, shape in parts if name.strip("+ ")]


def _block(axes: Axes, config: ModelConfig, height: float) -> None:
    """A block enlarged: two branches, each normalised before it is read or after it is added."""
    post, scale = config.placement == "post", ["Layer scale"] if config.layer_scale else []
    flow: list[str] = []
    for branch in (
        f"Attention\n{config.heads} heads, e = {config.width // config.heads}",
        f"MLP\nd → f → d, f = {config.hidden}",
    ):
        flow += [branch, *scale, "+", "Norm"] if post else ["Norm", branch, *scale, "+"]
    frame = FancyBboxPatch((4.85, 0.25), 2.9, height - 0.5, boxstyle="round,pad=0.1")
    axes.add_patch(frame)
    frame.set(fill=False, ec=GREY, lw=0.7, ls=":")
    step = (height - 0.9) / len(flow)
    axes.text(6.3, height - 0.3, "n × d", va="center", fontsize=8.5)
    start, y = height - 0.42, height - 0.45
    _arrow(axes, (6.1, height - 0.2), (6.1, y - step / 2 + 0.2))
    for number, name in enumerate(flow):
        y = height - 0.45 - step * (number + 0.5)
        last = number == len(flow) - 1
        _arrow(axes, (6.1, y - 0.13), (6.1, 0.2 if last else y - step + 0.2))
        if name == "+":
            axes.add_patch(Circle((6.1, y), 0.14, fc="white", ec="black", lw=0.9, zorder=3))
            axes.text(6.1, y, "+", ha="center", va="center_baseline", fontsize=11, zorder=4)
            axes.plot((6.1, 7.4, 7.4), (start, start, y), color="black", lw=0.9)
            _arrow(axes, (7.4, y), (6.26, y))
        else:
            _node(axes, (6.1, y), name, width=1.9, dark="\n" in name)
        if name == ("Norm" if post else "+"):
            start = y - step / 2 + 0.04


def _node(axes: Axes, centre: tuple[float, float], name: str, *, width: float, dark: bool) -> None:
    """A part with its name; `dark` is shaded."""
    height = 0.4 if "\n" in name else 0.3
    corner = (centre[0] - width / 2, centre[1] - height / 2)
    box = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.06", zorder=2)
    box.set(fc="#DDDDDD" if dark else "white", ec="black", lw=0.9)
    axes.add_patch(box)
    axes.text(*centre, name, ha="center", va="center", fontsize=8.5, linespacing=1.25, zorder=3)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "lw": 0.9, "color": "black", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style | {"mutation_scale": 9}, zorder=1)


def _read(weights: Tensor, prefix: int, class_token: bool) -> Tensor:
    """What the class token, or without one the average patch, reads of the patches: (b, y·x)."""
    return weights[:, 0, prefix:] if class_token else weights[:, prefix:, prefix:].mean(dim=1)


def _show(axes: Axes, picture: Tensor) -> None:
    """A grey or coloured picture (c, h, w) in [0, 1]."""
    if len(picture) == 3:
        axes.imshow(rearrange(picture, "c h w -> h w c").cpu().numpy())
    else:
        axes.imshow(picture[0].float().cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)


def canvas(width: float, height: float, *, columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib import rc_context

    with rc_context(FONT):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(1, columns, squeeze=False)[0]
        for axes in grid:
            axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure, grid if columns > 1 else grid[0]
