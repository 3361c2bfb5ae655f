"""Evaluate a finished run: `python -m experiments.evaluate RUN [--split val]`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

import vitx
from experiments import cli
from experiments.study.pages import Table
from experiments.study.runs import read_config
from vitx import data, pictures
from vitx.data.dataset import Dataset
from vitx.data.loader import steps_an_epoch
from vitx.data.sources import Images
from vitx.files import write_json
from vitx.model.layers import PatchEmbed
from vitx.model.vit import Vit
from vitx.settings import override
from vitx.training import evaluate, parallel, tracking

PROG = "python -m experiments.evaluate"
RESULT = "evaluation.json"
CONFUSION = "confusion.csv"


@dataclass(frozen=True)
class Settings:
    """Accuracy, calibration, frozen features and pictures of a finished run, into its folder."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    split: str = "test"
    """Split that is evaluated, val or test."""
    root: str = ""
    """Folder of the data, if not the one it was trained on."""
    probe_images: int = 10_000
    """Training images, evenly spaced, that k-NN and the linear probe are fitted on; 0 for all."""
    device: str = ""
    """Device; empty for the accelerator of this machine, else the CPU."""


def main(args: list[str]) -> None:
    """Print the table, write it as evaluation.json, draw the pictures."""
    settings = cli.parse(Settings, args, prog=PROG)
    cli.at_least(settings, probe_images=0)
    config = read_config(settings.run)
    if settings.root:
        config = override(config, **{"data.root": settings.root})
    device = parallel.device(settings.device)
    vit = vitx.load(settings.run).to(device).eval()
    dataset = data.load(config.data, size=config.model.size)
    summary = json.loads((settings.run / "summary.json").read_text(encoding="utf8"))
    if summary["fingerprint"] != dataset.fingerprint:
        raise ValueError(
            f"the data are not those that {settings.run} was trained on: other images, or others "
            "in the splits"
        )
    if settings.split not in ("val", "test"):
        raise ValueError(f"split = {settings.split!r} must be val or test")
    split = getattr(dataset, settings.split)
    if not len(split):
        raise ValueError(f"the data of {settings.run} have no {settings.split} split")
    logits, target, rows = evaluate.predict(vit, dataset, split)
    split = split.take(rows.tolist())  # without pictures that were skipped as bad
    found = measure(vit, dataset, split, logits, target, settings.probe_images)
    found = {"run": settings.run.name, "split": settings.split} | found
    write_json(settings.run / RESULT, found)
    counts = evaluate.confusion(logits, target, len(dataset.classes))
    confusion_table(counts, dataset.classes).write_csv(settings.run / CONFUSION)
    print(table(found))
    for name, figure in figures(vit, dataset, split, logits, target, settings.run):
        print(pictures.save(figure, settings.run / "figures" / f"{name}.png"))


def measure(
    vit: Vit, dataset: Dataset, split: Images, logits: torch.Tensor, target: torch.Tensor, most: int
) -> dict[str, Any]:
    """All numbers, plain. Features are fitted on training images and scored on the split."""
    score = evaluate.score(logits, target)
    step = -(-len(dataset.train) // most) if most else 1
    some = dataset.train.take(range(0, len(dataset.train), step))
    fitted, asked = (evaluate.features(vit, dataset, part) for part in (some, split))
    return {
        "images": score.images,
        "top1": score.accuracy,
        "top1_standard_error": score.standard_error,
        "top5": evaluate.top(logits, target, 5),
        "loss": score.loss,
        "calibration_error": evaluate.calibration(logits, target).error,
        "nearest_neighbours": evaluate.nearest_neighbours(fitted, asked),
        "linear_probe": evaluate.linear_probe(fitted, asked),
        "probe_images": len(fitted[1]),
        "classes": evaluate.by_class(logits, target, dataset.classes),
        "skipped": dataset.skipped,
    }


def confusion_table(counts: np.ndarray, classes: Sequence[str]) -> Table:
    """Images by true class (lines) and predicted class (columns)."""
    lines = zip(classes, counts.tolist(), strict=True)
    return Table(("true class", *classes), [(name, *map(str, line)) for name, line in lines])


def table(found: dict[str, Any]) -> str:
    """The numbers as lines of text."""
    lines = [
        f"{found['run']}, {found['split']} split, {found['images']:,} images",
        f"top-1 accuracy      {found['top1']:.2%} ± {found['top1_standard_error']:.2%} (standard "
        "error)",
        f"top-5 accuracy      {found['top5']:.2%}",
        f"cross-entropy       {found['loss']:.4f} nats",
        f"calibration error   {found['calibration_error']:.2%} (expected, 15 bins)",
        f"k-NN, k = 20        {found['nearest_neighbours']:.2%} (frozen features, fitted on "
        f"{found['probe_images']:,} training images)",
        f"linear probe        {found['linear_probe']:.2%}",
    ]
    if found["skipped"]:
        lines.append(f"skipped as bad: {len(found['skipped'])} pictures")
    width = max(len(name) for name in found["classes"])
    lines.append(f"{'class':<{width}}  precision  recall     F1  images")
    for name, each in found["classes"].items():
        lines.append(
            f"{name:<{width}}  {each['precision']:>9.1%}  {each['recall']:>6.1%}  "
            f"{each['f1']:>5.1%}  {each['images']:>6,.0f}"
        )
    return "\n".join(lines)


def figures(
    vit: Vit, dataset: Dataset, split: Images, logits: torch.Tensor, target: torch.Tensor, run: Path
) -> Iterator[tuple[str, Figure]]:
    """Every picture with its name, one after the other."""
    config, names = read_config(run), dataset.classes
    an_epoch = steps_an_epoch(len(dataset.train), config.batch, drop_last=config.data.drop_last)
    yield "curves", pictures.history(tracking.read_events(run), steps_an_epoch=an_epoch)
    counts = evaluate.confusion(logits, target, len(names))
    yield "confusion", pictures.confusion(counts, names, title=f"{len(target):,} images")
    found = evaluate.calibration(logits, target)
    some = found.images > 0
    kept = [value[some].tolist() for value in (found.confidence, found.accuracy, found.images)]
    yield "calibration", pictures.reliability(*kept, error=found.error)
    yield "samples", pictures.pictures(samples(dataset, split))
    yield from attention(vit, dataset, split, logits, target)
    yield from learned(vit)


MOST_CLASSES = 40
"""Samples are drawn of so many classes."""
SHOWN = 8


def samples(dataset: Dataset, split: Images, *, each: int = SHOWN) -> dict[str, list[torch.Tensor]]:
    """The first pictures of every class that has some, as the model sees them, in [0, 1]."""
    found = {}
    for number in split.target.unique()[:MOST_CLASSES].tolist():
        rows = (split.target == number).nonzero().flatten()[:each].tolist()
        image, _ = next(data.readings(dataset, split.take(rows)))
        found[dataset.classes[number]] = list(dataset.pixels(image))
    return found


def attention(
    vit: Vit, dataset: Dataset, split: Images, logits: torch.Tensor, target: torch.Tensor
) -> Iterator[tuple[str, Figure]]:
    """What is read of pictures, right and wrong ones: on average, by rollout, and head by head."""
    guess = logits.argmax(dim=1).cpu()
    wrong = spread((guess != target.cpu()).nonzero().flatten(), SHOWN // 2)
    right = spread((guess == target.cpu()).nonzero().flatten(), SHOWN - len(wrong))
    rows = torch.cat([right, wrong]).tolist()
    image, label = next(data.readings(dataset, split.take(rows), device=logits.device))
    with torch.no_grad():
        maps = vit.attention_maps(image.to(next(vit.parameters()).dtype))
    c = vit.config
    how: dict[str, Any] = {
        "grid": c.grid, "prefix": c.prefix, "size": c.size, "class_token": c.class_token
    }  # fmt: skip
    truth = [dataset.classes[k] for k in label.tolist()]
    said = [dataset.classes[int(guess[row])] for row in rows]
    pictures = dataset.pixels(image)
    both = {
        "mean of layers\nand heads": pictures.class_attention(maps, **how),
        "rollout": pictures.rollout(maps, **how),
    }
    yield "attention", pictures.attention_grid(pictures, both, truth, said)
    last = maps[-1:]
    heads = {
        f"last layer,\nhead {head + 1}": pictures.class_attention(
            last[:, :, head : head + 1], **how
        )
        for head in range(c.heads)
    }
    yield "heads", pictures.attention_grid(pictures, heads, truth, said)


def spread(rows: torch.Tensor, most: int) -> torch.Tensor:
    """So many of the rows at most, from the first to the last."""
    places = torch.linspace(0, len(rows) - 1, min(most, len(rows)))
    return rows[places.long()]


def learned(vit: Vit) -> Iterator[tuple[str, Figure]]:
    """Positions, where they are a table, and patch filters, where they are one kernel."""
    c = vit.config
    if vit.pos_embed is not None:
        table = vit.pos_embed.detach()[0, c.prefix if c.position_tokens == "all" else 0 :]
        yield "positions", pictures.positions(table, grid=c.grid)
    if isinstance(vit.patch_embed, PatchEmbed):
        yield "filters", pictures.filters(vit.patch_embed.proj.weight.detach())


if __name__ == "__main__":
    cli.run(main)
