"""Paired timing in fresh processes: `python -m vitx.timing` does one task of a job.

A job is a folder with `job.json` (a `Plan`) and pickles: candidate, example, and the reference if
there is one. What is timed is a module, or a whole training step (`Training`). The tasks are
`alone` (one of the two: peak memory, compile seconds, error in the timed dtype, details), `pair`
(three arms in one process: reference, the same reference again, candidate; without a reference the
candidate alone) and `probe` (the candidate's rate in a few calls, all arms in memory).
"""

import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitx import breakdown
from vitx import train as trainer
from vitx.compiler import needs_compiler
from vitx.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, override
from vitx.equality import Keys, timed_error
from vitx.machine import (
    Watch,
    end_with_parent,
    gpu,
    kill_tree,
    page_faults,
    peak_mib,
    synchronise,
    tree_mib,
)

MODES = ("inference", "training")
COMPILES = ("none", "default", "max-autotune")
DTYPES = ("as given", "float32", "bfloat16", "float16")
ARMS = ("reference", "again", "candidate")
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**60)}
"""Settings of glibc by which a process keeps the memory that it frees. By default large blocks go
back to the system and are mapped again page by page, as often as the order of allocations happens
to ask for; the cost differs between processes by more than the differences that are timed."""
REBUILD_FAILED = 3
"""Exit status of a process that can't unpickle a module."""
POLL_S = 0.2
"""Seconds between two looks at the memory of a process."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one comparison is timed."""

    mode: str = "inference"
    compile: str = "none"
    dtype: str = "as given"
    """Inference in this dtype; training with float32 parameters under autocast to it."""
    processes: int = 5
    pair_s: float = 15.0
    """Seconds of blocks in a process; they become whole sets of rounds, which balance order."""
    block_s: float = 0.15
    """A block is the fewest iterations that last this long. Short blocks keep the members of a
    pair close in time: on a shared machine the noise is correlated over seconds."""
    warm_up_s: float = 20.0
    limit_s: float = 600.0
    """A process that takes longer is killed and reported."""
    limit_gib: float = 0.0
    """So is one that takes more memory, with its children; 0 for no limit."""
    keep_memory: bool = True
    """Pairs run under `KEEP_MEMORY`; otherwise as the allocator is set up."""
    details: bool = False
    """Also say where each module's time goes: latency of calls at batch 1, stages, phases."""
    mean: bool = False
    """Also read its rate as timm's benchmark does."""
    seed: int = 0

    def __post_init__(self):
        for name, choices in (("mode", MODES), ("compile", COMPILES), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ValueError(f"{name} = {value!r} is not known; choices: {', '.join(choices)}")
        if self.processes < 1:
            raise ValueError(f"processes = {self.processes} must be at least 1")
        for name in ("pair_s", "block_s", "warm_up_s", "limit_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if not self.limit_gib >= 0:
            raise ValueError(f"limit_gib = {self.limit_gib} must be 0 or positive")


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
        endless = override(self.config, steps=ENDLESS)
        state, image = trainer.init(endless, device=device), self.example(device)
        target = torch.randint(endless.model.classes, (endless.batch,), device=device)
        return lambda: trainer.step(state, (image, target), endless)


Subject = nn.Module | Training
ENDLESS = 2**40
"""Steps of a schedule that no timing comes to the end of."""


def images_of(subject: Subject, example: Tensor) -> int:
    """Images of one iteration."""
    return subject.config.batch if isinstance(subject, Training) else len(example)


def as_timed(subject: Any, example: Tensor, plan: Plan) -> tuple[Any, Tensor]:
    """Both in the dtype of the plan: in training the parameters stay as they are."""
    if plan.dtype == "as given" or plan.mode == "training" or isinstance(subject, Training):
        return subject, example
    dtype = getattr(torch, plan.dtype)
    return subject.to(dtype), example.to(dtype)


def prepare(model: nn.Module, plan: Plan) -> Callable[[Tensor], Tensor]:
    """The module as it is timed: itself, or compiled whole without a graph break."""
    if plan.compile == "none":
        return model
    mode = None if plan.compile == "default" else plan.compile
    return torch.compile(model, fullgraph=True, mode=mode)


def make_step(
    subject: Subject, run: Callable[[Tensor], Tensor] | None, example: Tensor, plan: Plan
) -> Callable[[], Any]:
    """One inference call, or one whole training step of `vitx.train`.

    The step is forward pass, loss, backward pass, clipping and AdamW, with autocast and a loss
    scale as the dtype asks for. `run` is what `prepare` made of a module.
    """
    if isinstance(subject, Training):
        return subject.make_step(example.device)
    if run is None:  # not `run or …`: a compiled module may have no truth value
        run = prepare(subject, plan)
    if plan.mode == "inference":
        subject.eval()

        def infer() -> None:
            with torch.inference_mode():
                run(example)

        return infer
    config = step_config(len(example), plan)
    with torch.no_grad():
        classes = subject(example[:2]).shape[-1]
    state = trainer.init(config, model=subject, device=example.device)
    state.run = run
    generator = torch.Generator().manual_seed(plan.seed)
    target = torch.randint(classes, (len(example),), generator=generator).to(example.device)
    return lambda: trainer.step(state, (example, target), config)


def step_config(batch: int, plan: Plan) -> TrainConfig:
    """The training step of any module; its `model` is not used."""
    precision = "float32" if plan.dtype == "as given" else plan.dtype
    return TrainConfig(
        model=ModelConfig(),
        data=DataConfig(name="fake"),
        optim=OptimConfig(lr=1e-5, clip=1.0),
        steps=ENDLESS,
        batch=batch,
        precision=precision,
    )


def make_steps(
    subjects: Mapping[str, Subject], example: Tensor, plan: Plan
) -> dict[str, Callable[[], Any]]:
    """The step of every arm, in the dtype that is timed."""
    return {
        arm: make_step(timed, None, image, plan)
        for arm, subject in subjects.items()
        for timed, image in [as_timed(subject, example, plan)]
    }


def pair(subjects: Mapping[str, Subject], example: Tensor, plan: Plan, process: int) -> dict:
    """Block times of all arms in random balanced order, with the machine's state around each.

    Returns raw times in seconds an iteration, the order, and what a GPU reads at work after them
    (`machine.gpu`). With `ARMS` also medians over rounds: `log_ratio` of the reference's time an
    image (geometric mean of its two arms) to the candidate's, `log_ratio_again` of the reference's
    first arm to its second. Positive means that the later of the two is faster.
    """
    images = {arm: images_of(subject, example) for arm, subject in subjects.items()}
    steps = make_steps(subjects, example, plan)
    warm = warm_up(steps, plan, example.device)
    iterations = iterations_of(warm["seconds_each"], plan.block_s)
    round_s = sum(count * warm["seconds_each"][arm] for arm, count in iterations.items())
    whole = math.factorial(len(steps))
    wanted = whole * max(1, round(plan.pair_s / round_s / whole))
    rounds: list[dict] = []
    clean: list[dict] = []
    with torch.compiler.set_stance("fail_on_recompile"):
        for order in orders(random.Random(plan.seed * 1000 + process), tuple(steps)):
            if len(clean) == wanted or len(rounds) == wanted + max(wanted // 2, 1):
                break
            rounds.append(_round(steps, order, iterations, example.device, rounds))
            clean = [entry for entry in rounds if not entry["disturbed"]]
    readings = _gpu_at_work(steps["candidate"], iterations["candidate"], example.device)
    # Where the machine was never quiet, the disturbed rounds are all there is; no verdict follows.
    quiet = len(clean) >= max(wanted // 2, 1)
    used = clean if quiet else rounds
    times = {arm: [entry["blocks"][arm]["seconds"] for entry in used] for arm in steps}
    found = {
        "seconds": times,
        "page_faults": {arm: [e["blocks"][arm]["page_faults"] for e in used] for arm in steps},
        "rounds": rounds,
        "rounds_used": len(used),
        "rounds_disturbed": len(rounds) - len(clean),
        "quiet": quiet,
        "iterations": iterations,
        "images": images,
        "made_in_order": list(subjects),
        "threads": torch.get_num_threads(),
        "warm_up": warm,
        "gpu_readings": readings,
    }
    return found | log_ratios(times, images)


def probe(subjects: Mapping[str, Subject], example: Tensor, plan: Plan) -> dict:
    """The candidate's images/s in a few calls, beside all that a pair holds in memory."""
    steps = make_steps(subjects, example, plan)
    rounds = [
        {arm: time_block(step, 1, example.device) for arm, step in steps.items()} for _ in range(4)
    ]
    fastest = min(seconds["candidate"] for seconds in rounds[1:])
    return {"images_per_s": images_of(subjects["candidate"], example) / fastest}


def iterations_of(seconds: Mapping[str, float], block_s: float) -> dict[str, int]:
    """The fewest iterations a block: the same number for arms of like speed.

    Arms of which one takes more than twice as long have numbers of their own.
    """
    found = {}
    if "again" in seconds:  # the same module twice
        both = min(seconds["reference"], seconds["again"])
        seconds = {**seconds, "reference": both, "again": both}
    for arm, mine in seconds.items():
        fastest = min(other for other in seconds.values() if mine / 2 <= other <= 2 * mine)
        found[arm] = max(1, math.ceil(block_s / fastest))
    return found


def log_ratios(
    times: Mapping[str, list[float]], images: Mapping[str, int]
) -> dict[str, float | None]:
    """Medians over rounds of the log ratios of seconds an image; None without all of `ARMS`.

    The reference (geometric mean of its two arms) over the candidate, and over itself.
    """
    if set(times) != set(ARMS):
        return {"log_ratio": None, "log_ratio_again": None}
    logs = {arm: [math.log(seconds / images[arm]) for seconds in times[arm]] for arm in ARMS}
    arms = list(zip(logs["reference"], logs["again"], logs["candidate"], strict=True))
    return {
        "log_ratio": statistics.median((a + b) / 2 - c for a, b, c in arms),
        "log_ratio_again": statistics.median(a - b for a, b, _ in arms),
    }


def _round(
    steps: Mapping[str, Callable[[], Any]],
    order: tuple[str, ...],
    iterations: Mapping[str, int],
    device: torch.device,
    before: list[dict],
) -> dict:
    """One block of each arm; disturbed if one of them was."""
    clock = max((b["clock_mhz"] or 0.0 for e in before for b in e["blocks"].values()), default=0.0)
    blocks = {arm: _watched(steps[arm], iterations[arm], device, clock) for arm in order}
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

    On a GPU `peak_mib` is the peak of the device's allocator, and `host_mib` that of the process.
    Compiling takes memory too, and is counted.
    """
    if example.is_cuda:
        torch.cuda.reset_peak_memory_stats(example.device)
    first = time_block(step, 1, example.device)
    later = statistics.median(time_block(step, 1, example.device) for _ in range(3))
    found = {"peak_mib": peak_mib() - before_mib}
    if example.is_cuda:
        device_mib = torch.cuda.max_memory_allocated(example.device) / 2**20
        found = {"peak_mib": device_mib, "host_mib": found["peak_mib"]}
    return found | {"first_s": first, "compile_s": max(first - later, 0.0)}


def run_task(folder: Path, plan: Plan, task: str, *args: str, cache: Path) -> dict:
    """One task in a fresh process. A failure is {"failure": its last words}, never an exception.

    `cache` is the private folder of compiled code. Ctrl-C ends the process first.
    """
    private_folder(cache)
    result = folder / f"result-{task}-{'-'.join(args) or 'all'}.json"
    result.unlink(missing_ok=True)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache.resolve())}
    if task in ("pair", "probe", "details") and plan.keep_memory:
        environment |= KEEP_MEMORY
    command = [sys.executable, "-m", "vitx.timing", str(folder), str(result), task, *args]
    code, words = run_limited(command, environment, limit_s=plan.limit_s, limit_gib=plan.limit_gib)
    if code == 0 and result.exists():
        return json.loads(result.read_text())
    return {"failure": words, "rebuilt": code != REBUILD_FAILED}


def run_limited(
    command: list[str], environment: Mapping[str, str], *, limit_s: float, limit_gib: float
) -> tuple[int, str]:
    """Run a program to its end, or to a limit of time or memory; its status and last words.

    At a limit, and on Ctrl-C, it is killed with all that it started. A program that should end when
    this process is killed calls `end_with_parent`.
    """
    child = subprocess.Popen(
        command, env=dict(environment), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + limit_s
    errors = ""
    try:
        while True:
            try:
                errors = child.communicate(timeout=POLL_S if limit_gib else limit_s)[1]
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() >= end:
                    return -1, f"the process took longer than {limit_s:.0f} s and was ended"
            if limit_gib and (used := tree_mib(child.pid) / 2**10) > limit_gib:
                return -1, (
                    f"the process took {used:.1f} GiB of memory, more than {limit_gib:g}, and was "
                    "ended"
                )
    finally:
        if child.poll() is None:
            kill_tree(child.pid)
            child.communicate()
    return child.returncode, _last_words(errors, child.returncode)


def write_job(
    folder: Path,
    plan: Plan,
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
    (folder / "job.json").write_text(json.dumps({"plan": asdict(plan), "settings": settings}))
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


def orders(rng: random.Random, arms: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Endless orders of the arms: each run of n! holds every permutation once."""
    while True:
        permutations = list(itertools.permutations(arms))
        rng.shuffle(permutations)
        yield from permutations


def _watched(
    step: Callable[[], Any], iterations: int, device: torch.device, clock_mhz: float
) -> dict:
    """One block: start (UTC seconds), seconds and page faults an iteration, the machine's state."""
    started, watch, faults = time.time(), Watch(), page_faults()
    seconds = time_block(step, iterations, device) / iterations
    faults, state = (page_faults() - faults) / iterations, watch.read()
    return {
        "started": started,
        "seconds": seconds,
        "page_faults": faults,
        # What the CPU's other users do says little of a GPU.
        "disturbed": device.type == "cpu"
        and state.disturbed(max(clock_mhz, state.clock_mhz or 0.0)),
        **asdict(state),
    }


def _gpu_at_work(
    step: Callable[[], Any], iterations: int, device: torch.device
) -> dict[str, str] | None:
    """What a CUDA device reads while it works off a block that was queued; None of another."""
    if device.type != "cuda":
        return None
    for _ in range(iterations):
        step()
    found = gpu(device)
    synchronise(device)
    return found


def time_block(step: Callable[[], Any], iterations: int, device: torch.device) -> float:
    """Seconds of so many iterations; the device is waited for at both ends, not between."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(iterations):
        step()
    synchronise(device)
    return time.perf_counter() - start


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
    torch.backends.cudnn.allow_tf32 = job["settings"]["tf32_convolutions"]

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
    sides = ["reference", "candidate"] if (folder / "reference.pt").exists() else ["candidate"]
    if task in ("pair", "probe"):
        # Which arm is made and warmed first changes from process to process.
        arms = ARMS if len(sides) == 2 else ("candidate",)
        order = random.Random(int(args[0])).sample(arms, len(arms))
        subjects = {arm: load("candidate" if arm == "candidate" else "reference") for arm in order}
        if task == "pair":
            found = pair(subjects, example, plan, int(args[0]))
        else:
            found = probe(subjects, example, plan)
    elif task == "details":
        found = _details(*as_timed(load(args[0]), example, plan), plan)
    else:
        side, *more = args
        # All are first read without their weights, so that each carries the same imports.
        _ = [load(each, "meta") for each in sides]
        before_mib = peak_mib()
        subject, image = as_timed(load(side), example, plan)
        run = prepare(subject, plan) if more == ["error"] else None
        step = make_step(subject, run, image, plan)
        found = measure_resources(step, image, before_mib)
        if plan.mean:  # as its process is set up by default, which is how timm's benchmark runs
            seconds = breakdown.mean_of_calls(step, image.device)
            found["mean_images_per_s"] = images_of(subject, image) / seconds
        if run is not None:
            found["timed_error"] = timed_error(
                load("reference"),
                subject,
                image,
                training=plan.mode == "training",
                run=partial(_as_stepped, run, plan),
                keys=load("keys") if side == "candidate" else None,
            )
    result.write_text(json.dumps(found))


def _as_stepped(run: Callable[[Tensor], Any], plan: Plan, image: Tensor) -> Any:
    """A module's output as the timed call or step computes it."""
    if plan.mode == "inference" or plan.dtype == "as given":
        return run(image)
    with trainer.autocast(image.device, plan.dtype):
        return run(image)


def _details(subject: Any, example: Tensor, plan: Plan) -> dict[str, Any]:
    """Where a module's time goes, as far as it can be told for this plan."""
    found: dict[str, Any] = {}
    if plan.mode == "inference" and len(example) == 1:
        step = make_step(subject, None, example, plan)
        warm_up({"one": step}, plan, example.device)
        found["latency"] = breakdown.latency(step, example.device, plan.pair_s)
    if plan.compile != "none":  # whose parts are one
        return found
    if plan.mode == "training":
        config = step_config(len(example), plan)
        return found | {"phases": breakdown.phases(subject, example, config)}
    try:
        return found | {"stages": breakdown.stages(subject, example)}
    except breakdown.Unknown:
        return found


if __name__ == "__main__":
    # By its own name: what was pickled is of that module, not of this one.
    from vitx.timing import _main

    end_with_parent()
    _main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
