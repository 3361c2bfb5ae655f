"""The trials of a sweep in an Optuna storage: taken, ended, and taken over from the dead.

All trials are put into the storage when the study is made: the points of a grid, and for the other
methods as many empty ones as `run_cap` says, whose values are drawn when they are taken. So each is
taken once, however many the workers. A worker holds a lock in its trial's folder, which the kernel
lets go of when the worker dies; then the trial fails without an error, and another one is put there
for it.
"""

import hashlib
import json
import math
import os
import re
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, fail_stale_trials
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import get_lock_file
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from experiments.study.kinds import Scalar
from experiments.study.parameters import Choice, Range
from experiments.study.sweepfile import Sweep
from vitx.files import Busy, Lock
from vitx.registry import UserError
from vitx.training import provenance

DEFINITION, READY = "definition", "ready"
"""Attributes of a study: a hash of what it searches, and that all its trials are there."""
SLOT, OWNER, ERROR, STEPS, RUN, VERSION = "slot", "owner", "error", "steps", "run", "version"
"""Attributes of a trial: the point, or the lost trial, that it stands for; who runs it; why it
failed; the step of its last evaluation; the run's id; the version that ran it."""
LOSSES = "losses"
"""Attribute of a trial: how many that stood for the same were lost before it."""
MOST_LOSSES = 10
"""A trial that so many workers died of has failed."""
SEEN_S = 30
"""Seconds between two signs of life."""
LOCKED_S = 120
"""Seconds that a database in a file may be held by another process."""
LOST_S = 300
"""Seconds without a new one after which another machine's worker counts as dead."""


@dataclass(frozen=True)
class Claim:
    """A trial that this worker runs."""

    trial: Trial
    values: Mapping[str, Scalar]
    folder: Path
    lock: Lock


class Trials:
    """The trials of a sweep in a storage, as one worker sees them.

    `storage` is an Optuna URL, or the path of a journal file; empty for one beside the runs. Raises
    ValueError for one that can't be reached, that holds another sweep of this name, or that holds
    none where `new` is False.
    """

    def __init__(self, sweep: Sweep, storage: str, out: Path, *, new: bool = True):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Heartbeats are marked experimental, and meant for a loop of Optuna's own.
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        self.sweep, self._runs = sweep, out / sweep.name
        self.folder = self._runs / "trials"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._signs: dict[int, tuple[object, float]] = {}
        where = storage or str(self._runs / "journal")
        shown = _without_password(where)
        try:
            with self._alone():
                self._host = f"{socket.gethostname()}:{self._folder_id()}"
                self._storage = _connect(where, new=new)
                named = {"storage": self._storage, "study_name": sweep.name}
                if new:
                    self.study = optuna.create_study(
                        **named, direction=sweep.goal, load_if_exists=True
                    )
                elif sweep.name in optuna.get_all_study_names(self._storage):
                    self.study = optuna.load_study(**named)
                else:
                    raise UserError(f"storage = {shown!r} holds no sweep named {sweep.name!r}")
                self._fill(shown)
        except (SQLAlchemyError, StorageInternalError, OSError, ImportError) as error:
            words = " ".join(str(error).split())[:200].replace(where, shown)
            raise UserError(f"storage = {shown!r} can't be reached: {words}") from None

    def take(self) -> Claim | None:
        """The next trial to run, with its values; None if none waits."""
        with self._alone():
            self._put_back()
            if not self.all(TrialState.WAITING):
                return None
            trial = self.study.ask()
            if trial.number not in {t.number for t in self._standing()}:
                self.study.tell(trial, state=TrialState.FAIL)
                return None
            folder = self._folder(trial.number)
            lock = Lock(folder)
            self.alive(trial)
        # Draws depend on the trial and on what is known, not on the worker.
        self.study.sampler = _sampler(self.sweep, trial.number)
        values = {name: draw(trial, name, each) for name, each in self.sweep.parameters.items()}
        return Claim(trial, values, folder, lock)

    def alive(self, trial: Trial) -> None:
        """Leave a sign of life."""
        owner = {"host": self._host, "process": os.getpid(), "seen": time.time()}
        trial.set_user_attr(OWNER, owner)
        if isinstance(self._storage, RDBStorage):
            self._storage.record_heartbeat(trial._trial_id)

    def behind(self, claim: Claim) -> bool:
        """Whether a trial is to stop, by the rule of W&B's engine (sweeps 0.3.0).

        At its last rung it has to be as good as the (⌊n/eta⌋ + 1)-th best of the n that reached it:
        its best value so far or, if the rule is strict, the value there.
        """
        rule = self.sweep.hyperband
        if rule is None:
            return False
        mine = self._history(self.study.get_trials(deepcopy=False)[claim.trial.number])
        rung = max((rung for rung in rule.rungs if rung <= len(mine)), default=0)
        if not rung:
            return False
        others = [self._history(trial) for trial in self.all()]
        reached = sorted(values[rung - 1] for values in others if len(values) >= rung)
        own = mine[rung - 1] if rule.strict else min(mine)
        return own > reached[len(reached) // rule.eta]

    def _history(self, trial: FrozenTrial) -> list[float]:
        """A trial's values in order, lower ones better, without what is no number."""
        values = trial.intermediate_values
        return [self.sweep.badness(values[k]) for k in sorted(values) if math.isfinite(values[k])]

    def complete(self, claim: Claim, value: float) -> None:
        self._tell(claim, TrialState.COMPLETE, value)

    def prune(self, claim: Claim) -> None:
        """End a trial that its values so far have ruled out."""
        self._tell(claim, TrialState.PRUNED, None)

    def fail(self, claim: Claim, error: str) -> None:
        """End a trial that went wrong; it is not run again."""
        claim.trial.set_user_attr(ERROR, error)
        self._tell(claim, TrialState.FAIL, None)

    def all(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials in these states, or in any, without those that were lost or surplus."""
        return [t for t in self._standing() if not _lost(t) and (not states or t.state in states)]

    def run_folder(self, name: str) -> Path | None:
        """The folder of the run with that id, once there is one here."""
        return next(self._runs.glob(f"*-{name}"), None) if name else None

    @property
    def stale(self) -> int:
        """Trials that another version has run."""
        now = provenance.version()
        ended = [t.user_attrs for t in self.all() if {STEPS, VERSION} & t.user_attrs.keys()]
        return sum(attributes.get(VERSION) != now for attributes in ended)

    @property
    def ended(self) -> bool:
        """Whether none waits or runs, and none was lost."""
        trials = self._standing()
        return not _unreplaced(trials) and all(trial.state.is_finished() for trial in trials)

    def _standing(self) -> list[FrozenTrial]:
        """The trials that stand for something: the first for every slot, none without one.

        Two machines may put the same one back at the same time, and a worker that asks when another
        has taken the last one gets a trial that nobody had put there.
        """
        first: dict[str, FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if SLOT in trial.user_attrs:
                first.setdefault(trial.user_attrs[SLOT], trial)
        return list(first.values())

    def _tell(self, claim: Claim, state: TrialState, value: float | None) -> None:
        """Raises UpdateFinishedTrialError if the trial was taken over."""
        ended = self.study.tell(claim.trial, value, state=state, skip_if_finished=True)
        claim.lock.close()
        if ended.state != state:
            raise UpdateFinishedTrialError(f"trial {claim.trial.number} was taken over")

    def _put_back(self) -> None:
        """Fail the trials of dead workers, and put back what failed without an error."""
        if isinstance(self._storage, RDBStorage):
            fail_stale_trials(self.study)
        for trial in self.all(TrialState.RUNNING):
            if self._dead(trial):
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        for trial in _unreplaced(self._standing()):
            # What it was put there with, and what it had drawn.
            values = trial.system_attrs.get("fixed_params", {}) | trial.params
            losses = trial.user_attrs.get(LOSSES, 0) + 1
            again = {SLOT: f"again {trial.number}", LOSSES: losses}
            self.study.enqueue_trial(values, user_attrs=again)

    def _dead(self, trial: FrozenTrial) -> bool:
        """Whether the worker that took it is gone: by its lock here, elsewhere by its silence."""
        owner = trial.user_attrs.get(OWNER)
        elsewhere = not self._folder(trial.number).exists()
        if owner["host"] != self._host if owner else elsewhere:
            # By this machine's clock: those of two may differ.
            last, since = self._signs.get(trial.number, (None, 0.0))
            if last != (owner, "seen"):
                self._signs[trial.number] = (owner, "seen"), time.monotonic()
                return False
            return time.monotonic() - since > LOST_S
        lock = _locked(self._folder(trial.number))
        if lock:
            lock.close()
        return lock is not None

    def _folder(self, number: int) -> Path:
        return self.folder / f"{number:04d}"

    def _folder_id(self) -> str:
        """A word that only those know who share this folder, and so see its locks."""
        path = self.folder / "id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex, encoding="utf8")
        return path.read_text(encoding="utf8")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the workers that share this folder apart, for the moments of a claim."""
        while (lock := _locked(self.folder)) is None:
            time.sleep(0.02)
        with closing(lock):
            yield

    def _fill(self, where: str) -> None:
        """Put in all trials, once; refuse a study that searches something else."""
        # Trials first: a definition is there before any of them, also where another machine is
        # just putting both in.
        empty = not self.study.get_trials(deepcopy=False)
        searched, attributes = definition(self.sweep), self.study.user_attrs
        if DEFINITION not in attributes and empty:
            self.study.set_user_attr(DEFINITION, searched)
        elif attributes.get(DEFINITION) != searched:
            raise UserError(
                f"storage = {where!r} holds another sweep named {self.sweep.name!r}: its method, "
                "metric, goal, parameters, command or early_terminate differ; choose another name "
                "or storage"
            )
        points = self.sweep.points()
        if attributes.get(READY, 0) >= len(points):
            return
        there = {trial.user_attrs.get(SLOT) for trial in self.study.get_trials(deepcopy=False)}
        for number, point in enumerate(points):
            if (slot := f"point {number}") not in there:
                self.study.enqueue_trial(point, user_attrs={SLOT: slot})
        self.study.set_user_attr(READY, len(points))


def definition(sweep: Sweep) -> str:
    """A hash of what a sweep searches, and how; run_cap may grow."""
    parameters = {name: vars(each) for name, each in sweep.parameters.items()}
    rule = sweep.hyperband
    hyperband = {"rungs": rule.rungs, "eta": rule.eta, "strict": rule.strict} if rule else None
    parts = [sweep.method, sweep.metric, sweep.goal, parameters, list(sweep.template), hyperband]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def error_of(trial: FrozenTrial) -> str:
    """Why a trial failed; empty for one that did not."""
    if trial.state != TrialState.FAIL:
        return ""
    return trial.user_attrs.get(ERROR, f"{MOST_LOSSES} workers died of it")


def _lost(trial: FrozenTrial) -> bool:
    """Whether its worker died, and another one is to stand for it."""
    attributes = trial.user_attrs
    few = attributes.get(LOSSES, 0) + 1 < MOST_LOSSES
    return trial.state == TrialState.FAIL and ERROR not in attributes and few


def _unreplaced(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Lost trials for which no other stands."""
    slots = {trial.user_attrs[SLOT] for trial in trials}
    return [trial for trial in trials if _lost(trial) and f"again {trial.number}" not in slots]


def _locked(folder: Path) -> Lock | None:
    """The lock of a folder; None if another process holds it."""
    try:
        return Lock(folder)
    except Busy:
        return None


def _without_password(where: str) -> str:
    return re.sub(r"(://[^/@:]*:)[^/]*@", r"\1***@", where)


def _connect(where: str, *, new: bool) -> BaseStorage:
    if "://" not in where:
        path = Path(where)
        if not new and not path.exists():
            raise FileNotFoundError("there is no such file")
        if path.exists():
            with path.open("rb") as file:
                if file.read(1) not in (b"", b"{"):
                    raise OSError("it is no journal; a database is a URL, such as sqlite:///x")
        # The lock is a link to the file: it can be told to be old if the file is named in full.
        full = str(path.resolve())
        _mend(path, full)
        try:
            return JournalStorage(JournalFileBackend(full))
        except (ValueError, LookupError) as error:  # lines of something else
            raise OSError(f"it is no journal: {error}") from None
    try:
        url = make_url(where)
    except ValueError as error:
        raise OSError(f"it is no URL: {error}") from None
    if url.drivername == "postgresql":  # whose default driver changes with SQLAlchemy's version
        url = url.set(drivername="postgresql+psycopg2")
    address = url.render_as_string(hide_password=False)
    patient = {"connect_args": {"timeout": LOCKED_S}} if url.drivername == "sqlite" else {}
    for wait in (0.5, 1.0, 2.0, None):
        try:
            return RDBStorage(address, patient, heartbeat_interval=SEEN_S, grace_period=LOST_S)
        except (IntegrityError, ProgrammingError):  # another worker makes the tables just now
            if wait is None:
                raise
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _mend(path: Path, full: str) -> None:
    """Cut off a last line that a full disk left unfinished: what comes next would be its end."""
    if not path.exists():
        return
    with get_lock_file(JournalFileSymlinkLock(full)), path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            print(f"warning: {path}: an unfinished last line is cut off", file=sys.stderr)


def _sampler(sweep: Sweep, number: int) -> optuna.samplers.BaseSampler:
    if sweep.method == "bayes":
        return optuna.samplers.TPESampler(seed=number)
    return optuna.samplers.RandomSampler(seed=number)


def draw(trial: Trial, name: str, parameter: Choice | Range) -> Scalar:
    """The parameter's value in this trial: the one that was put there, or a drawn one."""
    if isinstance(parameter, Choice):
        return trial.suggest_categorical(name, parameter.values)
    low, high, step = parameter.low, parameter.high, parameter.step
    if parameter.whole:
        return trial.suggest_int(name, int(low), int(high), step=int(step or 1))
    return trial.suggest_float(name, low, high, step=step, log=parameter.log)
