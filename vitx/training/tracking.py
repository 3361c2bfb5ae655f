"""The run folder, the environment of a run, and Weights & Biases (the only file that imports it).

`metrics.jsonl` in the run folder is the truth; W&B gets the same events. W&B never blocks or fails
a run: what it raises is said once and the run goes on without it.
"""

import json
import os
import re
import shlex
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vitx.files import Lock, read_json, to_json, warn_once, write_json
from vitx.registry import UserError
from vitx.training.provenance import environment, git

if TYPE_CHECKING:
    import wandb

Event = dict[str, int | float]
"""What is known at a step: metrics by name, and the step itself."""

PROJECT = "vitx"
OUT = Path(os.environ.get("VITX_OUT") or "runs")
"""Where programs keep their run folders, unless told otherwise."""
EVENTS = "metrics.jsonl"
MODES = ("online", "offline", "disabled")

TRAIN_LOSS = "train/loss"
TRAIN_ACCURACY = "train/accuracy"
VAL_LOSS = "val/loss"
VAL_ACCURACY = "val/accuracy"
TEST_LOSS = "test/loss"
TEST_ACCURACY = "test/accuracy"
LEARNING_RATE = "lr"
GRADIENT_NORM = "gradient_norm"
SECONDS = "seconds"
STEP = "step"
ROW = "row"
"""Number of the results so far, in a run that makes results and not steps."""
IMAGES_PER_S = "images_per_s"
METRICS = frozenset({
    TRAIN_LOSS, TRAIN_ACCURACY, VAL_LOSS, VAL_ACCURACY, TEST_LOSS, TEST_ACCURACY, LEARNING_RATE,
    GRADIENT_NORM, SECONDS, STEP, ROW, IMAGES_PER_S,
})  # fmt: skip
"""Names that the programs log; what is reported has other names."""


def wandb_mode(flag: str | None = None) -> tuple[str, str]:
    """The mode and why: the flag, else WANDB_MODE, else online within a sweep, else offline."""
    named = os.environ.get("WANDB_MODE", "")
    choices = (
        (flag, "asked for"),
        (named, "WANDB_MODE says so"),
        ("online" if os.environ.get("WANDB_SWEEP_ID") else "", "WANDB_SWEEP_ID is set"),
        ("offline", "the default"),
    )
    mode, why = next((mode, why) for mode, why in choices if mode)
    if mode not in MODES:
        raise UserError(f"W&B mode {mode!r} ({why}) is not known; choices: {', '.join(MODES)}")
    return mode, why


def group_of(program: str) -> str:
    """The group of a program's runs: its own, within a sweep that of the sweep."""
    return os.environ.get("WANDB_RUN_GROUP") or program


class Run:
    """A run's folder `root/group/name-id` and its W&B run. Use it as a context manager.

    Within a sweep WANDB_RUN_ID and WANDB_RUN_GROUP replace id and group. A `folder` that holds a
    run already is gone on with, under the same id. Raises ValueError if another process is at work
    in it.
    """

    def __init__(
        self,
        root: Path,
        group: str,
        name: str,
        config: Mapping[str, object],
        *,
        mode: str | None = None,
        folder: Path | None = None,
    ):
        self.mode, self.why = wandb_mode(mode)
        group = group_of(group)
        earlier = read_json(folder / "run.json").get("id", "") if folder else ""
        self.id = earlier or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
        self.resumed = bool(earlier)
        self.folder = folder or Path(root, group, f"{file_name(name)}-{self.id}")
        self._lock = Lock(self.folder)
        self.figures = self.folder / "figures"
        self.figures.mkdir(parents=True, exist_ok=True)
        self._events = (self.folder / EVENTS).open("a", encoding="utf8")
        if not self.resumed:
            self.write("run.json", {"id": self.id, "group": group, "name": name})
        self.write("config.json", dict(config))
        now = asdict(environment()) | {"before": _before(self.folder)}
        self.write("environment.json", now)
        if changes := git("diff", "HEAD"):
            (self.folder / "git.diff").write_text(changes + "\n", encoding="utf8")
        self._wandb: wandb.Run | None = None
        if self.mode != "disabled":
            self._start_wandb(group, name, config)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(exit_code=0 if kind is None else 1)

    def log(self, event: Mapping[str, object]) -> None:
        """One event: a flushed line of metrics.jsonl and a point of the W&B curves."""
        self._events.write(to_json(event) + "\n")
        self._events.flush()
        self._tell(lambda run: run.log(dict(event)))

    def events(self, *names: str) -> list[Event]:
        """The events so far that hold one of these metrics."""
        return [event for event in read_events(self.folder) if event.keys() & set(names)]

    def rewind(self, step: int) -> None:
        """Forget the events after a step, which will come again."""
        path = self.folder / EVENTS
        self._events.close()
        kept = [event for event in read_events(self.folder) if event.get(STEP, 0) <= step]
        new = path.with_suffix(".new")
        new.write_text("".join(to_json(event) + "\n" for event in kept), encoding="utf8")
        os.replace(new, path)
        self._events = path.open("a", encoding="utf8")

    def table(self, name: str, columns: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
        """A table in W&B."""

        def tell(run: "wandb.Run") -> None:
            import wandb

            run.log({name: wandb.Table(columns=list(columns), data=[list(line) for line in lines])})

        self._tell(tell)

    def figure(self, name: str, path: Path) -> None:
        """A picture file in W&B."""

        def tell(run: "wandb.Run") -> None:
            import wandb

            run.log({name: wandb.Image(str(path))})

        self._tell(tell)

    def summarise(self, values: Mapping[str, object]) -> None:
        """The run's final values: summary.json and the W&B summary."""
        self.write("summary.json", dict(values))
        self._tell(lambda run: run.summary.update(dict(values)))

    def write(self, name: str, value: object) -> None:
        """A JSON file in the run folder, whole or not at all."""
        write_json(self.folder / name, value)

    def finish(self, exit_code: int = 0) -> None:
        """Close the files and the W&B run."""
        self._events.close()
        self._tell(lambda run: run.finish(exit_code=exit_code))
        self._lock.close()

    @property
    def where(self) -> str:
        """One line: the W&B mode, why, and how to see or upload the run."""
        if self._wandb is None:
            return f"W&B: {self.mode} ({self.why})"
        if self.mode == "offline":
            folders = sorted(self.folder.glob("wandb/offline-run-*"))  # one for each start
            command = shlex.join(["wandb", "sync", *map(str, folders)])
            return f"W&B: offline ({self.why}); upload with: {command}"
        return f"W&B: {self.mode} ({self.why}); {getattr(self._wandb, 'url', '')}"

    @property
    def wandb_folder(self) -> Path | None:
        """The folder of the W&B run, which `wandb leet` and `wandb sync` take."""
        return None if self._wandb is None else Path(self._wandb.dir).parent

    def _start_wandb(self, group: str, name: str, config: Mapping[str, object]) -> None:
        if os.environ.get("WANDB_MODE") == "":
            del os.environ["WANDB_MODE"]  # the library refuses an empty one
        # A kill loses at most this many seconds of the offline file.
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
        try:
            import wandb

            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                group=group,
                name=name,
                id=self.id,
                dir=self.folder,
                config=dict(config),
                mode=self.mode,  # type: ignore[arg-type]
                # Offline there is no server to ask, and a new segment is made.
                resume="allow" if self.resumed and self.mode == "online" else None,
                settings=wandb.Settings(silent=True, console="off"),
            )
            run.define_metric(STEP)
            run.define_metric("*", step_metric=STEP)
        except Exception as error:  # W&B raises of any class
            self._give_up(error)
        else:
            self._wandb = run

    def _tell(self, act: "Callable[[wandb.Run], object]") -> None:
        if self._wandb is None:
            return
        try:
            act(self._wandb)
        except Exception as error:  # W&B raises of any class
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        self._wandb = None
        self.mode, self.why = "disabled", f"W&B raised {type(error).__name__}: {error}"
        print(f"W&B is left out from here on: {self.why}", file=sys.stderr)


def file_name(name: str) -> str:
    """The name with what is not for files replaced by dashes."""
    return re.sub(r"[^\w.,=+()-]+", "-", name)


def read_events(folder: Path) -> list[Event]:
    """The events of a run folder so far, up to the first line that a crash has damaged."""
    path = folder / EVENTS
    lines = path.read_bytes().splitlines(True) if path.exists() else []
    events: list[Event] = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            event = None
        if not isinstance(event, dict):
            if number < len(lines) or line.endswith(b"\n"):  # else it is just being written
                warn_once(f"{path}: line {number} is damaged; events from there on are left out")
            break
        events.append(event)
    return events


def _before(folder: Path) -> list[dict[str, object]]:
    """Where and of what commit the run in a folder was at work until now, if it is resumed."""
    last = read_json(folder / "environment.json")
    if not last:
        return []
    kept: dict[str, object] = {
        name: last.get(name) for name in ("time", "command", "commit", "dirty", "cpu", "gpu")
    }
    return [*last.get("before", []), kept]
