"""How much the seed matters: `python -m experiments.variance RECIPE [--levels 4] [--run]`.

Trains every combination of a few seeds of the initial weights, of the order of the images and of
the augmentation, and splits the variance of the final values among the three. Without --run it
prints what that takes. Previews of questions read their standard deviation from the result.
"""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments import cli
from experiments.recipes import RECIPES
from experiments.study import kinds, question, runs
from experiments.study.kinds import SOURCES, Variance, split
from experiments.study.results import Results
from experiments.study.runs import Job
from experiments.study.tables import variance_table
from experiments.study.workers import Making
from vitx.registry import UserError, choose
from vitx.settings import override
from vitx.training import tracking
from vitx.training.config import TrainConfig, identity

PROG = "python -m experiments.variance"


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
    """Read a recipe's or question's name; print the preview, or measure."""
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: {PROG} RECIPE [--run]\n")
        print(f"recipes: {', '.join(RECIPES)}, or a question's name")
        raise SystemExit(0 if args else 2)
    name, *flags = args
    settings = cli.parse(Settings, flags, prog=f"{PROG} {name}")
    cli.at_least(settings, levels=2, held_out=0)
    base = _base(name, settings.data_root)
    crossed, held_out = jobs(name, base, settings)
    both = [*crossed, *held_out]
    left = runs.missing(both, runs.ended(settings.out), fresh=settings.fresh)
    print(f"{len(crossed)} runs, and {len(held_out)} held out; {len(left)} of them to be made")
    words = [name, "--run", f"--levels={settings.levels}", f"--held-out={settings.held_out}"]
    if not settings.run:
        print(f"make them: {PROG} {shlex.join([*words, *settings.passed_on])}")
        return
    settings.make(both, "experiments.variance", words)
    if not settings.only_runs:
        config, mode = runs.lasting(base), settings.wandb
        with tracking.Run(settings.out, f"variance-{name}", "result", config, mode=mode) as run:
            ended = runs.ended(settings.out)
            shown = variance_table([add(Results(run.folder), name, base, crossed, held_out, ended)])
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


def add(
    results: Results,
    name: str,
    base: TrainConfig,
    crossed: Sequence[Job],
    held_out: Sequence[Job],
    ended: Mapping[str, runs.Ended],
) -> Variance:
    """Append what the runs give: each metric's variance components and held-out values."""
    made, held = ([ended[job.key] for job in jobs] for jobs in (crossed, held_out))
    both = [*made, *held]
    if failed := [run.error for run in both if run.error]:
        raise UserError(f"{len(failed)} runs failed: {failed[0]}")
    spreads = {}
    for metric in (tracking.VAL_LOSS, tracking.VAL_ACCURACY):
        values, others = (tuple(run.values[metric] for run in part) for part in (made, held))
        spreads[metric] = kinds.Spread(components=split(values), values=values, held_out=others)
    return results.add(
        Variance,
        name=name,
        base=identity(base),
        config=runs.lasting(base),
        levels=round(len(crossed) ** (1 / len(SOURCES))),
        runs=len(crossed),
        metrics=spreads,
        device=runs.devices(run.device for run in both),
        before=runs.sources([run.environment for run in both]),
    )


def _base(name: str, data_root: str) -> TrainConfig:
    """The configuration of a recipe, or of a question's baseline."""
    if name.replace("-", "_") in question.names():
        base = question.read(name).arms[0].config
    else:
        base = RECIPES[choose("recipe", name, (*RECIPES, *question.names()))]
    if not base.data.has_val:
        raise UserError(f"{name} holds no images out for validation, which this reads")
    return override(base, **{"data.root": data_root}) if data_root else base


if __name__ == "__main__":
    cli.run(main)
