"""How much the seed matters: `python -m experiments.variance RECIPE [--levels 4] [--run]`.

Trains every combination of a few seeds of the initial weights, of the order of the images and of
the augmentation, and splits the variance of the final values among the three. Without --run it
prints what that takes. Plans of questions take their standard deviation from the stored row.
"""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments import cli
from experiments.recipes import RECIPES
from experiments.study import question, runs
from experiments.study.pages import Row, Table, machine
from experiments.study.rows import Rows
from experiments.study.runs import Job
from experiments.study.workers import Making
from vitx.measure import stats
from vitx.registry import nearest
from vitx.settings import override
from vitx.training import tracking
from vitx.training.config import TrainConfig, identity

PROG = "python -m experiments.variance"
SOURCES = ("seed_init", "seed_order", "seed_augment")
NAMES = {"seed_init": "initial weights", "seed_order": "order", "seed_augment": "augmentation"}


@dataclass(frozen=True)
class Settings(Making):
    """Measure the variance over seeds, and where it comes from."""

    levels: int = 4
    """Seeds of each source; all their combinations are trained."""
    held_out: int = 8
    """Runs with seeds of their own, which the prediction is checked against."""
    run: bool = False
    """Make the runs that are missing and print the result."""


def main(args: list[str]) -> None:
    """Read a recipe's or question's name; print the plan, or measure."""
    if not args or args[0] in ("-h", "--help"):
        print(
            f"usage: {PROG} RECIPE [--run]\n\nrecipes: {', '.join(RECIPES)}, or a question's name"
        )
        raise SystemExit(0 if args else 2)
    name, *flags = args
    settings = cli.parse(Settings, flags, prog=f"{PROG} {name}")
    cli.at_least(settings, levels=2, held_out=0)
    base = _base(name, settings.data_root)
    crossed, held_out = jobs(name, base, settings)
    left = runs.missing([*crossed, *held_out], runs.ended(settings.out), fresh=settings.fresh)
    print(f"{len(crossed)} runs, and {len(held_out)} held out; {len(left)} of them to be made")
    words = [name, "--run", "--levels", str(settings.levels)]
    words += ["--held-out", str(settings.held_out)]
    if not settings.run:
        print(f"make them: {PROG} {shlex.join([*words, *settings.passed_on])}")
        return
    settings.make([*crossed, *held_out], "experiments.variance", words)
    if not settings.only_runs:
        found = row(name, base, crossed, held_out, runs.ended(settings.out))
        with tracking.Run(
            settings.out, f"variance-{name}", "row", found["config"], mode=settings.wandb or None
        ) as run:
            shown = table([Rows(run.folder).add("variance", **found)])
            run.table("variance", shown.header, shown.body)
        print(f"{shown.markdown()}\nvariance: {run.folder}")


def jobs(name: str, base: TrainConfig, settings: Settings) -> tuple[list[Job], list[Job]]:
    """The runs of all combinations, and those of other seeds."""
    levels = range(1, settings.levels + 1)
    group = f"variance-{name}"
    crossed = []
    for values in itertools.product(levels, repeat=len(SOURCES)):
        seeds = dict(zip(SOURCES, values, strict=True))
        name = ",".join(f"{source.partition('_')[2]}={seed}" for source, seed in seeds.items())
        crossed.append(Job(group, name, override(base, **seeds)))
    others = [
        Job(group, f"seed={seed}", override(base, seed=seed))
        for seed in range(1000, 1000 + settings.held_out)
    ]
    return crossed, others


def row(
    name: str,
    base: TrainConfig,
    crossed: Sequence[Job],
    held_out: Sequence[Job],
    found: Mapping[str, runs.Ended],
) -> dict[str, Any]:
    """The fields of the row: each metric's mean, deviation, shares, and held-out values."""
    failed = [found[job.key].error for job in (*crossed, *held_out) if found[job.key].error]
    if failed:
        raise ValueError(f"{len(failed)} runs failed: {failed[0]}")
    levels = round(len(crossed) ** (1 / len(SOURCES)))
    metrics = {}
    for metric in (tracking.VAL_LOSS, tracking.VAL_ACCURACY):
        values = np.array([found[job.key].values[metric] for job in crossed])
        split = stats.components(values.reshape((levels,) * len(SOURCES)))
        held = [found[job.key].values[metric] for job in held_out]
        metrics[metric] = {
            "mean": split.mean, "std": split.std, "std_low": split.std_low,
            "std_high": split.std_high, "low": split.low, "high": split.high,
            "shares": dict(zip((*SOURCES, "rest"), split.shares, strict=True)),
            "held_out": held, "values": values.tolist(),
        }  # fmt: skip
    made = [found[job.key] for job in (*crossed, *held_out)]
    return {
        "what": "variance",
        "name": name,
        "base": identity(base),
        "config": runs.lasting(base),
        "levels": levels,
        "runs": len(crossed),
        "metrics": metrics,
        "device": runs.devices(run.device for run in made),
        "before": runs.sources([run.environment for run in made]),
    }


def table(found: Sequence[Row]) -> Table:
    """The spread over seeds of each recipe, and where it comes from."""
    header = ("recipe", "metric", "runs", "mean", "standard deviation (95 %)", *NAMES.values(),
              "together", "held-out seeds within", "machine")  # fmt: skip
    body = []
    for one in found:
        for metric, s in one["metrics"].items():
            inside = [s["low"] <= value <= s["high"] for value in s["held_out"]]
            body.append(
                (one["name"], metric, str(one["runs"]), f"{s['mean']:.4f}",
                 f"{s['std']:.4f} ({s['std_low']:.4f} to {s['std_high']:.4f})",
                 *(f"{share:.0%}" for share in s["shares"].values()),
                 f"{sum(inside)} of {len(inside)}", machine(one))
            )  # fmt: skip
    return Table(header, body)


def _base(name: str, data_root: str) -> TrainConfig:
    if name in RECIPES:
        base = RECIPES[name]
    elif name.replace("-", "_") in question.names():
        base = question.read(name).arms[0].config
    else:
        choices = (*RECIPES, *question.names())
        raise ValueError(f"recipe = {name!r} is not known; {nearest(name, choices)}")
    if not base.data.has_val:
        raise ValueError(f"{name} holds no images out for validation, which this reads")
    return override(base, **{"data.root": data_root}) if data_root else base


if __name__ == "__main__":
    cli.run(main)
