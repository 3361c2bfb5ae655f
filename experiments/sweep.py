"""Run a W&B sweep file without a server: `python -m experiments.sweep FILE [--workers 2]`.

The same command on another machine, with the same --storage, joins in. --show prints the table so
far, --confirm reruns the best settings on fresh seeds, --wandb registers the file with W&B and
starts its agents.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TextIO, TypeGuard

import tyro

try:
    import optuna
    from optuna.trial import TrialState
except ImportError as error:
    print(f"error: {error}; sweeps need: pip install -e '.[sweep]'", file=sys.stderr)
    raise SystemExit(2) from None

from experiments import cli, runs, workers
from experiments.pages import Table
from experiments.runs import Job
from experiments.study import RUN, SEEN_S, STEPS, Claim, Trials, error_of
from experiments.sweepfile import Sweep, read
from vitx import machine, stats, tracking
from vitx.config import override
from vitx.tracking import STEP

PROG = "python -m experiments.sweep"
ERRORS = "errors.log"
"""What a trial's program has written to its stderr, in the trial's folder."""
POLL_S = 0.5


@dataclass(frozen=True)
class Settings:
    """Run the trials of a sweep file that nobody has run."""

    file: tyro.conf.Positional[Path]
    """A W&B sweep file."""
    workers: int = 1
    """Processes that run trials at the same time on this machine; they share the cores."""
    storage: str = ""
    """An Optuna URL, such as postgresql://…, or a journal file; empty for one beside the runs."""
    show: bool = False
    """Print the trials, the best of them and what mattered; run nothing."""
    confirm: int = 0
    """Rerun so many of the best settings on fresh seeds."""
    seeds: int = 8
    """Fresh seeds of each setting that is confirmed."""
    wandb: bool = False
    """Register the file with W&B, and start --workers agents; those runs are online."""
    out: Path = tracking.OUT
    """Folder of run folders."""


def main(args: list[str]) -> None:
    """Check the file, then do what is asked."""
    settings = cli.parse(Settings, args, prog=PROG)
    sweep = read(settings.file)
    cli.at_least(settings, workers=1, confirm=0, seeds=2)
    if settings.show + settings.wandb + bool(settings.confirm) > 1:
        raise ValueError("--show, --confirm and --wandb exclude each other; choose one")
    if settings.wandb:
        agents(sweep, settings.workers)
        return
    reads = settings.show or settings.confirm > 0
    trials = Trials(sweep, settings.storage, settings.out, new=not reads)
    if settings.workers > 1 and not settings.show:
        spread(sweep, settings)
    elif not reads:
        work(trials, settings.out)
    if settings.confirm:
        confirm(trials, settings)
    else:
        show(trials)


def work(trials: Trials, out: Path) -> None:
    """Run trials until all have ended, those that other workers lost among them."""
    while not trials.ended:
        claim = trials.take()
        if claim is None:
            time.sleep(POLL_S)
        else:
            print(run(trials, claim, out), flush=True)


def run(trials: Trials, claim: Claim, out: Path) -> str:
    """Run one trial as a W&B agent would, and watch its metric; a line on how it ended."""
    said = f"trial {claim.trial.number} {_words(claim.values)}"
    name = uuid.uuid4().hex[:8]
    try:
        with (
            closing(claim.lock),
            (claim.folder / "output.log").open("w") as output,
            (claim.folder / ERRORS).open("w") as errors,
        ):
            return f"{said}: {_run(trials, claim, out, name, output, errors)}"
    except optuna.exceptions.UpdateFinishedTrialError:
        return f"{said}: taken over by another worker, as this one was silent"


def _run(trials: Trials, claim: Claim, out: Path, name: str, output: TextIO, errors: TextIO) -> str:
    """Run the program under a run's name, tell how it ended, and say it."""
    here = _environment() | {
        "WANDB_RUN_ID": name,
        "WANDB_RUN_GROUP": trials.sweep.name,
        "VITX_OUT": str(out.resolve()),
        "PYTHONUNBUFFERED": "1",
    }
    command = trials.sweep.words(claim.values)
    try:
        program = subprocess.Popen(
            command, env=here, stdout=output, stderr=errors, preexec_fn=machine.end_with_parent
        )
    except FileNotFoundError as error:
        trials.fail(claim, str(error))
        return f"failed, {error}"
    try:
        readings, pruned = _watch(trials, claim, program, out, name)
    except BaseException:
        program.terminate()
        program.wait()
        raise
    claim.trial.set_user_attr(STEPS, max((step for step, _ in readings), default=0))
    claim.trial.set_user_attr(RUN, name)
    if pruned:
        trials.prune(claim)
        return f"stopped early at {trials.sweep.metric} {readings[-1][1]:.4g}"
    return _end(trials, claim, program.returncode, out, name)


def _end(trials: Trials, claim: Claim, status: int, out: Path, name: str) -> str:
    """Tell how a program that was not stopped has ended; in words."""
    folder = _folder(out, trials.sweep, name)
    metric = trials.sweep.metric
    value = None if folder is None else tracking.read_json(folder / "summary.json").get(metric)
    if status:
        why = f"exit {status}: {workers.last_words(claim.folder / ERRORS)}"
    elif folder is None:
        why = f"it left no run in {out / trials.sweep.name}"
    elif not _is_number(value) or not math.isfinite(value):
        why = f"its final {metric} is {value!r}"
    else:
        trials.complete(claim, value)
        return f"{metric} {value:.4g}"
    trials.fail(claim, why)
    return f"failed, {why}"


def _environment() -> dict[str, str]:
    """The environment of a program, which is looked for where this one was found."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | {"PATH": path}


def _watch(
    trials: Trials, claim: Claim, program: subprocess.Popen, out: Path, name: str
) -> tuple[list[tuple[int, float]], bool]:
    """The metric's readings (step, value) until the program ends, or is stopped for them."""
    seen, last = 0, time.monotonic()
    while True:
        ended = program.poll() is not None
        readings = _readings(out, trials.sweep, name)
        for place, (_, value) in enumerate(readings[seen:], seen + 1):
            claim.trial.report(value, place)
            if not ended and trials.behind(claim):
                program.terminate()
                program.wait()
                return readings[:place], True
        seen = len(readings)
        if ended:
            return readings, False
        if time.monotonic() - last > SEEN_S:
            trials.alive(claim.trial)
            last = time.monotonic()
        time.sleep(POLL_S)


def _readings(out: Path, sweep: Sweep, name: str) -> list[tuple[int, float]]:
    """What the run has logged of the metric so far."""
    folder = _folder(out, sweep, name)
    path = folder / "metrics.jsonl" if folder else None
    if path is None or not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf8").splitlines(True) if line[-1] == "\n"]
    events = [json.loads(line) for line in lines]
    return [
        (event.get(STEP, 0), event[sweep.metric])
        for event in events
        if _is_number(event.get(sweep.metric))
    ]


def _folder(out: Path, sweep: Sweep, name: str) -> Path | None:
    """The folder of the run with that id, once there is one."""
    return next((out / sweep.name).glob(f"*-{name}"), None)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def spread(sweep: Sweep, settings: Settings) -> None:
    """Several workers of this machine; the cores are shared among them.

    Raises ValueError with the last words of a worker that failed.
    """
    flags = [str(settings.file), f"--out={settings.out}"]
    flags += [f"--storage={settings.storage}"] if settings.storage else []
    if settings.confirm:
        flags += [f"--confirm={settings.confirm}", f"--seeds={settings.seeds}"]
    folder = settings.out / sweep.name
    workers.spread("experiments.sweep", flags, workers=settings.workers, folder=folder)


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
            several = f" (mean of {seeds} trials)" if seeds > 1 else ""
            print(f"  {value:.4g}{several}: {','.join(f'{k}={v}' for k, v in values.items())}")
    if shares := importances(trials):
        said = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        print(f"importance, as shares of what the parameters explain together: {said}")
    print(saved(trials))


def ranking(trials: Trials) -> list[tuple[float, dict[str, Any], int]]:
    """Final value, settings and number of the trials that ran to their end, best first.

    Trials that differ in their seed alone are one setting with the mean of their values.
    """
    values: dict[str, list[float]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for trial in trials.all(TrialState.COMPLETE):
        chosen = {name: value for name, value in trial.params.items() if name != "seed"}
        key = repr(chosen)
        settings[key] = chosen
        values.setdefault(key, []).append(trial.values[0])
    found = [(mean(some), settings[key], len(some)) for key, some in values.items()]
    return sorted(found, key=lambda one: trials.sweep.badness(one[0]))


def importances(trials: Trials) -> dict[str, float]:
    """Each parameter's share of the variance that they explain together, of whole trials.

    By fANOVA (Hutter et al. 2014). Empty with fewer than four such trials, or when nothing varies.
    """
    done = trials.all(TrialState.COMPLETE)
    varied = [n for n in trials.sweep.parameters if len({t.params.get(n) for t in done}) > 1]
    if len(done) < 4 or not varied or len({t.value for t in done}) == 1:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(trials.study, evaluator=evaluator, params=varied)


def saved(trials: Trials) -> str:
    """Steps that stopping early has saved, counted to the last reading of what was stopped."""
    full = max((t.user_attrs.get(STEPS, 0) for t in trials.all(TrialState.COMPLETE)), default=0)
    stopped = [t.user_attrs.get(STEPS, 0) for t in trials.all(TrialState.PRUNED)]
    ended = len(stopped) + len(trials.all(TrialState.COMPLETE))
    if not full or not stopped:
        return f"{ended} trials ended, none stopped early"
    share = sum(full - steps for steps in stopped) / (full * ended)
    return (
        f"{ended} trials ended, {len(stopped)} of them early, which saved {share:.0%} of the steps"
    )


def confirm(trials: Trials, settings: Settings) -> None:
    """Rerun the best settings on seeds that no trial had; print means with their intervals."""
    jobs = confirming(trials, best=settings.confirm, seeds=settings.seeds)
    how = runs.How(out=settings.out, device=tracking.device())
    runs.work([job for _, _, some in jobs for job in some], how)
    metric, found, body = trials.sweep.metric, runs.ended(settings.out), []
    for value, values, some in jobs:
        reached = [found[job.key].values.get(metric) for job in some]
        whole = [one for one in reached if one is not None]  # a run that diverged has none
        words = "–"
        if len(whole) > 1:
            interval = stats.mean_interval(whole)
            words = f"{interval.value:.4g} ({interval.low:.4g} to {interval.high:.4g})"
        body.append((_words(values), f"{value:.4g}", words, f"{len(whole)} of {len(reached)}"))
    header = ("settings", "in the sweep", f"{metric} on fresh seeds (95 %)", "seeds")
    print(Table(header, body).markdown())


def confirming(
    trials: Trials, *, best: int, seeds: int
) -> list[tuple[float, dict[str, Any], list[Job]]]:
    """The best settings with what they reached, and their runs on fresh seeds.

    Raises ValueError for a sweep of another program, or without a whole trial.
    """
    sweep = trials.sweep
    if not sweep.recipe:
        raise ValueError(f"{sweep.path}: --confirm reruns sweeps of experiments.train only")
    chosen = ranking(trials)[:best]
    if not chosen:
        raise ValueError(f"{sweep.path}: no trial has run to its end yet")
    base, group = sweep.base(), f"{sweep.name}-confirmed"
    used = {base.seed, *(trial.params.get("seed", 0) for trial in trials.all())}
    fresh = range(max(used) + 1, max(used) + 1 + seeds)

    def jobs(values: Mapping[str, Any]) -> list[Job]:
        name = _words(values)[:80]
        configs = {seed: override(base, **values, seed=seed) for seed in fresh}
        return [Job(group, f"{name},seed={seed}", config) for seed, config in configs.items()]

    return [(value, values, jobs(values)) for value, values, _ in chosen]


def agents(sweep: Sweep, number: int) -> None:
    """Register the file with W&B and run so many agents until the sweep ends; all of it online."""
    here = {name: value for name, value in _environment().items() if name != "WANDB_MODE"}
    wandb = [sys.executable, "-m", "wandb"]
    made = subprocess.run(
        [*wandb, "sweep", str(sweep.path)], env=here, stderr=subprocess.PIPE, text=True
    )
    sys.stderr.write(made.stderr)
    found = re.search(r"wandb agent (\S+)", made.stderr)
    if made.returncode or not found:
        raise ValueError(f"{sweep.path}: W&B did not take the sweep; see above")
    started = [subprocess.Popen([*wandb, "agent", found[1]], env=here) for _ in range(number)]
    if any([agent.wait() for agent in started]):
        raise ValueError(f"a W&B agent of {found[1]} failed; see above")


def _word(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _words(values: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={_word(value)}" for name, value in values.items())


if __name__ == "__main__":
    cli.run(main)
