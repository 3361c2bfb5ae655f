"""Worker processes: `Workers` has each task done by a process of its own.

On a CPU under Linux the processes are forked from a server (`python -m vitx.measure.worker`) that
has imported what the job needs and has computed nothing, since the imports take longer than some
tasks. Elsewhere, and where the imports have started threads, each imports by itself: neither
threads nor what drives an accelerator survive a fork. The fork server of `multiprocessing` does not
serve: its processes run the user's program again, it imports for the first job only, and it forks
with threads.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch

from vitx.measure.jobs import REBUILD_FAILED, Job, private_folder
from vitx.measure.machine import descendants, end_with_parent, kill_tree, threads, tree_mib

POLL_S = 0.2
"""Seconds between two looks at the memory of a process."""
P = ParamSpec("P")
Value = TypeVar("Value")


class TaskFailed(Exception):
    """A task that gave no value; its process's last words."""


class CannotRebuild(TaskFailed):
    """A worker process can't unpickle a module."""


def forks(device: torch.device) -> bool:
    """Whether processes that time this device are forked, unless imports have started threads."""
    return device.type == "cpu" and sys.platform == "linux"


class Workers:
    """Does tasks, one after the other.

    Used in a `with` statement, whose end, by Ctrl-C too, ends all processes.
    """

    def __init__(self) -> None:
        self._server: tuple[subprocess.Popen[bytes], Connection] | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(
        self,
        job: Job,
        cache: Path,
        task: Callable[Concatenate[Job, P], Value],
        *args: P.args,
        **options: P.kwargs,
    ) -> Value:
        """What `task(job, …)` returns in another process. Raises TaskFailed with its last words.

        `cache` is the private folder of compiled code. The task is a function of a module.
        """
        private_folder(cache)
        result, errors = job.folder / "result.pkl", job.folder / "errors.txt"
        result.unlink(missing_ok=True)
        errors.write_text("")
        server, pipe = self._server or self._start(errors)
        worker, code = server.pid, None

        def ended(seconds: float) -> bool:
            nonlocal worker, code
            if not pipe.poll(seconds):
                return False
            try:
                worker, code = pipe.recv()
            except (EOFError, ConnectionError):  # after a task of its own, or before it could begin
                if _has_ended(server, seconds):
                    code = server.returncode
                    self._end()
            return code is not None

        with contextlib.suppress(ConnectionError):  # one that has ended already is seen by `ended`
            pipe.send((job, result, cache.resolve(), task, args, options))
        if over := _past(ended, lambda: worker, job.config.limit_s, job.config.limit_gib):
            self._end()
            raise TaskFailed(over)
        if code == 0 and result.exists():
            return pickle.loads(result.read_bytes())  # from that private folder
        words = _last_words(errors.read_text(errors="replace"), code or 0)
        raise (CannotRebuild if code == REBUILD_FAILED else TaskFailed)(words)

    def _start(self, errors: Path) -> tuple[subprocess.Popen[bytes], Connection]:
        pipe, other = Pipe()
        number = other.fileno()
        with errors.open("a") as stream:
            server = subprocess.Popen(
                [sys.executable, "-m", "vitx.measure.worker", str(number)],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stream,
            )
        other.close()
        self._server = server, pipe
        return self._server

    def _end(self) -> None:
        if self._server:
            server, pipe = self._server
            if server.poll() is None:
                kill_tree(server.pid)
                server.wait()
            pipe.close()
            self._server = None


def run_limited(
    command: list[str], environment: Mapping[str, str], *, limit_s: float, limit_gib: float
) -> tuple[int, str]:
    """Run a program to its end, or to a limit of time or memory; its status and last words.

    At a limit, and on Ctrl-C, it is killed with all that it started. A program that should end when
    this process is killed calls `end_with_parent`.
    """
    with tempfile.TemporaryFile("w+", encoding="utf8", errors="replace") as errors:
        child = subprocess.Popen(
            command, env=dict(environment), stdout=subprocess.DEVNULL, stderr=errors
        )
        try:
            over = _past(partial(_has_ended, child), lambda: child.pid, limit_s, limit_gib)
        finally:
            if child.poll() is None:
                kill_tree(child.pid)
                child.wait()
        if over:
            return -1, over
        errors.seek(0)
        return child.returncode, _last_words(errors.read(), child.returncode)


def _past(
    ended: Callable[[float], bool], process: Callable[[], int], limit_s: float, limit_gib: float
) -> str:
    """Wait until `ended`, called with the seconds it may take, is true; or the limit in words."""
    end = time.monotonic() + limit_s
    while not ended(POLL_S if limit_gib else max(end - time.monotonic(), 0.0)):
        if time.monotonic() >= end:
            return f"the process took longer than {limit_s:.0f} s and was ended"
        if limit_gib and (used := tree_mib(process()) / 2**10) > limit_gib:
            return (
                f"the process took {used:.1f} GiB of memory, more than {limit_gib:g}, and was ended"
            )
    return ""


def _has_ended(program: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        program.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _last_words(errors: str, code: int) -> str:
    if code < 0:
        memory = " (out of memory?)" if code == -9 else ""
        return f"the process was ended by signal {-code}{memory}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0] or "Exception:" in line]
    return (named or lines or [f"exit code {code} without a word"])[-1][:300]


def _may_fork(job: Job) -> bool:
    """Import what the job needs; whether the imports have left this process fit to be forked."""
    if not forks(torch.device(job.device)):
        return False
    before = threads(), descendants(os.getpid())
    job.import_all()
    return (threads(), descendants(os.getpid())) == before  # threads are not forked


def _serve(pipe: Connection) -> None:
    """Fork a process for each task, or do one in this process.

    Of a forked one its number is sent back, and when it has ended its status too.
    """
    forking, server = None, os.getpid()
    while True:
        try:
            job, result, cache, task, args, options = pipe.recv()
        except EOFError:
            return
        forking = _may_fork(job) if forking is None else forking
        worker = os.fork() if forking else 0
        if not worker:
            if forking:
                pipe.close()
                end_with_parent()
                if os.getppid() != server:  # it was killed before that was set
                    return
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
            value = task(replace(job, forked=forking), *args, **options)
            result.write_bytes(pickle.dumps(value))
            return
        pipe.send((worker, None))
        _, status = os.waitpid(worker, 0)
        pipe.send((worker, os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    end_with_parent()
    import vitx.measure.tasks  # noqa: F401 (what it starts, such as BLAS's threads, bears a fork)

    _serve(Connection(int(sys.argv[1])))
