"""Run a W&B sweep file without a server: `python -m experiments.sweep FILE [--workers 2]`.

The same command on another machine, with the same --storage, joins in. --show prints the table so
far, --confirm reruns the best settings on fresh seeds, --wandb registers the file with W&B and
starts its agents.
"""

import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

try:
    import optuna
    from optuna.trial import TrialState
except ImportError as error:
    raise SystemExit(f"error: {error}; sweeps need: pip install -e '.[sweep]'") from None

from experiments import cli, runs
from experiments.pages import Table
from experiments.runs import Job
from experiments.study import ERROR, RUN, SEEN_S, STEPS, Claim, Trials
from experiments.sweepfile import Sweep, read
from vitx import stats, tracking
from vitx.config import override
from vitx.tracking import STEP

PROG = "python -m experiments.sweep"
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
    if settings.workers < 1:
        raise ValueError(f"workers = {settings.workers} must be at least 1")
    if settings.wandb:
        agents(sweep, settings.workers)
        return
    trials = Trials(sweep, settings.storage, settings.out)
    if settings.show:
        show(trials)
    elif settings.confirm:
        confirm(trials, settings)
    elif settings.workers > 1:
        spread(settings)
        show(trials)
    else:
        work(trials, settings.out)
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
    sweep, name = trials.sweep, uuid.uuid4().hex[:8]
    command = sweep.words(claim.values)
    # The program is looked for where this one was found.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    more = {"PATH": path, "WANDB_RUN_ID": name, "WANDB_RUN_GROUP": sweep.name,
            "VITX_OUT": str(out.resolve())}  # fmt: skip
    log = claim.folder / "output.log"
    with log.open("w") as file:
        program = subprocess.Popen(
            command, env=os.environ | more, stdout=file, stderr=file, preexec_fn=_end_with_parent
        )
        try:
            readings, pruned = _watch(trials, claim, program, out, name)
        except BaseException as error:
            program.terminate()
            program.wait()
            claim.lock.close()
            if isinstance(error, optuna.exceptions.UpdateFinishedTrialError):
                return f"trial {claim.trial.number} was taken over while this worker was silent"
            raise
    said = f"trial {claim.trial.number} {_words(claim.values)}"
    claim.trial.set_user_attr(STEPS, max((step for step, _ in readings), default=0))
    claim.trial.set_user_attr(RUN, name)
    if pruned:
        trials.prune(claim)
        return f"{said}: stopped early at {sweep.metric} {readings[-1][1]:.4g}"
    value = _final(out, sweep, name)
    if program.returncode or value is None:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else "no word"
        why = f"exit {program.returncode}: {last}" if program.returncode else f"no {sweep.metric}"
        trials.fail(claim, why[:300])
        return f"{said}: failed, {why}"
    trials.complete(claim, value)
    return f"{said}: {sweep.metric} {value:.4g}"


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
            if not ended and trials.sweep.hyperband and claim.trial.should_prune():
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
    return [(event.get(STEP, 0), event[sweep.metric]) for event in events if sweep.metric in event]


def _folder(out: Path, sweep: Sweep, name: str) -> Path | None:
    """The folder of the run with that id, once there is one."""
    return next((out / sweep.name).glob(f"*-{name}"), None)


def _final(out: Path, sweep: Sweep, name: str) -> float | None:
    folder = _folder(out, sweep, name)
    return None if folder is None else tracking.read_json(folder / "summary.json").get(sweep.metric)


def _end_with_parent() -> None:
    """Have the kernel end this process when its worker dies, where the kernel can (Linux)."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def spread(settings: Settings) -> None:
    """Several workers of this machine; the cores are shared among them.

    Raises ValueError naming the log of a worker that failed.
    """
    flags = [str(settings.file), "--out", str(settings.out)]
    flags += ["--storage", settings.storage] if settings.storage else []
    folder = settings.out / read(settings.file).name
    runs.spread("experiments.sweep", flags, workers=settings.workers, folder=folder)


def table(trials: Trials) -> Table:
    """Every trial: how it ended, what it reached, how far it was trained."""
    names = list(trials.sweep.parameters)
    header = ("trial", "state", trials.sweep.metric, *names, "steps", "seconds", "run")
    body = []
    for trial in trials.all():
        attributes = trial.user_attrs
        state = trial.state.name.lower()
        if ERROR in attributes:
            state = f"failed: {attributes[ERROR]}"
        values = (
            [trial.value]
            if trial.value is not None
            else list(trial.intermediate_values.values())[-1:]
        )
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
        for value, values in best[:5]:
            print(f"  {value:.4g}: {_words(values)}")
    for name, share in importances(trials).items():
        print(f"  importance of {name}: {share:.0%}")
    print(saved(trials))


def ranking(trials: Trials) -> list[tuple[float, dict[str, Any]]]:
    """Final value and settings of the trials that ran to their end, best first."""
    found = [(t.value, t.params) for t in trials.all(TrialState.COMPLETE) if t.value is not None]
    return sorted(found, key=lambda pair: pair[0], reverse=trials.sweep.goal == "maximize")


def importances(trials: Trials) -> dict[str, float]:
    """How much of the value's variance each parameter explains (fANOVA; Hutter et al. 2014).

    Empty with fewer than four ended trials, or when nothing varies.
    """
    done = trials.all(TrialState.COMPLETE)
    varied = [n for n in trials.sweep.parameters if len({t.params.get(n) for t in done}) > 1]
    if len(done) < 4 or not varied or len({t.value for t in done}) == 1:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(trials.study, evaluator=evaluator, params=varied)


def saved(trials: Trials) -> str:
    """Steps that stopping early has saved, beside trials that ran to their end."""
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
    sweep = trials.sweep
    if not sweep.recipe:
        raise ValueError(f"{sweep.path}: --confirm reruns sweeps of experiments.train only")
    if settings.seeds < 2:
        raise ValueError(f"seeds = {settings.seeds}: an interval needs at least 2")
    best = ranking(trials)[: settings.confirm]
    if not best:
        raise ValueError(f"{sweep.path}: no trial has run to its end yet")
    base = sweep.base()
    used = {base.seed, *(trial.params.get("seed", 0) for trial in trials.all())}
    fresh = range(max(used) + 1, max(used) + 1 + settings.seeds)
    jobs = {
        rank: [
            Job(f"{sweep.name}-confirmed", f"{_words(values)},seed={seed}"[:100],
                override(base, **values | {"seed": seed}))
            for seed in fresh
        ]
        for rank, (_, values) in enumerate(best)
    }  # fmt: skip
    how = runs.How(out=settings.out, device=tracking.device())
    runs.work([job for some in jobs.values() for job in some], how)
    found = runs.ended(settings.out)
    body = []
    for rank, (value, values) in enumerate(best):
        reached = [found[job.key].values.get(sweep.metric) for job in jobs[rank]]
        whole = [one for one in reached if one is not None]
        interval = stats.mean_interval(whole) if len(whole) > 1 else None
        words = (
            f"{interval.value:.4g} ({interval.low:.4g} to {interval.high:.4g})" if interval else "–"
        )
        body.append((_words(values), f"{value:.4g}", words, f"{len(whole)} of {len(reached)}"))
    header = ("settings", "in the sweep", f"{sweep.metric} on fresh seeds (95 %)", "seeds")
    print(Table(header, body).markdown())


def agents(sweep: Sweep, workers: int) -> None:
    """Register the file with W&B and run agents until the sweep ends."""
    made = subprocess.run(
        [sys.executable, "-m", "wandb", "sweep", str(sweep.path)], stderr=subprocess.PIPE, text=True
    )
    sys.stderr.write(made.stderr)
    found = re.search(r"wandb agent (\S+)", made.stderr)
    if made.returncode or not found:
        raise ValueError(f"{sweep.path}: W&B did not take the sweep; see above")
    command = [sys.executable, "-m", "wandb", "agent", found[1]]
    started = [subprocess.Popen(command) for _ in range(workers)]
    if any(agent.wait() for agent in started):
        raise ValueError(f"a W&B agent of {found[1]} failed; see above")


def _word(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _words(values: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={_word(value)}" for name, value in values.items())


if __name__ == "__main__":
    cli.run(main)
