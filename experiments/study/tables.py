"""Tables and figures of committed results."""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from experiments import cli
from experiments.recipes import RECIPES
from experiments.study import answer, plots
from experiments.study.kinds import (
    SOURCES,
    Answer,
    Fault,
    SweepResult,
    Trained,
    Variance,
    paired,
    step_timings,
)
from experiments.study.pages import RESULTS, ROOT, Columns, Table, interval_text, machine
from experiments.study.pages import table as table_of
from experiments.study.results import Result, latest, of_kind
from vitx.measure.stats import Effect, Interval, mean_interval
from vitx.model.config import size
from vitx.pictures import architecture
from vitx.settings import flat
from vitx.training import tracking
from vitx.training.config import FREE

Results = Sequence[Result]
TIMINGS = ROOT / "benchmarks" / "results"
"""Committed results of timing."""


@dataclass(frozen=True)
class Group:
    """The latest run of every seed of a recipe, with the same settings, steps and machine."""

    recipe: str
    changed: str
    """Settings in which the runs differ from the recipe, but for seed, steps and FREE ones."""
    steps: int
    machine: str
    seeds: list[Trained]

    @property
    def accuracy(self) -> str:
        """The mean with its interval over seeds; of one seed the standard error of its images."""
        values = [run.test.accuracy for run in self.seeds]
        if len(values) == 1:
            return f"{values[0]:.2%} ± {self.seeds[0].test.standard_error:.2%} (one seed)"
        if len(values) == 2:
            return f"{statistics.mean(values):.2%} (two seeds)"
        return interval_text(mean_interval(values), ".2%")

    def mean(self, name: str) -> float:
        """Of a field over the seeds."""
        return statistics.mean(getattr(run, name) for run in self.seeds)


def groups(results: Results) -> list[Group]:
    """The groups, in the order of their first runs."""
    by_key: dict[tuple[str, str, int, str], list[Trained]] = {}
    for run in of_kind(results, Trained):
        recipe, free = flat(RECIPES[run.recipe]), (*FREE, "seed", "steps")
        changes = [f"{k}={v}" for k, v in run.config.items() if k not in free and recipe[k] != v]
        key = (run.recipe, ", ".join(changes) or "–", run.steps, machine(run))
        by_key.setdefault(key, []).append(run)
    return [Group(*key, latest(runs, lambda run: run.seed)) for key, runs in by_key.items()]


def run_table(results: Results) -> Table:
    """Every recipe that was run, its seeds together."""
    columns: Columns = {
        "recipe": lambda group: group.recipe,
        "changed": lambda group: group.changed,
        "steps": lambda group: f"{group.steps:,}",
        "seeds": lambda group: str(len(group.seeds)),
        "test accuracy": lambda group: group.accuracy,
        "seconds a seed": lambda group: f"{group.mean('seconds'):,.0f}",
        "CPU seconds": lambda group: f"{group.mean('cpu_seconds'):,.0f}",
        "PFLOP": lambda group: f"{group.mean('training_flops') / 1e15:.2g}",
        "machine": lambda group: group.machine,
    }
    return table_of(groups(results), columns)


def recipe_table(results: Results) -> Table:
    """Every recipe as it is: what it reached here, in what time, and its command."""
    reached = {
        group.recipe: (group.accuracy, f"{group.mean('seconds'):,.0f}")
        for group in groups(results)
        if group.changed == "–" and group.steps == RECIPES[group.recipe].steps
    }
    body = []
    for name, recipe in RECIPES.items():
        root = "" if name == "digits" else " --data.root DIR"
        weights = " --weights FILE" if recipe.weights else ""
        command = f"`python -m experiments.train {name}{root}{weights}`"
        body.append((name, *reached.get(name, ("–", "–")), command))
    return Table(("recipe", "test accuracy", "seconds per seed", "command"), body)


SEEN = "2026-12-01T06:43:59Z-0"
"""The run that README shows pictures of: the files `sees-*` in `experiments/results`."""


def seen_text(results: Results) -> str:
    """The run whose attention, positions and filters README shows, and how it was made."""
    run = next(run for run in of_kind(results, Trained) if run.id == SEEN)
    accuracy = f"{run.test.accuracy:.2%} ± {run.test.standard_error:.2%}, one seed"
    return (
        f"What a ViT has learned after {run.steps:,} steps of `{run.recipe}` (test accuracy "
        f"{accuracy}). "
        "Left: what the class token reads of eight test images. Middle: how alike the positions of "
        "the patches are. Right: the first principal components of the patch filters. Made by "
        f"`python -m experiments.train {run.recipe} --steps {run.steps} --data.root DIR` and "
        "`python -m experiments.evaluate RUN`."
    )


PROJECT_IMAGES = 100 * 50_000
"""Images that the from-scratch project trains on, epoch by epoch."""


def share_table(results: Results) -> Table:
    """The time of the CIFAR-10 recipes as a share of 100 epochs of the project's code.

    From pairs in one process: images of a run over the 5 million of the project's, over the ratio
    of the rates, evaluations of the curve included on both sides.
    """
    ratios = {machine(timing): timing.comparison.ratio for timing in step_timings(TIMINGS, "epoch")}
    body = []
    for group in groups(results):
        ratio = ratios.get(group.machine)
        if group.recipe != "cifar10" or group.changed != "–" or ratio is None:
            continue
        part = group.steps * group.seeds[0].batch / PROJECT_IMAGES
        share = Interval(part / ratio.value, part / ratio.high, part / ratio.low)
        body.append(
            (f"{group.recipe}, {group.steps:,} steps", group.accuracy, str(len(group.seeds)),
             interval_text(share, ".1%"), group.machine)
        )  # fmt: skip
    header = ("run", "test accuracy", "seeds", "share of the original's time (95 %)", "machine")
    return Table(header, body)


def fault_table(results: Results) -> Table:
    """Counts of the last campaign, one line per fault."""
    columns: Columns = {
        "fault": lambda result: result.fault,
        "trials": lambda result: str(result.trials),
        "passed": lambda result: str(result.passed),
        "commit": lambda result: (result.environment.commit or "–")[:7],
    }
    return table_of(latest(of_kind(results, Fault), lambda result: result.fault), columns)


def answers(results: Results) -> list[Answer]:
    """The latest answer to each question on each machine."""
    return latest(of_kind(results, Answer), lambda one: (one.question, machine(one)))


def answer_table(results: Results) -> Table:
    """Every arm of every question that was answered, null results among them."""
    header = ("question", "arm", "Δ metric (all arms at once, 95 %)", "p", "verdict",
              "Δ images/s", "speed", "Δ MACs", "seeds", "run minutes", "machine")  # fmt: skip
    body = []
    for one in answers(results):
        for cells in answer.table(one).records():
            cells = {"p": "–", "verdict": "–"} | cells
            names = ("p", "verdict", "Δ images/s", "speed", "Δ MACs", "pairs")
            change = cells.get(f"Δ {one.metric}")
            body.append(
                (one.question, cells["arm"], f"{change} {one.metric}" if change else "–",
                 *(cells[name] for name in names), f"{one.seconds / 60:.0f}", machine(one))
            )  # fmt: skip
    return Table(header, body)


WHOLE = "-whole"
"""How the name of a sweep ends that lets every trial of another one end."""
UNCHANGED = "unchanged"
"""What a sweep's command is called with none of its parameters varied."""


def sweep_table(results: Results) -> Table:
    """What each sweep gave on seeds that none of its trials had, beside the unchanged command."""
    header = ("sweep", "trials", "stopped early", "steps saved", "settings", "metric",
              "in the sweep", "on fresh seeds (95 %)", "Δ to unchanged (all at once, 95 %)", "p",
              "verdict", "seeds", "machine")  # fmt: skip
    body = []
    for sweep in sweeps(results):
        total, states = len(sweep.trials), [trial.state for trial in sweep.trials]
        ended = total - states.count("running") - states.count("waiting")
        trials = f"{ended} of {total}" if ended < total else str(ended)
        stale = f" (stale: {sweep.stale})" if sweep.stale else ""
        saved = (str(sweep.saved.stopped), f"{sweep.saved.share:.0%}")
        for one, gain in zip(sweep.confirmed, [None, *sweep.gains], strict=True):
            among = f" (mean of {one.seeds})" if one.seeds > 1 else ""
            body.append(
                (sweep.sweep, trials + stale, *saved, cli.label(one.settings) or UNCHANGED,
                 sweep.metric, "–" if one.value is None else f"{one.value:.4g}{among}",
                 _mean_text(one.reached), *_effect_texts(gain),
                 f"{len(one.reached)} of {len(one.values)}", machine(sweep))
            )  # fmt: skip
    return Table(header, body)


def _effect_texts(effect: Effect | None) -> tuple[str, str, str]:
    if effect is None:
        return "–", "–", "–"
    return interval_text(effect.difference, "+.4f"), f"{effect.p:.3f}", effect.verdict


def sweeps(results: Results) -> list[SweepResult]:
    """The latest result of each sweep on each machine."""
    return latest(of_kind(results, SweepResult), lambda sweep: (sweep.sweep, machine(sweep)))


def stopping_table(results: Results) -> Table:
    """What stopping early saved, and what it cost: the best of a sweep that did beside the best of
    one that let every trial end, on the same fresh seeds."""
    header = ("sweep", "steps saved", "metric", "best, stopped early", "best of whole trials",
              "Δ in pairs (95 %)", "seeds", "machine")  # fmt: skip
    by_name = {(sweep.sweep, machine(sweep)): sweep for sweep in sweeps(results)}
    body = []
    for (name, where), sweep in by_name.items():
        whole = by_name.get((f"{name}{WHOLE}", where))
        if whole is None:
            continue
        stopped, ended = (one.confirmed[1].reached for one in (sweep, whole))
        pairs = paired(ended, stopped)
        body.append(
            (name, f"{sweep.saved.share:.0%}", sweep.metric, _mean_text(stopped),
             _mean_text(ended), _mean_text(pairs, "+.4f"), str(len(pairs)), where)
        )  # fmt: skip
    return Table(header, body)


def _mean_text(by_seed: Mapping[str, float], form: str = ".4f") -> str:
    """The mean with its 95 % interval; a dash for fewer than two values."""
    return interval_text(mean_interval([*by_seed.values()]), form) if len(by_seed) > 1 else "–"


def variance_table(results: Results) -> Table:
    """The latest spread over seeds of each recipe, and where it comes from."""
    names = ("initial weights", "order", "augmentation", "together")
    assert len(names) == len(SOURCES) + 1
    header = ("recipe", "metric", "runs", "mean", "standard deviation (95 %)", *names,
              "held-out seeds within", "machine")  # fmt: skip
    body = []
    for one in latest(of_kind(results, Variance), lambda one: (one.name, machine(one))):
        for metric, spread in one.metrics.items():
            of = spread.components
            inside = sum(of.low <= value <= of.high for value in spread.held_out)
            body.append(
                (one.name, metric, str(one.runs), f"{of.mean:.4f}",
                 interval_text(Interval(of.std, of.std_low, of.std_high), ".4f"),
                 *(f"{share:.0%}" for share in of.shares), f"{inside} of {len(spread.held_out)}",
                 machine(one))
            )  # fmt: skip
    return Table(header, body)


CLAIM = 0.755
"""Test accuracy after 100 epochs that the from-scratch project states."""

Curve = list[tuple[float, float]]
"""Share of a run's steps, and accuracy."""


def curves(results: Results) -> dict[str, tuple[float, list[Curve]]]:
    """Mean CPU seconds and the seeds' curves of the CIFAR-10 recipes that were run as they are."""
    by_name = {}
    for group in groups(results):
        if group.recipe in ("scratch-cifar10", "cifar10") and group.changed == "–":
            split = {"val": "validation", "test": "test"}[group.seeds[0].curve_of]
            count = "one seed" if len(group.seeds) == 1 else f"{len(group.seeds)} seeds"
            name = f"{group.recipe}, {group.steps:,} steps: {split}, {count}"
            by_name[name] = (
                group.mean("cpu_seconds"),
                [
                    [(step / group.steps, value) for step, value, _ in run.curve]
                    for run in group.seeds
                ],
            )
    return by_name


def curves_figure(results: Results) -> Figure:
    """The curves of the CIFAR-10 recipes beside what the from-scratch project states."""
    return plots.costs(curves(results), claim=CLAIM, label=f"{CLAIM:.1%}, stated by the project")


def questions_figure(results: Results) -> Figure:
    """Every arm whose question is judged by accuracy."""
    field = r"[\w.]+="
    points = [
        # Of an arm's name the fields are left out, which the question tells.
        replace(point, label=f"{one.question.replace('_', ' ')}: {re.sub(field, '', point.label)}")
        for one in answers(results)
        if one.metric == tracking.VAL_ACCURACY
        for point in answer.points(one)
    ]
    return plots.effects(
        points,
        label="change of validation accuracy,\npoints",
        title="arm minus baseline, 95 % for all arms of a question at once",
    )


TABLES: dict[str, Callable[[Results], Table]] = {
    "recipes": recipe_table,
    "runs": run_table,
    "shares": share_table,
    "faults": fault_table,
    "answers": answer_table,
    "sweeps": sweep_table,
    "stopping": stopping_table,
    "variance": variance_table,
}
FIGURES: dict[Path, Callable[[Results], Figure]] = {
    RESULTS / "architecture.svg": lambda _: architecture(size("S/16")),
    RESULTS / "cifar10.svg": curves_figure,
    RESULTS / "questions.svg": questions_figure,
}
