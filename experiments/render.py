"""Evidence of training: rows from finished runs, and the pages that are rendered from them.

`python -m experiments.results --keep RUN…` adds rows to `experiments/results`; without runs it only
rewrites the marked parts of experiments/README.md and tests/README.md.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.figure import Figure

from experiments import cli, variance
from experiments.recipes import RECIPES
from experiments.study import answer, pages, plots, rows
from experiments.study.pages import RESULTS, ROOT, Row, Table, machine
from experiments.study.question import paired
from experiments.study.runs import lasting, read_config
from vitx import pictures
from vitx.data.loader import steps_an_epoch
from vitx.measure import stats
from vitx.measure.stats import mean_interval
from vitx.model.cost import cost, training_macs
from vitx.settings import flat
from vitx.training import tracking
from vitx.training.config import FREE, TrainConfig

READMES = (ROOT / "experiments" / "README.md", ROOT / "tests" / "README.md")


def row_of(run: Path) -> Row:
    """The row of a finished training run: result, curve, cost, configuration and environment."""
    config = read_config(run)
    recipe = json.loads((run / "run.json").read_text(encoding="utf8"))["group"]
    if recipe not in RECIPES:
        raise ValueError(f"{run} is no run of a recipe; keep the folder of its answer instead")
    summary, environment = (
        json.loads((run / f"{name}.json").read_text(encoding="utf8"))
        for name in ("summary", "environment")
    )
    keys = ("step", f"{config.curve}/accuracy", f"{config.curve}/loss")
    events = [event for event in tracking.read_events(run) if keys[1] in event]
    found = cost(config.model)
    images = images_seen(config)
    return {
        "schema": rows.SCHEMA,
        "kind": "accuracy",
        "id": f"{environment['time']}-0",
        "what": "run",
        "recipe": recipe,
        "device": json.loads((run / "config.json").read_text(encoding="utf8"))["device"],
        "seed": config.seed,
        "steps": config.steps,
        "batch": config.batch,
        "parameters": found.parameters,
        "macs": found.macs,
        "training_flops": 2 * training_macs(config.model) * images,
        "curve_of": config.curve,
        "curve": [[event[key] for key in keys] for event in events],
        "config": lasting(config),
        "environment": environment,
    } | summary


def images_seen(config: TrainConfig) -> int:
    """Training images of all steps; an epoch's last batch may be smaller."""
    images = config.data.train_images
    if config.data.drop_last or not images:
        return config.steps * config.batch
    epochs, rest = divmod(config.steps, steps_an_epoch(images, config.batch, drop_last=False))
    return epochs * images + rest * config.batch


def run_table(found: Sequence[Row]) -> Table:
    """Every recipe that was run, its seeds together."""
    header = ("recipe", "changed", "steps", "seeds", "test accuracy", "seconds a seed",
              "CPU seconds", "PFLOP", "machine")  # fmt: skip
    body = []
    for (recipe, what, steps, where), some in groups(found).items():
        seconds, cpu, flops = (
            statistics.mean(row[name] for row in some)
            for name in ("seconds", "cpu_seconds", "training_flops")
        )
        body.append(
            (recipe, what, f"{steps:,}", str(len(some)), accuracy_text(some), f"{seconds:,.0f}",
             f"{cpu:,.0f}", f"{flops / 1e15:.2g}", where)
        )  # fmt: skip
    return Table(header, body)


def groups(found: Sequence[Row]) -> dict[tuple[str, str, int, str], list[Row]]:
    """The latest run of every seed, by recipe, changed settings, steps and machine."""
    by: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in found:
        if row.get("what") == "run":
            key = (row["recipe"], changed(row), row["steps"], machine(row))
            by.setdefault(key, []).append(row)
    return {key: rows.latest(some, "seed") for key, some in by.items()}


def changed(row: Row) -> str:
    """The settings in which a run differs from its recipe, but for seed, steps and FREE ones."""
    recipe = flat(RECIPES[row["recipe"]])
    free = (*FREE, "seed", "steps")
    found = [f"{k}={v}" for k, v in row["config"].items() if k not in free and recipe[k] != v]
    return ", ".join(found) or "–"


def accuracy_text(some: Sequence[Row]) -> str:
    """The mean with its interval over seeds; of one seed the standard error of its images."""
    values = [row["test/accuracy"] for row in some]
    if len(values) == 1:
        return f"{values[0]:.2%} ± {some[0]['test/standard_error']:.2%} (one seed)"
    if len(values) < 3:
        return f"{statistics.mean(values):.2%} (two seeds)"
    found = mean_interval(values)
    return f"{found.value:.2%} ({found.low:.2%} to {found.high:.2%})"


def share_table(found: Sequence[Row]) -> Table:
    """The time of the CIFAR-10 recipes as a share of 100 epochs of the project's code.

    From pairs in one process: images of a run over the 5 million of the project's, over the ratio
    of the rates, readings of the curve included on both sides.
    """
    pairs = [row for row in found if row.get("comparison") == "epoch"]
    body = []
    for (recipe, what, steps, where), some in groups(found).items():
        ratio = next((row for row in reversed(pairs) if machine(row) == where), None)
        if recipe != "cifar10" or what != "–" or ratio is None:
            continue
        part = steps * some[0]["batch"] / PROJECT_IMAGES
        low, value, high = (part / ratio[f"ratio{end}"] for end in ("_high", "", "_low"))
        body.append(
            (f"{recipe}, {steps:,} steps", accuracy_text(some), str(len(some)),
             f"{value:.1%} ({low:.1%} to {high:.1%})", where)
        )  # fmt: skip
    header = ("run", "test accuracy", "seeds", "share of the original's time (95 %)", "machine")
    return Table(header, body)


def fault_table(found: Sequence[Row]) -> Table:
    """Counts of the last campaign, a line a fault."""
    latest = rows.latest([row for row in found if row["kind"] == "fault"], "fault")
    body = [
        (row["fault"], str(row["trials"]), str(row["passed"]), row["environment"]["commit"][:7])
        for row in latest
    ]
    return Table(("fault", "trials", "passed", "commit"), body)


def answers(found: Sequence[Row]) -> list[Row]:
    """The latest answer to each question on each machine."""
    said = [row for row in found if row.get("what") == "answer"]
    return rows.latest(said, "question", "device", *pages.MACHINE)


def answer_table(found: Sequence[Row]) -> Table:
    """Every arm of every question that was answered, null results among them."""
    header = ("question", "arm", "Δ metric (all arms at once, 95 %)", "p", "verdict",
              "Δ images/s", "speed", "Δ MACs", "seeds", "run minutes", "machine")  # fmt: skip
    body = []
    for row in answers(found):
        for cells in answer.table(row).records():
            metric = f"Δ {row['metric']}"
            change = f"{cells[metric]} {row['metric']}" if metric in cells else "–"
            body.append(
                (row["question"], cells["arm"], change, cells.get("p", "–"),
                 cells.get("verdict", "–"), cells["Δ images/s"], cells["speed"], cells["Δ MACs"],
                 cells["pairs"], f"{row['seconds'] / 60:.0f}", machine(row))
            )  # fmt: skip
    return Table(header, body)


WHOLE = "-whole"
"""How the name of a sweep ends that lets every trial of another one end."""
UNCHANGED = "unchanged"
"""What a sweep's command is called with none of its parameters varied."""


def sweep_table(found: Sequence[Row]) -> Table:
    """What each sweep found, on seeds that none of its trials had, beside the unchanged command."""
    header = ("sweep", "trials", "stopped early", "steps saved", "settings", "metric",
              "in the sweep", "on fresh seeds (95 %)", "Δ to unchanged (all at once, 95 %)", "p",
              "verdict", "seeds", "machine")  # fmt: skip
    body = []
    for row in sweeps(found):
        saved, trials = row["saved"], row["trials"]
        ended = sum(one["state"] in ("complete", "pruned", "fail") for one in trials)
        count = f"{ended} of {len(trials)}" if ended < len(trials) else str(ended)
        count += f" (stale: {row['stale']})" if row["stale"] else ""
        effects = [None, *_gains(row)]
        for one, effect in zip(row["confirmed"], effects, strict=True):
            among = f" (mean of {one['seeds']})" if one["seeds"] > 1 else ""
            values = _whole(one)
            body.append(
                (row["sweep"], count, str(saved["stopped"]), f"{saved['share']:.0%}",
                 cli.said(one["settings"]) or UNCHANGED, row["metric"],
                 "–" if one["value"] is None else f"{one['value']:.4g}{among}",
                 _interval(mean_interval(list(values.values())) if len(values) > 1 else None, ""),
                 _interval(effect and effect.difference, "+"),
                 f"{effect.p:.3f}" if effect else "–", effect.verdict if effect else "–",
                 f"{len(values)} of {len(one['values'])}", machine(row))
            )  # fmt: skip
    return Table(header, body)


def sweeps(found: Sequence[Row]) -> list[Row]:
    """The latest row of each sweep on each machine."""
    said = [row for row in found if row.get("what") == "sweep"]
    return rows.latest(said, "sweep", "device", *pages.MACHINE)


def stopping_table(found: Sequence[Row]) -> Table:
    """What stopping early saved, and what it cost: the best of a sweep that did beside the best of
    one that let every trial end, on the same fresh seeds."""
    header = ("sweep", "steps saved", "metric", "best, stopped early", "best of whole trials",
              "Δ in pairs (95 %)", "seeds", "machine")  # fmt: skip
    where = {(row["sweep"], machine(row)): row for row in sweeps(found)}
    body = []
    for (name, place), row in where.items():
        whole = where.get((f"{name}{WHOLE}", place))
        if whole is None:
            continue
        values, others = (_whole(one["confirmed"][1]) for one in (row, whole))
        pairs = list(paired(others, values).values())
        each = (list(values.values()), list(others.values()), pairs)
        shown = [_interval(mean_interval(some) if len(some) > 1 else None, sign)
                 for some, sign in zip(each, ("", "", "+"), strict=True)]  # fmt: skip
        saved = f"{row['saved']['share']:.0%}"
        body.append((name, saved, row["metric"], *shown, str(len(pairs)), place))
    return Table(header, body)


def _gains(row: Row) -> list[stats.Effect | None]:
    """The confirmed settings of a sweep beside the unchanged command, judged together."""
    unchanged, *others = map(_whole, row["confirmed"])
    differences = [list(paired(unchanged, one).values()) for one in others]
    return stats.effects(differences, margin=0.0, lower_is_better=row["goal"] == "minimize")


def _whole(candidate: Mapping[str, Any]) -> dict[str, float]:
    """The values by seed of the runs that reached one."""
    return {seed: value for seed, value in candidate["values"].items() if value is not None}


def _interval(found: stats.Interval | None, sign: str) -> str:
    if found is None:
        return "–"
    return f"{found.value:{sign}.4f} ({found.low:{sign}.4f} to {found.high:{sign}.4f})"


def variance_table(found: Sequence[Row]) -> Table:
    """The latest seed variance of each recipe."""
    stored = [row for row in found if row["kind"] == "variance"]
    return variance.table(rows.latest(stored, "name", "device", *pages.MACHINE))


CLAIM = 0.755
"""Test accuracy after 100 epochs that the from-scratch project states."""
PROJECT_IMAGES = 100 * 50_000
"""Images that it trains on, epoch by epoch."""


def lines(found: Sequence[Row]) -> dict[str, tuple[float, list[list[tuple[float, float]]]]]:
    """Mean CPU seconds and the seeds' curves of the CIFAR-10 recipes that were run as they are."""
    runs = {}
    for (recipe, what, steps, _), some in groups(found).items():
        if recipe in ("scratch-cifar10", "cifar10") and what == "–":
            split = {"val": "validation", "test": "test"}[some[0]["curve_of"]]
            seeds = "one seed" if len(some) == 1 else f"{len(some)} seeds"
            curves = [
                [(step / steps, accuracy) for step, accuracy, _ in row["curve"]] for row in some
            ]
            seconds = statistics.mean(row["cpu_seconds"] for row in some)
            runs[f"{recipe}, {steps:,} steps: {split}, {seeds}"] = seconds, curves
    return runs


def curves_figure(found: Sequence[Row]) -> Figure:
    """The curves of the CIFAR-10 recipes beside what the from-scratch project states."""
    return plots.costs(lines(found), claim=CLAIM, label=f"{CLAIM:.1%}, stated by the project")


def questions_figure(found: Sequence[Row]) -> Figure:
    """Every arm whose question is judged by accuracy."""
    points = [
        replace(point, label=f"{row['question'].replace('_', ' ')}: {_bare(point.label)}")
        for row in answers(found)
        if row["metric"] == tracking.VAL_ACCURACY
        for point in answer.points(row)
    ]
    return plots.effects(
        points,
        label="change of validation accuracy,\npoints",
        title="arm minus baseline, 95 % for all arms of a question at once",
    )


def _bare(arm: str) -> str:
    """An arm's name without the fields, which the question tells."""
    return re.sub(r"[\w.]+=", "", arm)


FIGURES: dict[Path, Callable[[Sequence[Row]], Figure]] = {
    RESULTS / "cifar10.svg": curves_figure,
    RESULTS / "questions.svg": questions_figure,
}

TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "runs": run_table,
    "shares": share_table,
    "faults": fault_table,
    "answers": answer_table,
    "sweeps": sweep_table,
    "stopping": stopping_table,
    "variance": variance_table,
}


def committed() -> list[Row]:
    """All rows of the checkout: those of training, and of timing."""
    folders = (RESULTS, ROOT / "benchmarks" / "results")
    return sorted((row for folder in folders for row in rows.read_all(folder)), key=rows.when)


@dataclass(frozen=True)
class Settings:
    """Rewrite the rendered parts of experiments/README.md and tests/README.md."""

    keep: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN")] = ()
    """Finished runs, or folders of rows, that are added to the evidence first."""


def main(args: list[str]) -> None:
    """Commit rows if asked, then rewrite the pages and draw the figures."""
    settings = cli.parse(Settings, args, prog="python -m experiments.results")
    for folder in settings.keep:
        kept = rows.read(folder / "rows.jsonl") if (folder / "rows.jsonl").exists() else None
        name = f"{folder.resolve().parent.name}-{folder.resolve().name}"
        rows.commit(kept or [row_of(folder)], RESULTS, name)
    found = committed()
    for path in READMES:
        text = path.read_text(encoding="utf8")
        path.write_text(pages.fill(text, TABLES, found), encoding="utf8")
    for path, draw in FIGURES.items():
        pictures.save(draw(found), path)
    print(f"rendered {len(found)} rows", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
