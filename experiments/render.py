"""Evidence of training: results of finished runs, and the pages that are rendered from them.

`python -m experiments.render --keep RUN…` adds results to `experiments/results`; without runs it
only rewrites the marked parts of experiments/README.md and tests/README.md.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import msgspec
import tyro

from experiments import cli
from experiments.recipes import RECIPES
from experiments.study import kinds, pages, results
from experiments.study.pages import RESULTS, ROOT
from experiments.study.results import FILE, Result
from experiments.study.runs import lasting, read_config
from experiments.study.tables import FIGURES, TABLES
from vitx import pictures
from vitx.data.loader import steps_per_epoch
from vitx.files import read_json
from vitx.model.cost import cost, training_macs
from vitx.registry import UserError
from vitx.training import tracking
from vitx.training.config import TrainConfig
from vitx.training.evaluate import Score
from vitx.training.provenance import Environment

PROG = "python -m experiments.render"
READMES = (ROOT / "experiments" / "README.md", ROOT / "tests" / "README.md")


def trained(run: Path) -> kinds.Trained:
    """The result of a finished training run. Raises ValueError for a run of no recipe."""
    config = read_config(run)
    recipe = read_json(run / "run.json").get("group")
    if recipe not in RECIPES:
        raise UserError(f"{run} is no run of a recipe; keep the folder of its answer instead")
    try:
        environment = msgspec.convert(read_json(run / "environment.json"), Environment)
    except msgspec.ValidationError as error:
        raise UserError(f"{run / 'environment.json'} can't be read: {error}") from None
    accuracy, loss = f"{config.curve}/accuracy", f"{config.curve}/loss"
    events = [event for event in tracking.read_events(run) if accuracy in event]
    costs, summary = cost(config.model), read_json(run / "summary.json")
    shared = ("seconds", "cpu_seconds", "data", "fingerprint", "skipped")
    return kinds.Trained(
        id=f"{environment.time}-0",
        environment=environment,
        recipe=recipe,
        device=read_json(run / "config.json").get("device", "cpu"),
        seed=config.seed,
        steps=config.steps,
        batch=config.batch,
        parameters=costs.parameters,
        macs=costs.macs,
        training_flops=2 * training_macs(config.model) * images_seen(config),
        curve_of="val" if config.curve == "val" else "test",
        curve=tuple((int(event[tracking.STEP]), event[accuracy], event[loss]) for event in events),
        config=lasting(config),
        test=score(summary, "test"),
        val=score(summary, "val") if "val/accuracy" in summary else None,
        **{name: summary[name] for name in shared if name in summary},
    )


def score(summary: dict[str, float], split: str) -> Score:
    """The score of a split in a run's summary."""
    values = {field.name: summary[f"{split}/{field.name}"] for field in fields(Score)}
    return msgspec.convert(values, Score)


def images_seen(config: TrainConfig) -> int:
    """Training images of all steps; an epoch's last batch may be smaller."""
    images = config.data.train_images
    if config.data.drop_last or not images:
        return config.steps * config.batch
    epochs, rest = divmod(config.steps, steps_per_epoch(images, config.batch, drop_last=False))
    return epochs * images + rest * config.batch


def committed() -> list[Result]:
    """All results of training in the checkout."""
    return results.read_all(RESULTS)


@dataclass(frozen=True)
class Settings:
    """Rewrite the rendered parts of experiments/README.md and tests/README.md."""

    keep: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN")] = ()
    """Finished runs, or folders of results, that are added to the evidence first."""


def main(args: list[str]) -> None:
    """Commit results if asked, then rewrite the pages and draw the figures."""
    settings = cli.parse(Settings, args, prog=PROG)
    for folder in settings.keep:
        path = folder / FILE
        kept = results.read(path) if path.exists() else []
        name = f"{folder.resolve().parent.name}-{folder.resolve().name}"
        results.commit(kept or [trained(folder)], RESULTS, name)
    evidence = committed()
    for path in READMES:
        text = path.read_text(encoding="utf8")
        path.write_text(pages.fill(text, TABLES, evidence), encoding="utf8")
    for path, draw in FIGURES.items():
        pictures.save(draw(evidence), path)
    print(f"rendered {len(evidence)} results", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
