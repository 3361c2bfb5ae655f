"""Paired timing in fresh processes: `python -m vitx.timing` does one task of a job.

A job is a folder with `job.json` (a `Plan`) and three pickles: reference, candidate, example. What
is timed is a module, or a whole training step (`Training`). The tasks are `alone` (one of the two:
peak memory, compile seconds, error in the timed dtype) and `pair` (three arms in one process:
reference, the same reference again, candidate).
"""

import contextlib
import itertools
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitx import train as trainer
from vitx.compiler import needs_compiler
from vitx.config import TrainConfig, override
from vitx.equality import timed_error

MODES = ("inference", "training")
COMPILES = ("none", "default")
FOREIGN_LIMIT = 0.10
"""Share of the machine's time that others may use during a block."""
STEAL_LIMIT = 0.05
"""Share of the machine's time that the hypervisor may take during a block."""
CLOCK_LIMIT = 0.90
"""Lowest clock of a block, as a share of the highest that was read."""
ARMS = ("reference", "again", "candidate")
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**60)}
"""Settings of glibc by which a process keeps the memory that it frees. By default large blocks go
back to the system and are mapped again page by page, as often as the order of allocations happens
to ask for; the cost differs between processes by more than the differences that are timed."""
REBUILD_FAILED = 3
"""Exit status of a process that can't unpickle a module."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one comparison is timed."""

    mode: str = "inference"
    compile: str = "none"
    processes: int = 5
    pair_s: float = 15.0
    """Seconds of blocks in a process; they become whole sets of six rounds, which balance order."""
    block_s: float = 0.15
    """A block is the fewest iterations that last this long. Short blocks keep the members of a
    pair close in time: on a shared machine the noise is correlated over seconds."""
    warm_up_s: float = 20.0
    limit_s: float = 600.0
    """A process that takes longer is killed and reported."""
    keep_memory: bool = True
    """Pairs run under `KEEP_MEMORY`; otherwise as the allocator is set up."""
    seed: int = 0

    def __post_init__(self):
        for name, choices in (("mode", MODES), ("compile", COMPILES)):
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ValueError(f"{name} = {value!r} is not known; choices: {', '.join(choices)}")
        if self.processes < 1:
            raise ValueError(f"processes = {self.processes} must be at least 1")
        for name in ("pair_s", "block_s", "warm_up_s", "limit_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")


@dataclass(frozen=True)
class Machine:
    """Readings around a block, as shares of the time of the cores that this process may use.

    None where they can't be read. They say nothing of a GPU.
    """

    foreign: float | None
    steal: float | None
    clock_mhz: float | None
    load: float | None

    def disturbed(self, highest_clock_mhz: float) -> bool:
        """Whether others used the machine; judged from these readings, never from a time."""
        slow = self.clock_mhz is not None and self.clock_mhz < CLOCK_LIMIT * highest_clock_mhz
        return slow or (self.foreign or 0) > FOREIGN_LIMIT or (self.steal or 0) > STEAL_LIMIT


class Watch:
    """Reads the machine's state over a stretch of time."""

    def __init__(self):
        self._cores = _core_numbers()
        self._start = (time.perf_counter(), _own_seconds(), _cpu_seconds(self._cores))

    def read(self) -> Machine:
        wall, own, cpu = self._start
        elapsed = (time.perf_counter() - wall) * (len(self._cores) or cores())
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        now = _cpu_seconds(self._cores)
        if cpu is None or now is None:
            return Machine(None, None, _clock_mhz(), load)
        foreign = (now["busy"] - cpu["busy"]) - (_own_seconds() - own)
        steal = now["steal"] - cpu["steal"]
        return Machine(max(foreign / elapsed, 0.0), steal / elapsed, _clock_mhz(), load)


@dataclass(frozen=True)
class Training:
    """The training step of a configuration, to be timed in place of a module's; without its data.

    Precision, optimizer, accumulation and moving average are those of the configuration, and so is
    `compile`: a plan says only whether there is something to compile.
    """

    config: TrainConfig

    def example(self, device: torch.device) -> Tensor:
        """A batch of random images, b c y x."""
        model = self.config.model
        return torch.randn(self.config.batch, model.channels, *model.size, device=device)

    def make_step(self, device: torch.device) -> Callable[[], Any]:
        """A fresh state's step on one batch, again and again."""
        endless = override(self.config, steps=2**40)
        state, image = trainer.init(endless, device=device), self.example(device)
        target = torch.randint(endless.model.classes, (endless.batch,), device=device)
        return lambda: trainer.step(state, (image, target), endless)


Subject = nn.Module | Training


def step_of(subject: Subject, example: Tensor, plan: Plan) -> Callable[[], Any]:
    """What is timed: a module's call or training step on `example`, or a configuration's step."""
    if isinstance(subject, Training):
        return subject.make_step(example.device)
    return make_step(subject, prepare(subject, plan), example, plan)


def images_of(subject: Subject, example: Tensor) -> int:
    """Images of one iteration."""
    return subject.config.batch if isinstance(subject, Training) else len(example)


def prepare(model: nn.Module, plan: Plan) -> Callable[[Tensor], Tensor]:
    """The module as it is timed: itself, or compiled whole without a graph break."""
    if plan.compile == "none":
        return model
    return torch.compile(model, fullgraph=True)


def make_step(
    model: nn.Module, run: Callable[[Tensor], Tensor], example: Tensor, plan: Plan
) -> Callable[[], Any]:
    """One inference call, or one whole training step (forward, loss, backward, AdamW).

    `run` is what `prepare` made of the model.
    """
    if plan.mode == "inference":
        model.eval()

        def infer() -> None:
            with torch.inference_mode():
                run(example)

        return infer
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    with torch.no_grad():
        shape = model(example[:2]).shape
    generator = torch.Generator().manual_seed(plan.seed)
    target = torch.randint(shape[-1], (len(example),), generator=generator).to(example.device)

    def train() -> None:
        loss = F.cross_entropy(run(example), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def pair(subjects: Mapping[str, Subject], example: Tensor, plan: Plan, process: int) -> dict:
    """Block times of three arms in random balanced order, with the machine's state around each.

    Returns raw times in seconds an iteration, the order, and medians over rounds: `log_ratio` of
    the reference's time an image (geometric mean of its two arms) to the candidate's,
    `log_ratio_again` of the reference's first arm to its second. Positive means that the later of
    the two is faster.
    """
    steps = {arm: step_of(subject, example, plan) for arm, subject in subjects.items()}
    images = {arm: images_of(subject, example) for arm, subject in subjects.items()}
    warm = warm_up(steps, plan, example.device)
    iterations = max(1, math.ceil(plan.block_s / min(warm["seconds_each"].values())))
    round_s = iterations * sum(warm["seconds_each"].values())
    wanted = 6 * max(1, round(plan.pair_s / round_s / 6))
    rounds: list[dict] = []
    clean: list[dict] = []
    with torch.compiler.set_stance("fail_on_recompile"):
        for order in _orders(random.Random(plan.seed * 1000 + process)):
            if len(clean) == wanted or len(rounds) == wanted + wanted // 2:
                break
            rounds.append(_round(steps, order, iterations, example.device, rounds))
            clean = [entry for entry in rounds if not entry["disturbed"]]
    # Where the machine was never quiet, the disturbed rounds are all there is; no verdict follows.
    quiet = len(clean) >= wanted // 2
    used = clean if quiet else rounds
    times = {arm: [entry["blocks"][arm]["seconds"] for entry in used] for arm in ARMS}
    logs = {arm: [math.log(seconds / images[arm]) for seconds in times[arm]] for arm in ARMS}
    arms = list(zip(logs["reference"], logs["again"], logs["candidate"], strict=True))
    return {
        "log_ratio": statistics.median((a + b) / 2 - c for a, b, c in arms),
        "log_ratio_again": statistics.median(a - b for a, b, _ in arms),
        "seconds": times,
        "page_faults": {arm: [e["blocks"][arm]["page_faults"] for e in used] for arm in ARMS},
        "rounds": rounds,
        "rounds_used": len(used),
        "rounds_disturbed": len(rounds) - len(clean),
        "quiet": quiet,
        "iterations": iterations,
        "images": images,
        "made_in_order": list(subjects),
        "threads": torch.get_num_threads(),
        "warm_up": warm,
    }


def _round(
    steps: Mapping[str, Callable[[], Any]],
    order: tuple[str, ...],
    iterations: int,
    device: torch.device,
    before: list[dict],
) -> dict:
    """One block of each arm; disturbed if one of them was."""
    clock = max((b["clock_mhz"] or 0.0 for e in before for b in e["blocks"].values()), default=0.0)
    blocks = {arm: _watched(steps[arm], iterations, device, clock) for arm in order}
    disturbed = any(block["disturbed"] for block in blocks.values())
    return {"order": order, "disturbed": disturbed, "blocks": blocks}


def warm_up(steps: Mapping[str, Callable[[], Any]], plan: Plan, device: torch.device) -> dict:
    """Blocks of every arm until each arm has had three in a row within 3 %, at most `warm_up_s`."""
    first = {arm: time_block(step, 1, device) for arm, step in steps.items()}
    start = time.perf_counter()
    blocks: dict[str, list[float]] = {arm: [] for arm in steps}
    counts = dict.fromkeys(steps, 1)
    steady: set[str] = set()
    while len(steady) < len(steps) and time.perf_counter() - start < plan.warm_up_s:
        for arm, step in steps.items():
            blocks[arm].append(time_block(step, counts[arm], device) / counts[arm])
            counts[arm] = max(1, math.ceil(plan.block_s / blocks[arm][-1]))
            last = blocks[arm][-3:]
            if len(last) == 3 and max(last) <= 1.03 * min(last):
                steady.add(arm)
    return {
        "ended": "steady" if len(steady) == len(steps) else "time",
        "seconds": time.perf_counter() - start,
        "first_s": first,
        "seconds_each": {arm: statistics.median(b[-3:]) for arm, b in blocks.items()},
    }


def measure_resources(step: Callable[[], Any], example: Tensor, before_mib: float) -> dict:
    """Peak memory in MiB, of the process above `before_mib`; compile seconds of the first call.

    On a GPU the memory is the allocator's peak. Compiling takes memory too, and is counted.
    """
    if example.is_cuda:
        torch.cuda.reset_peak_memory_stats(example.device)
    first = time_block(step, 1, example.device)
    later = statistics.median(time_block(step, 1, example.device) for _ in range(3))
    peak = (
        torch.cuda.max_memory_allocated(example.device) / 2**20
        if example.is_cuda
        else _peak_mib() - before_mib
    )
    return {"peak_mib": peak, "first_s": first, "compile_s": max(first - later, 0.0)}


def run_task(folder: Path, plan: Plan, task: str, *args: str, cache: Path) -> dict:
    """One task in a fresh process. A failure is {"failure": its last words}, never an exception.

    `cache` is the private folder of compiled code. Ctrl-C ends the process first.
    """
    private_folder(cache)
    result = folder / f"result-{task}-{'-'.join(args) or 'all'}.json"
    result.unlink(missing_ok=True)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache.resolve())}
    if task == "pair" and plan.keep_memory:
        environment |= KEEP_MEMORY
    command = [sys.executable, "-m", "vitx.timing", str(folder), str(result), task, *args]
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, errors = child.communicate(timeout=plan.limit_s)
    except subprocess.TimeoutExpired:
        return {"failure": f"the process took longer than {plan.limit_s:.0f} s and was ended"}
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    if child.returncode == 0 and result.exists():
        return json.loads(result.read_text())
    rebuilt = child.returncode != REBUILD_FAILED
    return {"failure": _last_words(errors, child.returncode), "rebuilt": rebuilt}


def write_job(
    folder: Path,
    plan: Plan,
    reference: Subject,
    candidate: Subject,
    example: Tensor,
    keys: Mapping[str, str],
) -> None:
    """Write what the processes of a job need; raises what pickle raises.

    They get this process's number of threads and its precision of float32 products; ValueError if
    that was set by PyTorch's newer interface.
    """
    private_folder(folder)
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        raise ValueError(
            "torch.backends.*.fp32_precision is set, which fresh processes can't take over; use "
            "torch.set_float32_matmul_precision"
        ) from None
    settings = {"threads": torch.get_num_threads(), "matmul_precision": precision}
    job = {"plan": asdict(plan), "keys": dict(keys), "settings": settings}
    (folder / "job.json").write_text(json.dumps(job))
    for name, value in (("reference", reference), ("candidate", candidate), ("example", example)):
        torch.save(value, folder / f"{name}.pt")


def private_folder(path: Path) -> None:
    """Make a folder that no other user can write to: compiled code and pickles are run from it."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)


def _orders(rng: random.Random):
    """Endless orders of the arms: each run of six holds every permutation once."""
    while True:
        permutations = list(itertools.permutations(ARMS))
        rng.shuffle(permutations)
        yield from permutations


def _watched(
    step: Callable[[], Any], iterations: int, device: torch.device, clock_mhz: float
) -> dict:
    """One block: start (UTC seconds), seconds and page faults an iteration, the machine's state."""
    started, watch, faults = time.time(), Watch(), _page_faults()
    seconds = time_block(step, iterations, device) / iterations
    faults, state = (_page_faults() - faults) / iterations, watch.read()
    return {
        "started": started,
        "seconds": seconds,
        "page_faults": faults,
        "disturbed": state.disturbed(max(clock_mhz, state.clock_mhz or 0.0)),
        **asdict(state),
    }


def time_block(step: Callable[[], Any], iterations: int, device: torch.device) -> float:
    """Seconds of so many iterations; the device is waited for at both ends, not between."""
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(iterations):
        step()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def cores() -> int:
    """Cores that this process may use."""
    return len(_core_numbers()) or os.cpu_count() or 1


def _page_faults() -> int:
    """Pages that the system has mapped for this process without reading a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _core_numbers() -> set[int]:
    """The cores that any thread of this process may use; empty where that can't be read."""
    threads = Path("/proc/self/task")
    if not (threads.exists() and hasattr(os, "sched_getaffinity")):
        return set()
    # OpenMP may bind the main thread to one core, and each of its others to another.
    found: set[int] = set()
    for thread in threads.iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            found |= os.sched_getaffinity(int(thread.name))
    return found


def _cpu_seconds(numbers: set[int]) -> dict[str, float] | None:
    """Seconds since boot that these cores were busy, and were stolen; Linux only.

    None where the system does not list every one of them, as in some containers.
    """
    path = Path("/proc/stat")
    if not path.exists():
        return None
    ours = {f"cpu{core}" for core in numbers}
    lines = [words for line in path.read_text().splitlines() if (words := line.split())]
    each = [[int(word) for word in words[1:9]] for words in lines if words[0] in ours]
    if not ours or len(each) != len(ours):
        return None
    user, nice, system, _, _, irq, softirq, steal = map(sum, zip(*each, strict=True))
    hertz = os.sysconf("SC_CLK_TCK")
    return {"busy": (user + nice + system + irq + softirq) / hertz, "steal": steal / hertz}


def _clock_mhz() -> float | None:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return None
    clocks = [
        float(line.split(":")[1])
        for line in path.read_text().splitlines()
        if line.startswith("cpu MHz")
    ]
    return sum(clocks) / len(clocks) if clocks else None


def _peak_mib() -> float:
    """Highest resident memory of this process so far."""
    path = Path("/proc/self/status")
    if path.exists():
        # getrusage's figure starts at the parent's memory on Linux; VmHWM is this process's own.
        line = next(row for row in path.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _last_words(errors: str, code: int) -> str:
    if code < 0:
        return f"the process was ended by signal {-code}" + (
            " (out of memory?)" if code == -9 else ""
        )
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0] or "Exception:" in line]
    return (named or lines or [f"exit code {code} without a word"])[-1][:300]


def _main(folder: Path, result: Path, task: str, *args: str) -> None:
    job = json.loads((folder / "job.json").read_text())
    plan = Plan(**job["plan"])
    torch.set_num_threads(job["settings"]["threads"])
    torch.set_float32_matmul_precision(job["settings"]["matmul_precision"])

    # The pickles are this project's own, in a folder that only this user can write to.
    def load(name: str, device: str | None = None) -> Any:
        try:
            return torch.load(folder / f"{name}.pt", weights_only=False, map_location=device)
        except (AttributeError, ImportError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise SystemExit(REBUILD_FAILED) from None

    example = load("example")
    if plan.compile != "none":
        needs_compiler(example.device)
    torch.manual_seed(plan.seed)
    if task == "pair":
        # Which arm is made and warmed first changes from process to process.
        arms = random.Random(int(args[0])).sample(ARMS, 3)
        subjects = {arm: load("candidate" if arm == "candidate" else "reference") for arm in arms}
        found = pair(subjects, example, plan, int(args[0]))
    else:
        side, *more = args
        # Both are first read without their weights, so that each carries the same imports.
        _ = load("reference", "meta"), load("candidate", "meta")
        before_mib = _peak_mib()
        subject: Any = load(side)
        run: Any = None
        if isinstance(subject, Training):
            step = subject.make_step(example.device)
        else:
            run = prepare(subject, plan)
            step = make_step(subject, run, example, plan)
        found = measure_resources(step, example, before_mib)
        if more == ["error"]:
            found["timed_error"] = timed_error(
                load("reference"),
                subject,
                example,
                training=plan.mode == "training",
                run=run,
                keys=job["keys"] if side == "candidate" else None,
            )
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    # By its own name: what was pickled is of that module, not of this one.
    from vitx.timing import _main

    _main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
