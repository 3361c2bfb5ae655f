"""The trials of a sweep in an Optuna storage: taken, told, and taken over from the dead.

All trials are put into the storage when the study is made: the points of a grid, and for the other
methods as many empty ones as `run_cap` says, whose values are drawn when they are taken. So each is
taken once, however many the workers. A worker holds a lock in its trial's folder, which the kernel
lets go of when the worker dies; then the trial fails without an error, and what failed so is put
back once.
"""

import hashlib
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, fail_stale_trials
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from experiments.sweepfile import Choice, Sweep
from vitx import checkpoint

DEFINITION, READY = "definition", "ready"
"""Attributes of a study: a hash of what it searches, and that all its trials are there."""
SLOT, OWNER, ERROR, STEPS, RUN = "slot", "owner", "error", "steps", "run"
"""Attributes of a trial: the point, or the lost trial, that it stands for; who runs it; why it
failed; steps that were trained; the run folder."""
SURPLUS = "surplus"
"""Error of a trial that two workers put back at the same time, or that nobody had put there."""
SEEN_S = 30
"""Seconds between two signs of life."""
LOST_S = 300
"""Seconds without one after which another machine's worker counts as dead."""


@dataclass(frozen=True)
class Claim:
    """A trial that this worker runs."""

    trial: Trial
    values: Mapping[str, Any]
    folder: Path
    lock: checkpoint.Lock


class Trials:
    """The trials of a sweep in a storage, as one worker sees them.

    `storage` is an Optuna URL, or the path of a journal file; empty for one beside the runs. Raises
    ValueError for one that can't be reached, or that holds another sweep of this name.
    """

    def __init__(self, sweep: Sweep, storage: str, out: Path):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Heartbeats are marked experimental, and meant for a loop of Optuna's own.
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        self.sweep, self.folder = sweep, out / sweep.name / "trials"
        self.folder.mkdir(parents=True, exist_ok=True)
        # Locks are seen by those that share the folder.
        self._host = f"{socket.gethostname()}:{self.folder.resolve()}"
        where = storage or str(out / sweep.name / "journal")
        try:
            with self._alone():
                self._storage = _connect(where)
                self.study = optuna.create_study(
                    storage=self._storage,
                    study_name=sweep.name,
                    direction=sweep.goal,
                    pruner=_pruner(sweep),
                    load_if_exists=True,
                )
                self._fill(where)
        except (SQLAlchemyError, OSError, ImportError) as error:
            words = " ".join(str(error).split())[:200]
            raise ValueError(f"storage = {where!r} can't be reached: {words}") from None

    def take(self) -> Claim | None:
        """The next trial to run, with its values; None if none waits."""
        with self._alone():
            self._put_back()
            if not self.all(TrialState.WAITING):
                return None
            trial = self.study.ask()
            if self._surplus(trial):
                trial.set_user_attr(ERROR, SURPLUS)
                self.study.tell(trial, state=TrialState.FAIL)
                return None
            folder = self._folder(trial.number)
            lock = checkpoint.Lock(folder)
            self.alive(trial)
        # Draws depend on the trial and on what is known, not on the worker.
        self.study.sampler = _sampler(self.sweep, trial.number)
        values = {name: _draw(trial, name, each) for name, each in self.sweep.parameters.items()}
        return Claim(trial, values, folder, lock)

    def alive(self, trial: Trial) -> None:
        """Leave a sign of life."""
        owner = {"host": self._host, "process": os.getpid(), "seen": time.time()}
        trial.set_user_attr(OWNER, owner)
        if isinstance(self._storage, RDBStorage):
            self._storage.record_heartbeat(trial._trial_id)

    def complete(self, claim: Claim, value: float) -> None:
        self._tell(claim, TrialState.COMPLETE, value)

    def prune(self, claim: Claim) -> None:
        """End a trial that its readings have ruled out."""
        self._tell(claim, TrialState.PRUNED, None)

    def fail(self, claim: Claim, error: str) -> None:
        """End a trial that went wrong; it is not run again."""
        claim.trial.set_user_attr(ERROR, error)
        self._tell(claim, TrialState.FAIL, None)

    def all(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials in these states, or in any, without those that were lost or surplus."""
        found = self.study.get_trials(deepcopy=False, states=states or None)
        return [t for t in found if t.user_attrs.get(ERROR) != SURPLUS and not _lost(t)]

    @property
    def ended(self) -> bool:
        """Whether none waits or runs, and none was lost."""
        found = self.study.get_trials(deepcopy=False)
        return not self._unreplaced(found) and all(trial.state.is_finished() for trial in found)

    def _tell(self, claim: Claim, state: TrialState, value: float | None) -> None:
        self.study.tell(claim.trial, value, state=state)
        claim.lock.close()

    def _put_back(self) -> None:
        """Fail the trials of dead workers, and put back what failed without an error."""
        if isinstance(self._storage, RDBStorage):
            fail_stale_trials(self.study)
        for trial in self.all(TrialState.RUNNING):
            if self._dead(trial):
                self.study.tell(trial.number, state=TrialState.FAIL)
        for trial in self._unreplaced(self.study.get_trials(deepcopy=False)):
            self.study.enqueue_trial(trial.params, user_attrs={SLOT: f"again {trial.number}"})

    def _unreplaced(self, found: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Lost trials for which no other stands."""
        slots = {trial.user_attrs.get(SLOT) for trial in found}
        return [t for t in found if _lost(t) and f"again {t.number}" not in slots]

    def _dead(self, trial: FrozenTrial) -> bool:
        """Whether the worker that took it is gone: by its lock here, elsewhere by its silence."""
        owner = trial.user_attrs.get(OWNER)
        if owner and owner["host"] != self._host:
            return time.time() - owner["seen"] > LOST_S
        started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        if (
            owner is None
            and time.time() - started < LOST_S
            and not self._folder(trial.number).exists()
        ):
            return False  # another machine's worker has it in hand
        try:
            checkpoint.Lock(self._folder(trial.number)).close()
        except checkpoint.Busy:
            return False
        return True

    def _surplus(self, trial: Trial) -> bool:
        """Whether nobody put it there, or another one stands for the same."""
        found = self.study.get_trials(deepcopy=False)
        slot = found[trial.number].user_attrs.get(SLOT)
        before = found[: trial.number]
        return slot is None or any(other.user_attrs.get(SLOT) == slot for other in before)

    def _folder(self, number: int) -> Path:
        return self.folder / f"{number:04d}"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the workers that share this folder apart, for the moments of a claim."""
        while True:
            try:
                lock = checkpoint.Lock(self.folder)
                break
            except checkpoint.Busy:
                time.sleep(0.02)
        try:
            yield
        finally:
            lock.close()

    def _fill(self, where: str) -> None:
        """Put in all trials, once; refuse a study that searches something else."""
        wanted, attributes = definition(self.sweep), self.study.user_attrs
        if attributes.get(DEFINITION, wanted) != wanted:
            raise ValueError(
                f"storage = {where!r} holds another sweep named {self.sweep.name!r}: its method, "
                "metric, parameters or command differ; choose another name or storage"
            )
        if attributes.get(READY):
            return
        self.study.set_user_attr(DEFINITION, wanted)
        there = {trial.user_attrs.get(SLOT) for trial in self.study.get_trials(deepcopy=False)}
        for number, point in enumerate(self.sweep.points()):
            if (slot := f"point {number}") not in there:
                self.study.enqueue_trial(point, user_attrs={SLOT: slot})
        self.study.set_user_attr(READY, True)


def definition(sweep: Sweep) -> str:
    """A hash of what a sweep searches, and how."""
    parameters = {name: vars(each) for name, each in sweep.parameters.items()}
    hyperband = vars(sweep.hyperband) if sweep.hyperband else None
    said = [sweep.method, sweep.metric, sweep.goal, parameters, list(sweep.template), hyperband]
    text = json.dumps([*said, sweep.trials], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _lost(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and ERROR not in trial.user_attrs


def _connect(where: str) -> BaseStorage:
    if "://" not in where:
        return JournalStorage(JournalFileBackend(where))
    for wait in (0.5, 1.0, 2.0, None):
        try:
            return RDBStorage(where, heartbeat_interval=SEEN_S, grace_period=LOST_S)
        except (IntegrityError, ProgrammingError):  # another worker makes the tables just now
            if wait is None:
                raise
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    if sweep.hyperband is None:
        return optuna.pruners.NopPruner()
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=sweep.hyperband.first, reduction_factor=sweep.hyperband.eta
    )


def _sampler(sweep: Sweep, number: int) -> optuna.samplers.BaseSampler:
    if sweep.method == "bayes":
        return optuna.samplers.TPESampler(seed=number)
    return optuna.samplers.RandomSampler(seed=number)


def _draw(trial: Trial, name: str, parameter: Any) -> Any:
    """The parameter's value in this trial: the one that was put there, or a drawn one."""
    if isinstance(parameter, Choice):
        return trial.suggest_categorical(name, parameter.values)
    low, high, step = parameter.low, parameter.high, parameter.step
    if parameter.whole:
        return trial.suggest_int(name, int(low), int(high), step=int(step or 1))
    return trial.suggest_float(name, low, high, step=step, log=parameter.log)
