"""Processes that make runs side by side, and the settings of the programs that start them."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments import cli
from experiments.study.runs import How, Job, check_lanes, ended, missing, work
from vitx.measure import machine
from vitx.registry import UserError
from vitx.training import parallel, tracking


@dataclass(frozen=True)
class Making:
    """Settings that the programs which make runs share."""

    workers: int = 1
    """Processes that make runs at the same time; they share the cores."""
    only_runs: bool = False
    """Stop when the runs are made, as on one node of many."""
    vectorize: int = 1
    """Seeds that are trained as one program; for small models."""
    fresh: bool = False
    """Make again what another version made."""
    out: Path = tracking.OUT
    """Folder of run folders, shared by all programs; by default VITX_OUT, or runs."""
    data_root: str = ""
    """Folder of the data, if it is not that of the configuration."""
    wandb: Literal["online", "offline", "disabled"] | None = None
    """W&B mode of the runs; if not given WANDB_MODE, else offline."""
    device: str = ""
    """Device; empty for the accelerator of this machine, else the CPU."""

    def __post_init__(self):
        cli.at_least(self, workers=1, vectorize=1)

    def how(self) -> How:
        """How runs are made with these settings. Raises ValueError for an absent device."""
        device = parallel.device(self.device)
        return How(
            out=self.out, device=device, wandb=self.wandb, lanes=self.vectorize, fresh=self.fresh
        )

    @property
    def passed_on(self) -> list[str]:
        """The flags that go to other processes, as far as they were given: where runs are, W&B
        mode, device, and whether stale runs count."""
        names = ("out", "data_root", "wandb", "device")
        given = {name: str(getattr(self, name)) for name in names if getattr(self, name)}
        flags = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in given.items()
            if name != "out" or self.out != tracking.OUT
        ]
        return [*flags, "--fresh"] if self.fresh else flags

    def make(self, jobs: Sequence[Job], module: str, words: Sequence[str]) -> None:
        """Make the runs, by as many processes as asked for: of `module`, with the flags `words`.

        Raises ValueError for runs that can't be lanes of one program, before any is started.
        """
        how = self.how()
        left = missing(jobs, ended(how.out), fresh=how.fresh)
        check_lanes(left, how)
        if self.workers > 1 and left:
            flags = [*words, "--only-runs", f"--vectorize={self.vectorize}", *self.passed_on]
            spread(module, flags, workers=self.workers, folder=self.out / jobs[0].group)
        work(jobs, how)


def spread(module: str, flags: Sequence[str], *, workers: int, folder: Path) -> None:
    """Run a program in several processes, which share the work and this machine's cores.

    Their output is in `folder/worker-HOST-N.log`. Raises ValueError with the last words of one
    that failed. They end, after saving, when this process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"worker-{socket.gethostname()}-{number}.log" for number in range(workers)]
    started = []
    for log in logs:
        with log.open("w") as file:
            program = subprocess.Popen(
                [sys.executable, "-m", module, *flags], env=os.environ | share(workers),
                stdout=file, stderr=file, preexec_fn=machine.end_with_parent,
            )  # fmt: skip
        started.append(program)
    print(f"{workers} workers at work; their output is in {folder}/worker-*.log", flush=True)
    try:
        ends = [process.wait() for process in started]
    except BaseException:
        for process in started:
            process.terminate()
        for process in started:  # they save what they have, and end
            process.wait()
        raise
    failed = [log for log, end in zip(logs, ends, strict=True) if end]
    if failed:
        raise UserError(f"a worker failed: {last_words(failed[0])} (all of it is in {failed[0]})")


def share(workers: int) -> dict[str, str]:
    """The environment variable that gives each of so many processes its share of the cores."""
    return {"OMP_NUM_THREADS": str(max(1, machine.cores() // workers))}


def last_words(log: Path) -> str:
    """The last error that a program wrote to its log, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or [line for line in lines if line] or ["it wrote nothing"])[-1][:300]
