"""The state of a sweep: its trials, the best settings, what mattered, and what fresh seeds say.

`confirm` also writes it all as a result, from which experiments/README.md is rendered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState, create_trial

from experiments import cli
from experiments.study import runs
from experiments.study.kinds import Candidate, Scalar, SweepResult, TrialResult, saving
from experiments.study.pages import Table
from experiments.study.parameters import Range
from experiments.study.results import Results
from experiments.study.runs import Job
from experiments.study.tables import UNCHANGED, sweep_table
from experiments.study.trials import RUN, STEPS, Trials, error_of
from vitx.files import read_json
from vitx.registry import UserError
from vitx.settings import override
from vitx.training import tracking


def table(trials: Trials) -> Table:
    """Every trial: how it ended, what it reached, how far it was trained."""
    names = list(trials.sweep.parameters)
    header = ("trial", "state", trials.sweep.metric, *names, "steps", "seconds", "run")
    body = []
    for trial in trials.all():
        error, attributes = error_of(trial), trial.user_attrs
        state = f"failed: {error}" if error else trial.state.name.lower()
        reported = list(trial.intermediate_values.values())[-1:]
        values = reported if trial.value is None else [trial.value]
        seconds = f"{trial.duration.total_seconds():.0f}" if trial.duration else "–"
        body.append(
            (str(trial.number), state, f"{values[0]:.4g}" if values else "–",
             *(_word(trial.params.get(name, "–")) for name in names),
             f"{attributes[STEPS]:,}" if STEPS in attributes else "–", seconds,
             attributes.get(RUN, "–"))
        )  # fmt: skip
    return Table(header, body)


def show(trials: Trials) -> None:
    """Print the table, the best settings and what mattered; at any time."""
    print(table(trials).markdown())
    if best := ranking(trials)[:5]:
        print(f"\nbest by {trials.sweep.metric}:")
    for one in best:
        several = f" (mean of {one.seeds} seeds)" if one.seeds > 1 else ""
        print(f"  {one.value:.4g}{several}: {cli.label(one.settings)}")
    if shares := importances(trials):
        words = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        print(f"importance, as shares of what the parameters explain together: {words}")
    if trials.stale:
        print(f"stale: {trials.stale} trials were run by another version")
    print(saving(trial_results(trials)))


def trial_results(trials: Trials) -> tuple[TrialResult, ...]:
    """Every trial as a result holds it."""
    return tuple(
        TrialResult(
            state=trial.state.name.lower(),  # type: ignore[arg-type]
            settings=trial.params,
            value=trial.value,
            steps=trial.user_attrs.get(STEPS),
            error=error_of(trial),
        )
        for trial in trials.all()
    )


def ranking(trials: Trials) -> list[Candidate]:
    """The settings of what ran to its end, best first.

    Settings are what differs between trials, but for the seed: trials that differ in it alone count
    as one, with the mean of their values. Of those that do not differ at all the last one counts.
    """
    values: dict[str, dict[Scalar, float]] = {}
    settings: dict[str, dict[str, Scalar]] = {}
    common = ("seed", *trials.sweep.constants())
    for trial in trials.all(TrialState.COMPLETE):
        varied = {name: value for name, value in trial.params.items() if name not in common}
        settings[repr(varied)] = varied
        values.setdefault(repr(varied), {})[trial.params.get("seed")] = trial.values[0]
    means = {key: mean(by_seed.values()) for key, by_seed in values.items()}
    return [
        Candidate(settings=settings[key], value=means[key], seeds=len(values[key]))
        for key in sorted(means, key=lambda key: trials.sweep.badness(means[key]))
    ]


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


MOST_WORDS = 10
"""Words of a parameter up to which its importance is computed."""
FRESH = 10_000
"""Seeds from here on confirm; recipes were chosen with lower ones."""


def candidates(trials: Trials, *, best: int, seeds: int) -> list[tuple[Candidate, list[Job]]]:
    """The command with no parameter varied, and the best settings, each with its fresh runs.

    No trial had one of the seeds, nor were the recipes chosen with them. Raises ValueError for a
    sweep of another program, or without a whole trial.
    """
    sweep = trials.sweep
    if not sweep.recipe:
        raise UserError(f"{sweep.path}: --confirm reruns sweeps of experiments.train only")
    ranked = ranking(trials)[:best]
    if not ranked:
        raise UserError(f"{sweep.path}: no trial has run to its end yet")
    base, group = override(sweep.base(), **sweep.constants()), f"{sweep.name}-confirmed"
    used = {base.seed, *(trial.params.get("seed", 0) for trial in trials.all())}
    first = max(FRESH, max(used) + 1)

    def jobs(settings: Mapping[str, Scalar]) -> list[Job]:
        name = cli.label(settings, most=80) or UNCHANGED
        fresh = range(first, first + seeds)
        return [Job(group, f"{name},seed={k}", override(base, **settings, seed=k)) for k in fresh]

    return [(one, jobs(one.settings)) for one in (Candidate(settings={}), *ranked)]


def confirm(trials: Trials, tried: Sequence[tuple[Candidate, list[Job]]], how: runs.How) -> Path:
    """Print the candidates beside each other, and keep that with the trials as a result.

    Their runs must have ended. Returns the folder of the result, which also holds the table as CSV.
    """
    sweep = trials.sweep
    config = runs.lasting(sweep.base())
    with tracking.Run(how.out, sweep.name, "confirmed", config, mode=how.wandb) as run:
        result = add(Results(run.folder), trials, tried, runs.ended(how.out))
        shown = sweep_table([result])
        shown.write_csv(run.folder / "confirmed.csv")
        run.table("confirmed", shown.header, shown.body)
    print(f"{result.saved}\n{shown.markdown()}\nconfirmed: {run.folder}")
    return run.folder


def add(
    results: Results,
    trials: Trials,
    tried: Sequence[tuple[Candidate, list[Job]]],
    ended: Mapping[str, runs.Ended],
) -> SweepResult:
    """Append a sweep's trials, and its candidates with their runs, by identity."""
    sweep, kept = trials.sweep, trial_results(trials)

    def value(job: Job) -> float | None:
        return ended[job.key].values.get(sweep.metric)

    made = [ended[job.key] for _, jobs in tried for job in jobs]
    folders = (trials.run_folder(t.user_attrs.get(RUN, "")) for t in trials.all())
    swept = [read_json(folder / "environment.json") for folder in folders if folder]
    return results.add(
        SweepResult,
        sweep=sweep.name,
        method=sweep.method,
        metric=sweep.metric,
        goal=sweep.goal,
        config=runs.lasting(sweep.base()),
        trials=kept,
        stale=trials.stale,
        saved=saving(kept),
        importance=importances(trials),
        confirmed=tuple(
            replace(one, values={str(job.config.seed): value(job) for job in jobs})
            for one, jobs in tried
        ),
        device=runs.devices(run.device for run in made),
        before=runs.sources([*swept, *(run.environment for run in made)]),
    )


def _word(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
