"""The tasks of a job, each in a process of its own: `python -m vitx.measure.worker` does them.

A job is a folder with `job.json` (a `TimingConfig` and settings) and pickles: candidate, example, and the
reference if there is one. What is timed is a module, or a whole training step (`Training`). The
tasks are `alone` (one of the two: peak memory, compile seconds, error in the timed dtype),
`details` (where its time goes), `pair` (three arms in one process: reference, the same reference
again, candidate; without a reference the candidate alone) and `probe` (the candidate's rate in a
few calls, all arms in memory).

On a CPU under Linux the processes are forked from one that has imported what the pickles need and
has computed nothing, since the imports take longer than some tasks; `forked` says so. Elsewhere,
and where the imports have started threads, each imports by itself: neither threads nor what drives
an accelerator survive a fork.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitx.measure import breakdown
from vitx.measure.equality import Keys, timed_error
from vitx.measure.machine import (
    descendants,
    end_with_parent,
    keep_memory,
    kill_tree,
    peak_mib,
    threads,
    tree_mib,
)
from vitx.measure.timing import (
    ARMS,
    Subject,
    TimingConfig,
    as_timed,
    images_of,
    iterations_of,
    make_step,
    measure_resources,
    pair,
    prepare,
    probe,
    step_config,
    warm_up,
)
from vitx.model.compiler import needs_compiler
from vitx.training import state as training

REBUILD_FAILED = 3
"""Exit status of a process that can't unpickle a module."""
POLL_S = 0.2
"""Seconds between two looks at the memory of a process."""


def write(
    folder: Path,
    plan: TimingConfig,
    reference: Subject | None,
    candidate: Subject,
    example: Tensor,
    keys: Keys | None,
) -> None:
    """Write what the processes of a job need; raises what pickle raises.

    They get this process's number of threads and its precision of float32 products and
    convolutions; ValueError if that was set by PyTorch's newer interface.
    """
    private_folder(folder)
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        raise ValueError(
            "torch.backends.*.fp32_precision is set, which fresh processes can't take over; use "
            "torch.set_float32_matmul_precision"
        ) from None
    settings = {
        "threads": torch.get_num_threads(),
        "matmul_precision": precision,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }
    said = {"plan": asdict(plan), "settings": settings, "device": example.device.type}
    (folder / "job.json").write_text(json.dumps(said))
    pickles = {"candidate": candidate, "example": example, "keys": keys}
    if reference is not None:
        pickles["reference"] = reference
    (folder / "reference.pt").unlink(missing_ok=True)
    for name, value in pickles.items():
        torch.save(value, folder / f"{name}.pt")


def private_folder(path: Path) -> None:
    """Make a folder that no other user can write to: compiled code and pickles are run from it."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)


class Tasks:
    """Does the tasks of a job that was written to `folder`, one after the other.

    Used in a `with` statement, whose end, by Ctrl-C too, ends all processes.
    """

    def __init__(self, folder: Path, plan: TimingConfig):
        self._folder, self._plan = folder, plan
        self._errors = folder / "errors.txt"
        self._server: tuple[subprocess.Popen, Connection] | None = None

    def __enter__(self) -> "Tasks":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, task: str, *args: str, cache: Path) -> dict:
        """One task. A failure is {"failure": its last words}, never an exception.

        `cache` is the private folder of compiled code.
        """
        private_folder(cache)
        result = self._folder / f"result-{task}-{'-'.join(args) or 'all'}.json"
        result.unlink(missing_ok=True)
        self._errors.write_text("")
        server, pipe = self._server or self._start()
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
            pipe.send((str(result), str(cache.resolve()), task, *args))
        limits = self._plan.limit_s, self._plan.limit_gib
        over = _past(ended, lambda: worker, *limits)
        if over:
            self._end()
            return {"failure": over, "rebuilt": True}
        if code == 0 and result.exists():
            return json.loads(result.read_text())
        words = _last_words(self._errors.read_text(errors="replace"), code or 0)
        return {"failure": words, "rebuilt": code != REBUILD_FAILED}

    def _start(self) -> tuple[subprocess.Popen, Connection]:
        pipe, other = Pipe()
        number = other.fileno()
        with self._errors.open("a") as errors:
            server = subprocess.Popen(
                [sys.executable, "-m", "vitx.measure.worker", str(self._folder), str(number)],
                pass_fds=[number], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=errors,
            )  # fmt: skip
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
    """Wait until `ended`, asked with the seconds it may take, says so; or the limit in words."""
    end = time.monotonic() + limit_s
    while not ended(POLL_S if limit_gib else max(end - time.monotonic(), 0.0)):
        if time.monotonic() >= end:
            return f"the process took longer than {limit_s:.0f} s and was ended"
        if limit_gib and (used := tree_mib(process()) / 2**10) > limit_gib:
            return (
                f"the process took {used:.1f} GiB of memory, more than {limit_gib:g}, and was ended"
            )
    return ""


def _has_ended(program: subprocess.Popen, seconds: float) -> bool:
    try:
        program.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _last_words(errors: str, code: int) -> str:
    if code < 0:
        return f"the process was ended by signal {-code}" + (
            " (out of memory?)" if code == -9 else ""
        )
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0] or "Exception:" in line]
    return (named or lines or [f"exit code {code} without a word"])[-1][:300]


def _serve(folder: Path, pipe: Connection) -> None:
    """Fork a process for each task that is asked for, or do one in this process.

    Of a forked one its number is answered, and when it has ended its status too.
    """
    forking, server = _may_fork(folder), os.getpid()
    while True:
        try:
            result, cache, *task = pipe.recv()
        except EOFError:
            return
        worker = os.fork() if forking else 0
        if not worker:
            if forking:
                pipe.close()
                end_with_parent()
                if os.getppid() != server:  # it was killed before that was asked for
                    return
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            Path(result).write_text(json.dumps(_do(folder, *task) | {"forked": forking}))
            return
        pipe.send((worker, None))
        _, status = os.waitpid(worker, 0)
        pipe.send((worker, os.waitstatus_to_exitcode(status)))


def forks(device: torch.device) -> bool:
    """Whether processes that time this device are forked, unless imports have started threads."""
    return device.type == "cpu" and sys.platform == "linux"


def _may_fork(folder: Path) -> bool:
    """Import what the pickles need; whether the imports have left this process fit to be forked."""
    if not forks(torch.device(json.loads((folder / "job.json").read_text())["device"])):
        return False
    before = threads(), descendants(os.getpid())
    for side in _sides(folder):
        _load(folder, side, "meta")
    return (threads(), descendants(os.getpid())) == before  # threads are not forked


def _sides(folder: Path) -> list[str]:
    both = (folder / "reference.pt").exists()
    return ["reference", "candidate"] if both else ["candidate"]


def _load(folder: Path, name: str, device: str | None = None) -> Any:
    # The pickles are this project's own, in a folder that only this user can write to.
    try:
        return torch.load(folder / f"{name}.pt", weights_only=False, map_location=device)
    except (AttributeError, ImportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(REBUILD_FAILED) from None


def _do(folder: Path, task: str, *args: str) -> dict[str, Any]:
    """What a task finds."""
    job = json.loads((folder / "job.json").read_text())
    plan = TimingConfig(**job["plan"])
    if task != "alone" and plan.keep_memory:
        keep_memory()
    torch.set_num_threads(job["settings"]["threads"])
    torch.set_float32_matmul_precision(job["settings"]["matmul_precision"])
    torch.backends.cudnn.allow_tf32 = job["settings"]["tf32_convolutions"]
    example = _load(folder, "example")
    if plan.compile != "none":
        needs_compiler(example.device)
    torch.manual_seed(plan.seed)
    if task in ("pair", "probe"):
        # Which arm is made and warmed first changes from process to process.
        arms = ARMS if len(_sides(folder)) == 2 else ("candidate",)
        order = random.Random(int(args[0])).sample(arms, len(arms))
        subjects = {
            arm: _load(folder, "candidate" if arm == "candidate" else "reference") for arm in order
        }
        if task == "pair":
            return pair(subjects, example, plan, int(args[0]))
        return probe(subjects, example, plan)
    if task == "details":
        return _details(folder, args[0], example, plan)
    del example  # on a GPU it would lie beside the one in the timed dtype
    return _alone(folder, plan, *args)


def _alone(folder: Path, plan: TimingConfig, side: str, *more: str) -> dict[str, Any]:
    """Memory and compile seconds of one side by itself, and if asked for its error as timed."""
    # All are first read without their weights, so that each carries the same imports.
    _ = [_load(folder, each, "meta") for each in _sides(folder)]
    before_mib = peak_mib()
    subject, image = as_timed(_load(folder, side), _load(folder, "example"), plan)
    run = prepare(subject, plan) if more == ("error",) else None
    step = make_step(subject, run, image, plan)
    found = measure_resources(step, image, before_mib)
    if plan.mean:  # as its process is set up by default, which is how timm's benchmark runs
        seconds = breakdown.mean_of_calls(step, image.device)
        found["mean_images_per_s"] = images_of(subject, image) / seconds
    if run is not None:
        found["timed_error"] = timed_error(
            _load(folder, "reference"),
            subject,
            image,
            training=plan.mode == "training",
            run=partial(_as_stepped, run, plan),
            keys=_load(folder, "keys") if side == "candidate" else None,
        )
    return found


def _as_stepped(run: Callable[[Tensor], Any], plan: TimingConfig, image: Tensor) -> Any:
    """A module's output as the timed call or step computes it."""
    if plan.mode == "inference" or plan.dtype == "as given":
        return run(image)
    with training.autocast(image.device, plan.dtype):
        return run(image)


def _details(folder: Path, side: str, image: Tensor, plan: TimingConfig) -> dict[str, Any]:
    """Where a module's time goes, as far as it can be told for this plan."""
    subject, example = as_timed(_load(folder, side), image, plan)
    found: dict[str, Any] = {}
    if plan.mode == "inference" and len(example) == 1:
        step = make_step(subject, None, example, plan)
        warm_up({"one": step}, plan, example.device)
        found["latency"] = breakdown.latency(step, example.device, plan.pair_s)
    if plan.compile != "none":  # whose parts are one
        other, _ = as_timed(_load(folder, side), image, plan)  # a training step changes it
        steps = {
            "eager": make_step(other, None, example, replace(plan, compile="none")),
            "compiled": make_step(subject, None, example, plan),
        }
        iterations = iterations_of(
            warm_up(steps, plan, example.device)["seconds_each"], plan.block_s
        )
        saved = breakdown.saved(steps, iterations, len(example), example.device, plan.pair_s)
        return found | {"saved": saved}
    if plan.mode == "training":
        config = step_config(len(example), plan)
        return found | {"phases": breakdown.phases(subject, example, config)}
    try:
        return found | {"stages": breakdown.stages(subject, example)}
    except breakdown.Unknown:
        return found


if __name__ == "__main__":
    end_with_parent()
    _serve(Path(sys.argv[1]), Connection(int(sys.argv[2])))
