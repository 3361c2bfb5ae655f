"""Run a W&B sweep file without a server: `python -m experiments.sweep FILE [--workers 2]`.

The same command on another machine, with the same --storage, joins in. --show prints the table so
far, --confirm reruns the best settings on fresh seeds, --wandb registers the file with W&B and
starts its agents.
"""

import math
import os
import re
import subprocess
import sys
import time
import uuid
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO, TypeGuard

import tyro

from vitx.registry import UserError

try:
    import optuna
    from optuna.trial import TrialState
except Exception as error:  # of what it imports: of any class
    print(
        f"error: optuna can't be imported: {error}; sweeps need: pip install -e '.[sweep]'",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

from experiments import cli
from experiments.study import findings, runs, workers
from experiments.study.runs import How
from experiments.study.sweepfile import Sweep, read
from experiments.study.tables import WHOLE
from experiments.study.trials import RUN, SEEN_S, STEPS, VERSION, Claim, Trials, error_of
from vitx.files import read_json
from vitx.measure import machine
from vitx.training import parallel, provenance, tracking
from vitx.training.tracking import STEP

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
    whole: bool = False
    """Let every trial run to its end, as another sweep: what early_terminate saves, and costs."""
    confirm: int = 0
    """Rerun so many of the best settings, and the command without the parameters, on fresh seeds,
    and keep what they reach as a result."""
    seeds: int = 8
    """Fresh seeds of each setting that is confirmed."""
    wandb: bool = False
    """Register the file with W&B, and start --workers agents; those runs are online."""
    only_runs: bool = False
    """Stop when the trials, or the runs that confirm, have ended, as on one node of many."""
    out: Path = tracking.OUT
    """Folder of run folders."""


def main(args: list[str]) -> None:
    """Check the file, then run, show, confirm or register."""
    settings = cli.parse(Settings, args, prog=PROG)
    sweep = read(settings.file)
    cli.at_least(settings, workers=1, confirm=0, seeds=2)
    if settings.show + settings.wandb + bool(settings.confirm) > 1:
        raise UserError("--show, --confirm and --wandb exclude each other; choose one")
    if settings.only_runs and (settings.show or settings.wandb):
        raise UserError("--only-runs is for trials that this program runs")
    cli.goes_with(settings, seeds="confirm")
    if settings.whole:
        if sweep.hyperband is None or settings.wandb:
            raise UserError(
                f"{settings.file}: --whole is for files with early_terminate, and without --wandb"
            )
        sweep = replace(sweep, name=f"{sweep.name}{WHOLE}", hyperband=None)
    if settings.wandb:
        if settings.storage:
            raise UserError("--storage is for sweeps without --wandb, whose server keeps them")
        agents(sweep, settings)
        return
    reads = settings.show or settings.confirm > 0
    trials = Trials(sweep, settings.storage, settings.out, new=not reads)
    if settings.workers > 1 and not settings.show:
        spread(sweep, settings)
    elif not reads:
        work(trials, settings.out)
    if settings.confirm:
        how = How(out=settings.out, device=parallel.device())
        tried = findings.candidates(trials, best=settings.confirm, seeds=settings.seeds)
        runs.work([job for _, jobs in tried for job in jobs], how)
        if not settings.only_runs:
            findings.confirm(trials, tried, how)
    elif not settings.only_runs:
        findings.show(trials)
    if not reads and not trials.all(TrialState.COMPLETE, TrialState.PRUNED):
        failed = trials.all()
        raise UserError(f"all {len(failed)} trials failed; the first: {error_of(failed[0])}")


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
    name = f"trial {claim.trial.number} {cli.label(claim.values)}"
    try:
        with (
            closing(claim.lock),
            (claim.folder / "output.log").open("w") as output,
            (claim.folder / ERRORS).open("w") as errors,
        ):
            return f"{name}: {_run(trials, claim, out, output, errors)}"
    except optuna.exceptions.UpdateFinishedTrialError:
        return f"{name}: taken over by another worker, as this one was silent"


def _run(trials: Trials, claim: Claim, out: Path, output: TextIO, errors: TextIO) -> str:
    """Run the program under a new run id, record how it ended, and return it in words."""
    name = uuid.uuid4().hex[:8]
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
        values, pruned = _watch(trials, claim, program, name)
    except BaseException:
        program.terminate()
        program.wait()
        raise
    claim.trial.set_user_attr(STEPS, max((step for step, _ in values), default=0))
    claim.trial.set_user_attr(RUN, name)
    claim.trial.set_user_attr(VERSION, provenance.version())
    if pruned:
        trials.prune(claim)
        return f"stopped early at {trials.sweep.metric} {values[-1][1]:.4g}"
    return _end(trials, claim, program.returncode, name)


def _end(trials: Trials, claim: Claim, status: int, name: str) -> str:
    """Record how a program that was not stopped has ended, and return it in words."""
    folder, metric = trials.run_folder(name), trials.sweep.metric
    value = None if folder is None else read_json(folder / "summary.json").get(metric)
    if status:
        why = f"exit {status}: {workers.last_words(claim.folder / ERRORS)}"
    elif folder is None:
        why = f"it left no run in {trials.folder.parent}"
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
    trials: Trials, claim: Claim, program: subprocess.Popen, name: str
) -> tuple[list[tuple[int, float]], bool]:
    """The metric's values (step, value) until the program ends, and whether it was stopped."""
    reported, last = 0, time.monotonic()
    while True:
        ended = program.poll() is not None
        values = _logged(trials, name)
        for place, (_, value) in enumerate(values[reported:], reported + 1):
            claim.trial.report(value, place)
            if not ended and trials.behind(claim):
                program.terminate()
                program.wait()
                return values[:place], True
        reported = len(values)
        if ended:
            return values, False
        if time.monotonic() - last > SEEN_S:
            trials.alive(claim.trial)
            last = time.monotonic()
        time.sleep(POLL_S)


def _logged(trials: Trials, name: str) -> list[tuple[int, float]]:
    """Step and value of the metric, as far as the run has logged it."""
    folder, metric = trials.run_folder(name), trials.sweep.metric
    events = tracking.read_events(folder) if folder else []
    return [
        (int(event.get(STEP, 0)), event[metric])
        for event in events
        if _is_number(event.get(metric))
    ]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def spread(sweep: Sweep, settings: Settings) -> None:
    """Several workers of this machine; the cores are shared among them.

    Raises ValueError with the last words of a worker that failed.
    """
    flags = [str(settings.file), "--only-runs", f"--out={settings.out}"]
    flags += ["--whole"] if settings.whole else []
    flags += [f"--storage={settings.storage}"] if settings.storage else []
    if settings.confirm:
        flags += [f"--confirm={settings.confirm}", f"--seeds={settings.seeds}"]
    folder = settings.out / sweep.name
    workers.spread("experiments.sweep", flags, workers=settings.workers, folder=folder)


def agents(sweep: Sweep, settings: Settings) -> None:
    """Register the file with W&B and run agents until the sweep ends; all of it online.

    Raises ValueError if W&B does not take the file, or if an agent fails.
    """
    here = {name: value for name, value in _environment().items() if name != "WANDB_MODE"}
    here |= {"VITX_OUT": str(settings.out.resolve())} | workers.share(settings.workers)
    wandb = [sys.executable, "-m", "wandb"]
    made = subprocess.run(
        [*wandb, "sweep", str(sweep.path)], env=here, stderr=subprocess.PIPE, text=True
    )
    sys.stderr.write(made.stderr)
    agent = re.search(r"wandb agent (\S+)", made.stderr)
    if made.returncode or not agent:
        raise UserError(f"{sweep.path}: W&B did not take the sweep; see above")
    started = [
        subprocess.Popen([*wandb, "agent", agent[1]], env=here, preexec_fn=machine.end_with_parent)
        for _ in range(settings.workers)
    ]
    if any([process.wait() for process in started]):
        raise UserError(f"a W&B agent of {agent[1]} failed; see above")


if __name__ == "__main__":
    cli.run(main)
