"""Paired timing: how a pair is timed in one process, and what a plan asks of it.

What is timed is a module, or a whole training step (`Training`). `worker` starts the processes.
"""

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitx.data.config import DataConfig
from vitx.measure.machine import Watch, gpu, page_faults, peak_mib, synchronise
from vitx.model.config import ModelConfig
from vitx.settings import override
from vitx.training import state as training
from vitx.training.config import OptimConfig, TrainConfig

PROTOCOL = 4
"""How pairs are timed and judged. A change by which a timing may say something else raises it: what
was timed by two protocols never stands together."""
MODES = ("inference", "training")
COMPILES = ("none", "default", "max-autotune")
DTYPES = ("as given", "float32", "bfloat16", "float16")
ARMS = ("reference", "again", "candidate")


@dataclass(frozen=True, kw_only=True)
class TimingConfig:
    """How one comparison is timed."""

    mode: str = "inference"
    compile: str = "none"
    dtype: str = "as given"
    """Inference in this dtype; training with float32 parameters under autocast to it."""
    processes: int = 5
    pair_s: float = 15.0
    """Seconds of blocks in a process; they become whole sets of rounds, which balance order."""
    block_s: float = 0.03
    """A block is the fewest iterations that last this long. Short blocks keep the members of a
    pair close in time: on a shared machine a block of 0.03 s varies hardly more than one of 0.2 s,
    so that pairs of the former say more in the same time."""
    warm_up_s: float = 20.0
    limit_s: float = 600.0
    """A process that takes longer is killed and reported."""
    limit_gib: float = 0.0
    """So is one that takes more memory, with its children; 0 for no limit."""
    keep_memory: bool = True
    """Pairs run after `machine.keep_memory`; otherwise as the allocator is set up."""
    details: bool = False
    """Also say where each module's time goes: latency of calls at batch 1, stages, phases; or what
    compiling it saves."""
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
        state, image = training.init(endless, device=device), self.example(device)
        target = torch.randint(endless.model.classes, (endless.batch,), device=device)
        return lambda: training.step(state, (image, target), endless)


Subject = nn.Module | Training
ENDLESS = 2**40
"""Steps of a schedule that no timing comes to the end of."""


def images_of(subject: Subject, example: Tensor) -> int:
    """Images of one iteration."""
    return subject.config.batch if isinstance(subject, Training) else len(example)


def as_timed(subject: Any, example: Tensor, plan: TimingConfig) -> tuple[Any, Tensor]:
    """Both in the dtype of the plan: in training the parameters stay as they are."""
    if plan.dtype == "as given" or plan.mode == "training" or isinstance(subject, Training):
        return subject, example
    dtype = getattr(torch, plan.dtype)
    return subject.to(dtype), example.to(dtype)


def prepare(model: nn.Module, plan: TimingConfig) -> Callable[[Tensor], Tensor]:
    """The module as it is timed: itself, or compiled whole without a graph break."""
    if plan.compile == "none":
        return model
    mode = None if plan.compile == "default" else plan.compile
    return torch.compile(model, fullgraph=True, mode=mode)


def make_step(
    subject: Subject, run: Callable[[Tensor], Tensor] | None, example: Tensor, plan: TimingConfig
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
    state = training.init(config, model=subject, device=example.device)
    state.run = run
    generator = torch.Generator().manual_seed(plan.seed)
    target = torch.randint(classes, (len(example),), generator=generator).to(example.device)
    return lambda: training.step(state, (example, target), config)


def step_config(batch: int, plan: TimingConfig) -> TrainConfig:
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
    subjects: Mapping[str, Subject], example: Tensor, plan: TimingConfig
) -> dict[str, Callable[[], Any]]:
    """The step of every arm, in the dtype that is timed."""
    return {
        arm: make_step(timed, None, image, plan)
        for arm, subject in subjects.items()
        for timed, image in [as_timed(subject, example, plan)]
    }


def pair(
    subjects: Mapping[str, Subject], example: Tensor, plan: TimingConfig, process: int
) -> dict:
    """Block times of all arms in random balanced order, with the machine's state around each round.

    Returns raw times in seconds an iteration, the order, and what a GPU reads at work after them
    (`machine.gpu`). With `ARMS` also `log_ratios`, of the reference's time an image to the
    candidate's and of its first arm's to its second's. Positive means that the later of the two is
    faster.
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
        "threads": torch.get_num_threads(),
        "warm_up": warm,
        "gpu_readings": readings,
    }
    return found | log_ratios(times, images)


def probe(subjects: Mapping[str, Subject], example: Tensor, plan: TimingConfig) -> dict:
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

    Of the reference to the candidate, as the mean over both arms of the reference; and of the
    reference to itself. Differences of single arms have symmetric noise, also where that of the
    times is not: a mean of two arms against one would favour the candidate, as slow blocks are rare
    and long.
    """
    if set(times) != set(ARMS):
        return {"log_ratio": None, "log_ratio_again": None}
    logs = {arm: [math.log(seconds / images[arm]) for seconds in times[arm]] for arm in ARMS}

    def between(one: str, other: str) -> float:
        return statistics.median(a - b for a, b in zip(logs[one], logs[other], strict=True))

    both = between("reference", "candidate"), between("again", "candidate")
    return {"log_ratio": statistics.mean(both), "log_ratio_again": between("reference", "again")}


def _round(
    steps: Mapping[str, Callable[[], Any]],
    order: tuple[str, ...],
    iterations: Mapping[str, int],
    device: torch.device,
    before: list[dict],
) -> dict:
    """A block of each arm: seconds and page faults an iteration; and the machine's state, which
    the system counts too coarsely to read it for each."""
    clock = max((entry["clock_mhz"] or 0.0 for entry in before), default=0.0)
    started, watch = time.time(), Watch()
    blocks = {arm: _block(steps[arm], iterations[arm], device) for arm in order}
    state = watch.read()
    return {
        "order": order,
        "started": started,
        # What the CPU's other users do says little of a GPU.
        "disturbed": device.type == "cpu" and state.disturbed(max(clock, state.clock_mhz or 0.0)),
        **asdict(state),
        "blocks": blocks,
    }


def warm_up(
    steps: Mapping[str, Callable[[], Any]], plan: TimingConfig, device: torch.device
) -> dict:
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
    return found | {"compile_s": max(first - later, 0.0)}


def orders(rng: random.Random, arms: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Endless orders of the arms: each run of n! holds every permutation once."""
    while True:
        permutations = list(itertools.permutations(arms))
        rng.shuffle(permutations)
        yield from permutations


def _block(step: Callable[[], Any], iterations: int, device: torch.device) -> dict[str, float]:
    faults = page_faults()
    seconds = time_block(step, iterations, device) / iterations
    return {"seconds": seconds, "page_faults": (page_faults() - faults) / iterations}


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
