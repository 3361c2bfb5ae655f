"""What a sweep has found: its trials, the best settings, what mattered, and what fresh seeds say.

`confirm` also writes it all as a row, from which experiments/README.md is rendered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState, create_trial

from experiments import cli
from experiments.render import UNCHANGED, sweep_table
from experiments.study import runs
from experiments.study.pages import Table
from experiments.study.rows import Rows
from experiments.study.runs import Job
from experiments.study.sweepfile import Range
from experiments.study.trials import RUN, STEPS, Trials, error_of
from vitx.files import read_json
from vitx.settings import override
from vitx.training import tracking


def table(trials: Trials) -> Table:
    """Every trial: how it ended, what it reached, how far it was trained."""
    names = list(trials.sweep.parameters)
    header = ("trial", "state", trials.sweep.metric, *names, "steps", "seconds", "run")
    body = []
    for trial in trials.all():
        attributes = trial.user_attrs
        error = error_of(trial)
        state = f"failed: {error}" if error else trial.state.name.lower()
        last = list(trial.intermediate_values.values())[-1:]
        values = last if trial.value is None else [trial.value]
        seconds = f"{trial.duration.total_seconds():.0f}" if trial.duration else "–"
        body.append(
            (str(trial.number), state, f"{values[0]:.4g}" if values else "–",
             *(_word(trial.params.get(name, "–")) for name in names),
             f"{attributes[STEPS]:,}" if STEPS in attributes else "–", seconds,
             attributes.get(RUN, "–"))
        )  # fmt: skip
    return Table(header, body)


def show(trials: Trials) -> None:
    """Print the table, the best settings and what mattered; before the end, what is known."""
    print(table(trials).markdown())
    best = ranking(trials)
    if best:
        print(f"\nbest by {trials.sweep.metric}:")
        for value, values, seeds in best[:5]:
            several = f" (mean of {seeds} seeds)" if seeds > 1 else ""
            print(f"  {value:.4g}{several}: {cli.said(values)}")
    if shares := importances(trials):
        words = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        print(f"importance, as shares of what the parameters explain together: {words}")
    if trials.stale:
        print(f"stale: {trials.stale} trials were run by another version")
    print(saved(trials))


def ranking(trials: Trials) -> list[tuple[float, dict[str, Any], int]]:
    """Final value, settings and number of seeds of what ran to its end, best first.

    Settings are what differs between trials, but for the seed: trials that differ in it alone count
    as one, with the mean of their values. Of those that do not differ at all the last one counts.
    """
    values: dict[str, dict[int | None, float]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for trial in trials.all(TrialState.COMPLETE):
        common = ("seed", *trials.sweep.constants())
        chosen = {name: value for name, value in trial.params.items() if name not in common}
        key = repr(chosen)
        settings[key] = chosen
        values.setdefault(key, {})[trial.params.get("seed")] = trial.values[0]
    found = [(mean(some.values()), settings[key], len(some)) for key, some in values.items()]
    return sorted(found, key=lambda one: trials.sweep.badness(one[0]))


def importances(trials: Trials) -> dict[str, float]:
    """Each parameter's share of the variance that they explain together, of whole trials.

    By fANOVA (Hutter et al. 2014). Numbers count as numbers, also where the file lists them. Left
    out are the seed and a parameter with more than MOST_WORDS words, as the time for them doubles
    with each. Empty with fewer than four such trials, or when nothing varies.
    """
    done = trials.all(TrialState.COMPLETE)
    spaces: dict[str, BaseDistribution] = {}
    for name, each in trials.sweep.parameters.items():
        values = {trial.params[name] for trial in done}
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if name == "seed" or len(values) < 2 or not (numbers or len(values) <= MOST_WORDS):
            continue
        log = isinstance(each, Range) and each.log
        spaces[name] = (
            FloatDistribution(min(values), max(values), log=log)
            if numbers
            else CategoricalDistribution(sorted(values, key=str))
        )
    if len(done) < 4 or not spaces or len({trial.value for trial in done}) == 1:
        return {}
    study = optuna.create_study()
    for trial in done:
        params = {name: trial.params[name] for name in spaces}
        study.add_trial(create_trial(params=params, distributions=spaces, value=trial.value))
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))


@dataclass(frozen=True)
class Saving:
    """What stopping early has saved."""

    ended: int
    """Trials that ended, early or not."""
    stopped: int
    share: float
    """Of the steps of all, counted to the last reading of those that were stopped."""

    def __str__(self) -> str:
        if not self.stopped:
            return f"{self.ended} trials ended, none stopped early"
        return (
            f"{self.ended} trials ended, {self.stopped} of them early, which saved "
            f"{self.share:.0%} of the steps"
        )


def saved(trials: Trials) -> Saving:
    """How many trials were stopped early, and what that has saved."""
    whole = [t.user_attrs.get(STEPS, 0) for t in trials.all(TrialState.COMPLETE)]
    stopped = [t.user_attrs.get(STEPS, 0) for t in trials.all(TrialState.PRUNED)]
    ended, full = len(whole) + len(stopped), max(whole, default=0)
    share = sum(full - steps for steps in stopped) / (full * ended) if full else 0.0
    return Saving(ended, len(stopped), share)


MOST_WORDS = 10
"""Words of a parameter up to which its importance is computed."""
FRESH = 10_000
"""Seeds from here on confirm; recipes were chosen with lower ones."""


@dataclass(frozen=True)
class Candidate:
    """Settings of a sweep that are run on fresh seeds."""

    settings: dict[str, Any]
    """Empty for the sweep's command with only what all trials set."""
    value: float | None
    """The mean of its trials."""
    seeds: int
    jobs: list[Job]


def candidates(trials: Trials, *, best: int, seeds: int) -> list[Candidate]:
    """The command with no parameter varied, and the best settings, each with its fresh runs.

    No trial had one of the seeds, nor were the recipes chosen with them. Raises ValueError for a
    sweep of another program, or without a whole trial.
    """
    sweep = trials.sweep
    if not sweep.recipe:
        raise ValueError(f"{sweep.path}: --confirm reruns sweeps of experiments.train only")
    chosen = ranking(trials)[:best]
    if not chosen:
        raise ValueError(f"{sweep.path}: no trial has run to its end yet")
    base, group = override(sweep.base(), **sweep.constants()), f"{sweep.name}-confirmed"
    used = {base.seed, *(trial.params.get("seed", 0) for trial in trials.all())}
    first = max(FRESH, max(used) + 1)
    fresh = range(first, first + seeds)

    def jobs(values: Mapping[str, Any]) -> list[Job]:
        name = cli.said(values, most=80) or UNCHANGED
        configs = {seed: override(base, **values, seed=seed) for seed in fresh}
        return [Job(group, f"{name},seed={seed}", config) for seed, config in configs.items()]

    unchanged = Candidate({}, None, 0, jobs({}))
    return [unchanged, *(Candidate(values, value, n, jobs(values)) for value, values, n in chosen)]


def confirm(trials: Trials, tried: Sequence[Candidate], how: runs.How) -> Path:
    """Print the candidates beside each other, and keep that with the trials as a row.

    Their runs must have ended. Returns the folder of the row, which also holds the table as CSV.
    """
    row = fields(trials, tried, runs.ended(how.out))
    with tracking.Run(
        how.out, trials.sweep.name, "confirmed", row["config"], mode=how.wandb
    ) as run:
        shown = sweep_table([Rows(run.folder).add("sweep", **row)])
        shown.write_csv(run.folder / "confirmed.csv")
        run.table("confirmed", shown.header, shown.body)
    print(f"{saved(trials)}\n{shown.markdown()}\nconfirmed: {run.folder}")
    return run.folder


def fields(
    trials: Trials, tried: Sequence[Candidate], found: Mapping[str, runs.Ended]
) -> dict[str, Any]:
    """The fields of a sweep's row."""
    sweep = trials.sweep
    made = [found[job.key] for one in tried for job in one.jobs]
    folders = (trials.run_folder(t.user_attrs.get(RUN, "")) for t in trials.all())
    swept = [read_json(folder / "environment.json") for folder in folders if folder]
    return {
        "what": "sweep",
        "sweep": sweep.name,
        "method": sweep.method,
        "metric": sweep.metric,
        "goal": sweep.goal,
        "config": runs.lasting(sweep.base()),
        "trials": [
            {"state": t.state.name.lower(), "settings": t.params, "value": t.value,
             "steps": t.user_attrs.get(STEPS), "error": error_of(t)}
            for t in trials.all()
        ],
        "stale": trials.stale,
        "saved": vars(saved(trials)),
        "importance": importances(trials),
        "confirmed": [
            {"settings": one.settings, "value": one.value, "seeds": one.seeds,
             "values": {str(job.config.seed): found[job.key].values.get(sweep.metric)
                        for job in one.jobs}}
            for one in tried
        ],
        "device": runs.devices(run.device for run in made),
        "before": runs.sources([*swept, *(run.environment for run in made)]),
    }  # fmt: skip


def _word(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
