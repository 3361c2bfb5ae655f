"""Tables and figures of committed results."""

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from experiments import cli
from experiments.recipes import RECIPES
from experiments.study import answer, plots
from experiments.study.kinds import (
    SOURCES,
    Answer,
    Candidate,
    Fault,
    SweepResult,
    Trained,
    Variance,
    paired,
    step_timings,
)
from experiments.study.pages import RESULTS, ROOT, Table, machine
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


def run_table(results: Results) -> Table:
    """Every recipe that was run, its seeds together."""
    header = ("recipe", "changed", "steps", "seeds", "test accuracy", "seconds a seed",
              "CPU seconds", "PFLOP", "machine")  # fmt: skip
    body = []
    for (recipe, settings, steps, where), seeds in groups(results).items():
        seconds, cpu, flops = (
            statistics.mean(getattr(run, name) for run in seeds)
            for name in ("seconds", "cpu_seconds", "training_flops")
        )
        body.append(
            (recipe, settings, f"{steps:,}", str(len(seeds)), accuracy_text(seeds),
             f"{seconds:,.0f}", f"{cpu:,.0f}", f"{flops / 1e15:.2g}", where)
        )  # fmt: skip
    return Table(header, body)


def recipe_table(results: Results) -> Table:
    """Every recipe as it is: what it reached here, in what time, and its command."""
    reached = {
        recipe: seeds
        for (recipe, settings, steps, _), seeds in groups(results).items()
        if settings == "–" and steps == RECIPES[recipe].steps
    }
    body = []
    for name, recipe in RECIPES.items():
        seeds = reached.get(name, [])
        text, seconds = "–", "–"
        if seeds:
            text = accuracy_text(seeds)
            seconds = f"{statistics.mean(run.seconds for run in seeds):,.0f}"
        root = "" if name == "digits" else " --data.root DIR"
        weights = " --weights FILE" if recipe.weights else ""
        command = f"`python -m experiments.train {name}{root}{weights}`"
        body.append((name, text, seconds, command))
    return Table(("recipe", "test accuracy", "seconds per seed", "command"), body)


def groups(results: Results) -> dict[tuple[str, str, int, str], list[Trained]]:
    """The latest run of every seed, by recipe, changed settings, steps and machine."""
    by_key: dict[tuple[str, str, int, str], list[Trained]] = {}
    for run in of_kind(results, Trained):
        key = (run.recipe, changed(run), run.steps, machine(run))
        by_key.setdefault(key, []).append(run)
    return {key: latest(runs, lambda run: run.seed) for key, runs in by_key.items()}


def changed(run: Trained) -> str:
    """The settings in which a run differs from its recipe, but for seed, steps and FREE ones."""
    recipe = flat(RECIPES[run.recipe])
    free = (*FREE, "seed", "steps")
    settings = [f"{k}={v}" for k, v in run.config.items() if k not in free and recipe[k] != v]
    return ", ".join(settings) or "–"


def accuracy_text(seeds: Sequence[Trained]) -> str:
    """The mean with its interval over seeds; of one seed the standard error of its images."""
    values = [run.test.accuracy for run in seeds]
    if len(values) == 1:
        return f"{values[0]:.2%} ± {seeds[0].test.standard_error:.2%} (one seed)"
    if len(values) < 3:
        return f"{statistics.mean(values):.2%} (two seeds)"
    mean = mean_interval(values)
    return f"{mean.value:.2%} ({mean.low:.2%} to {mean.high:.2%})"


SEEN = ("scratch-cifar10", 3_920)
"""Recipe and steps of the run that README shows pictures of."""


def seen_text(results: Results) -> str:
    """The run whose attention, positions and filters README shows, and how it was made."""
    recipe, steps = SEEN
    run = latest((r for r in of_kind(results, Trained) if (r.recipe, r.steps) == SEEN), type)[0]
    accuracy = f"{run.test.accuracy:.2%} ± {run.test.standard_error:.2%}, one seed"
    return (
        f"What a ViT has learned after {steps:,} steps of `{recipe}` (test accuracy {accuracy}). "
        "Left: what the class token reads of eight test images. Middle: how alike the positions of "
        "the patches are. Right: the first principal components of the patch filters. Made by "
        f"`python -m experiments.train {recipe} --steps {steps} --data.root DIR` and "
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
    for (recipe, settings, steps, where), seeds in groups(results).items():
        ratio = ratios.get(where)
        if recipe != "cifar10" or settings != "–" or ratio is None:
            continue
        part = steps * seeds[0].batch / PROJECT_IMAGES
        low, value, high = (part / bound for bound in (ratio.high, ratio.value, ratio.low))
        body.append(
            (f"{recipe}, {steps:,} steps", accuracy_text(seeds), str(len(seeds)),
             f"{value:.1%} ({low:.1%} to {high:.1%})", where)
        )  # fmt: skip
    header = ("run", "test accuracy", "seeds", "share of the original's time (95 %)", "machine")
    return Table(header, body)


def fault_table(results: Results) -> Table:
    """Counts of the last campaign, one line per fault."""
    return table_of(
        latest(of_kind(results, Fault), lambda result: result.fault),
        {
            "fault": lambda result: result.fault,
            "trials": lambda result: str(result.trials),
            "passed": lambda result: str(result.passed),
            "commit": lambda result: (result.environment.commit or "–")[:7],
        },
    )


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
            metric = f"Δ {one.metric}"
            change = f"{cells[metric]} {one.metric}" if metric in cells else "–"
            names = ("Δ images/s", "speed", "Δ MACs", "pairs")
            body.append(
                (one.question, cells["arm"], change, cells.get("p", "–"),
                 cells.get("verdict", "–"), *(cells[name] for name in names),
                 f"{one.seconds / 60:.0f}", machine(one))
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
        start = (sweep.sweep, _trials(sweep), str(sweep.saved.stopped), f"{sweep.saved.share:.0%}")
        for one, gain in zip(sweep.confirmed, [None, *sweep.gains], strict=True):
            body.append((*start, *_confirmed(sweep, one, gain), machine(sweep)))
    return Table(header, body)


def _trials(sweep: SweepResult) -> str:
    """How many trials a sweep has, and how many of them ended."""
    ended = sum(trial.state in ("complete", "pruned", "fail") for trial in sweep.trials)
    total = len(sweep.trials)
    count = f"{ended} of {total}" if ended < total else str(ended)
    return count + (f" (stale: {sweep.stale})" if sweep.stale else "")


def _confirmed(sweep: SweepResult, one: Candidate, gain: Effect | None) -> tuple[str, ...]:
    """The cells of one confirmed setting, from `settings` to `seeds`."""
    among = f" (mean of {one.seeds})" if one.seeds > 1 else ""
    return (
        cli.label(one.settings) or UNCHANGED,
        sweep.metric,
        "–" if one.value is None else f"{one.value:.4g}{among}",
        _mean_text(list(one.reached.values()), ""),
        _interval_text(gain.difference, "+") if gain else "–",
        f"{gain.p:.3f}" if gain else "–",
        gain.verdict if gain else "–",
        f"{len(one.reached)} of {len(one.values)}",
    )


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
        pairs = list(paired(ended, stopped).values())
        body.append(
            (name, f"{sweep.saved.share:.0%}", sweep.metric, _mean_text(list(stopped.values()), ""),
             _mean_text(list(ended.values()), ""), _mean_text(pairs, "+"), str(len(pairs)), where)
        )  # fmt: skip
    return Table(header, body)


def _mean_text(values: Sequence[float], sign: str) -> str:
    """The mean with its 95 % interval; a dash for fewer than two values."""
    return _interval_text(mean_interval(values), sign) if len(values) > 1 else "–"


def _interval_text(interval: Interval, sign: str) -> str:
    return f"{interval.value:{sign}.4f} ({interval.low:{sign}.4f} to {interval.high:{sign}.4f})"


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
                 f"{of.std:.4f} ({of.std_low:.4f} to {of.std_high:.4f})",
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
    for (recipe, settings, steps, _), seeds in groups(results).items():
        if recipe in ("scratch-cifar10", "cifar10") and settings == "–":
            split = {"val": "validation", "test": "test"}[seeds[0].curve_of]
            count = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
            points = [[(step / steps, value) for step, value, _ in run.curve] for run in seeds]
            seconds = statistics.mean(run.cpu_seconds for run in seeds)
            by_name[f"{recipe}, {steps:,} steps: {split}, {count}"] = seconds, points
    return by_name


def curves_figure(results: Results) -> Figure:
    """The curves of the CIFAR-10 recipes beside what the from-scratch project states."""
    return plots.costs(curves(results), claim=CLAIM, label=f"{CLAIM:.1%}, stated by the project")


def questions_figure(results: Results) -> Figure:
    """Every arm whose question is judged by accuracy."""
    points = [
        replace(point, label=f"{one.question.replace('_', ' ')}: {_bare(point.label)}")
        for one in answers(results)
        if one.metric == tracking.VAL_ACCURACY
        for point in answer.points(one)
    ]
    return plots.effects(
        points,
        label="change of validation accuracy,\npoints",
        title="arm minus baseline, 95 % for all arms of a question at once",
    )


def _bare(arm: str) -> str:
    """An arm's name without the fields, which the question tells."""
    return re.sub(r"[\w.]+=", "", arm)


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
