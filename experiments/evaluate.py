"""Evaluate a finished run: `python -m experiments.evaluate RUN [--split val]`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

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
from vitx.data.loader import steps_per_epoch
from vitx.data.sources import Images
from vitx.files import read_json, write_json
from vitx.model.layers import PatchEmbed
from vitx.model.vit import Vit
from vitx.registry import UserError
from vitx.settings import override
from vitx.training import evaluate, parallel, tracking

PROG = "python -m experiments.evaluate"
RESULT = "evaluation.json"
CONFUSION = "confusion.csv"
K = 20
"""Neighbours that vote, where there are so many training images."""


@dataclass(frozen=True)
class Settings:
    """Accuracy, calibration, frozen features and pictures of a finished run, into its folder."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    split: Literal["val", "test"] = "test"
    """Split that is evaluated."""
    root: str = ""
    """Folder of the data, if not the one it was trained on."""
    probe_images: int = 10_000
    """Training images that k-NN and the linear probe are fitted on, as many of each class; 0 for
    all."""
    device: str = ""
    """Device; empty for the accelerator of this machine, else the CPU."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All numbers of a run on a split. Shares lie in [0, 1]."""

    run: str
    split: str
    images: int
    top1: float
    top1_standard_error: float
    top5: float
    loss: float
    """Mean cross-entropy, nats."""
    calibration_error: float
    nearest_neighbours: float
    """Accuracy of k-NN on frozen features; likewise of the linear probe."""
    k: int
    """Neighbours that vote."""
    linear_probe: float | None
    """None where the training images are of one class."""
    probe_images: int
    """Training images that both were fitted on."""
    classes: dict[str, dict[str, float]]
    """Precision, recall, f1 and images of each class."""
    skipped: list[str]
    """Pictures that could not be decoded."""

    def __str__(self) -> str:
        lines = [
            f"{self.run}, {self.split} split, {self.images:,} images",
            f"top-1 accuracy      {self.top1:.2%} ± {self.top1_standard_error:.2%} (standard "
            "error)",
            f"top-5 accuracy      {self.top5:.2%}",
            f"cross-entropy       {self.loss:.4f} nats",
            f"calibration error   {self.calibration_error:.2%} (expected, 15 bins)",
            f"{f'k-NN, k = {self.k}':<20}{self.nearest_neighbours:.2%} (frozen features, fitted on "
            f"{self.probe_images:,} training images)",
            "linear probe        "
            + (
                "can't be fitted on one class"
                if self.linear_probe is None
                else f"{self.linear_probe:.2%}"
            ),
        ]
        if self.skipped:
            lines.append(f"skipped as bad: {len(self.skipped)} pictures")
        width = max(len(name) for name in self.classes)
        lines.append(f"{'class':<{width}}  precision  recall     F1  images")
        form = "  {precision:>9.1%}  {recall:>6.1%}  {f1:>5.1%}  {images:>6,.0f}"
        lines += [f"{name:<{width}}" + form.format(**of) for name, of in self.classes.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Predictions:
    """A model's logits (images, classes) on a split, and the class numbers (images)."""

    vit: Vit
    dataset: Dataset
    split: Images
    """Without pictures that were skipped as bad."""
    batch: int
    logits: torch.Tensor
    target: torch.Tensor


def main(args: list[str]) -> None:
    """Print the table, write it as evaluation.json, draw the pictures."""
    settings = cli.parse(Settings, args, prog=PROG)
    cli.at_least(settings, probe_images=0)
    of = predict(settings)
    evaluation = measure(of, settings.run.name, settings.split, settings.probe_images)
    write_json(settings.run / RESULT, asdict(evaluation))
    counts = evaluate.confusion(of.logits, of.target, len(of.dataset.classes))
    confusion_table(counts, of.dataset.classes).write_csv(settings.run / CONFUSION)
    print(evaluation)
    for name, figure in figures(of, settings.run):
        print(pictures.save(figure, settings.run / "figures" / f"{name}.png"))


def predict(settings: Settings) -> Predictions:
    """Predict a split of the run's own data. Raises ValueError for other data, or no such split."""
    config = read_config(settings.run)
    if settings.root:
        config = override(config, **{"data.root": settings.root})
    device = parallel.device(settings.device)
    vit = vitx.load(settings.run).to(device).eval()
    dataset = data.load(config.data, size=config.model.size)
    if not dataset.is_of(read_json(settings.run / "summary.json").get("fingerprint", "")):
        raise UserError(
            f"the data are not those that {settings.run} was trained on: other images, or others "
            "in the splits"
        )
    split = getattr(dataset, settings.split)
    if not len(split):
        raise UserError(f"the data of {settings.run} have no {settings.split} split")
    batch = min(config.batch, evaluate.BATCH)
    logits, target, indices = evaluate.predict(vit, dataset, split, batch=batch)
    return Predictions(vit, dataset, split.take(indices.tolist()), batch, logits, target)


def measure(of: Predictions, run: str, split: str, probe_images: int) -> Evaluation:
    """All numbers. Features are fitted on so many training images and scored on the split."""
    score, train = evaluate.score(of.logits, of.target), of.dataset.train
    probed = train.take(evaluate.balanced(train.target, probe_images))
    fitted, scored = (
        evaluate.features(of.vit, of.dataset, part, batch=of.batch) for part in (probed, of.split)
    )
    k = min(K, len(fitted[1]))
    return Evaluation(
        run=run,
        split=split,
        images=score.images,
        top1=score.accuracy,
        top1_standard_error=score.standard_error,
        top5=evaluate.top(of.logits, of.target, 5),
        loss=score.loss,
        calibration_error=evaluate.calibration(of.logits, of.target).error,
        nearest_neighbours=evaluate.nearest_neighbours(fitted, scored, k=k),
        k=k,
        linear_probe=evaluate.linear_probe(fitted, scored),
        probe_images=len(fitted[1]),
        classes=evaluate.by_class(of.logits, of.target, of.dataset.classes),
        skipped=list(of.dataset.skipped),
    )


def confusion_table(counts: np.ndarray, classes: Sequence[str]) -> Table:
    """Images by true class (lines) and predicted class (columns)."""
    lines = zip(classes, counts.tolist(), strict=True)
    return Table(("true class", *classes), [(name, *map(str, line)) for name, line in lines])


def figures(of: Predictions, run: Path) -> Iterator[tuple[str, Figure]]:
    """Every picture with its name, one after the other."""
    config, names = read_config(run), of.dataset.classes
    train = len(of.dataset.train)
    per_epoch = steps_per_epoch(train, config.batch, drop_last=config.data.drop_last)
    yield "curves", pictures.history(tracking.read_events(run), steps_per_epoch=per_epoch)
    counts = evaluate.confusion(of.logits, of.target, len(names))
    yield "confusion", pictures.confusion(counts, names, title=f"{len(of.target):,} images")
    calibration = evaluate.calibration(of.logits, of.target)
    bins = (calibration.confidence, calibration.accuracy, calibration.images)
    filled = [values[calibration.images > 0].tolist() for values in bins]
    yield "calibration", pictures.reliability(*filled, error=calibration.error)
    yield "samples", pictures.pictures(samples(of.dataset, of.split))
    yield from attention(of)
    yield from learned(of.vit)


MOST_CLASSES = 40
"""Samples are drawn of so many classes."""
SHOWN = 8


def samples(dataset: Dataset, split: Images, *, each: int = SHOWN) -> dict[str, list[torch.Tensor]]:
    """The first pictures of every class that has some, as the model sees them, in [0, 1]."""
    shown = {}
    for number in split.target.unique()[:MOST_CLASSES].tolist():
        indices = (split.target == number).nonzero().flatten()[:each].tolist()
        image, _ = next(data.evaluation_batches(dataset, split.take(indices)))
        shown[dataset.classes[number]] = list(dataset.pixels(image))
    return shown


def attention(of: Predictions) -> Iterator[tuple[str, Figure]]:
    """What is read of pictures, right and wrong ones: on average, by rollout, and head by head."""
    guess, target = of.logits.argmax(dim=1).cpu(), of.target.cpu()
    wrong = spread((guess != target).nonzero().flatten(), SHOWN // 2)
    right = spread((guess == target).nonzero().flatten(), SHOWN - len(wrong))
    indices = torch.cat([right, wrong]).tolist()
    image, label = next(
        data.evaluation_batches(of.dataset, of.split.take(indices), device=of.logits.device)
    )
    with torch.no_grad():
        maps = of.vit.attention_maps(image.to(next(of.vit.parameters()).dtype))
    c, names = of.vit.config, of.dataset.classes
    grid, class_token = {"grid": c.grid, "prefix": c.prefix, "size": c.size}, c.class_token

    def read(layers: torch.Tensor) -> torch.Tensor:
        return pictures.class_attention(layers, **grid, class_token=class_token)

    shown, truth = of.dataset.pixels(image), [names[k] for k in label.tolist()]
    guessed = [names[int(guess[k])] for k in indices]
    both = {
        "mean of layers\nand heads": read(maps),
        "rollout": pictures.rollout(maps, **grid, class_token=class_token),
    }
    yield "attention", pictures.attention_grid(shown, both, truth, guessed)
    heads = {f"last layer,\nhead {k + 1}": read(maps[-1:, :, k : k + 1]) for k in range(c.heads)}
    yield "heads", pictures.attention_grid(shown, heads, truth, guessed)


def spread(indices: torch.Tensor, most: int) -> torch.Tensor:
    """So many of the indices at most, from the first to the last."""
    places = torch.linspace(0, len(indices) - 1, min(most, len(indices)))
    return indices[places.long()]


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
