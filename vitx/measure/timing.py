"""Paired timing: rounds of blocks in balanced order, and the log ratios that they give.

What is timed is an `Arm`: a part of this process, or of another. Nothing here knows of models.
"""

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from vitx.measure.machine import Machine, Watch, gpu, page_faults, synchronise
from vitx.registry import UserError, choose

PROTOCOL = 4
"""How pairs are timed and judged. A change by which a timing may say something else raises it: what
was timed by two protocols never stands together."""
Mode = Literal["inference", "training"]
Compile = Literal["none", "default", "max-autotune"]
Dtype = Literal["as given", "float32", "bfloat16", "float16"]
MODES, COMPILES, DTYPES = get_args(Mode), get_args(Compile), get_args(Dtype)
ARMS = ("reference", "again", "candidate")
SIDES = {"reference": ("reference", "again"), "candidate": ("candidate",)}
"""The arms of each side of a pair."""

Block = Callable[[int], float]
"""Runs a number of iterations; the seconds that they took together."""
Step = Callable[[], object]
"""Runs one iteration."""


@dataclass(frozen=True, kw_only=True)
class TimingConfig:
    """How one comparison is timed."""

    mode: Mode = "inference"
    compile: Compile = "none"
    dtype: Dtype = "as given"
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
    """Also measure where each module's time goes: latency of calls at batch 1, stages, phases; or
    what compiling it saves."""
    mean: bool = False
    """Also measure its rate as timm's benchmark does."""
    seed: int = 0

    def __post_init__(self):
        for name, choices in (("mode", MODES), ("compile", COMPILES), ("dtype", DTYPES)):
            choose(name, getattr(self, name), choices)
        if self.processes < 1:
            raise UserError(f"processes = {self.processes} must be at least 1")
        for name in ("pair_s", "block_s", "warm_up_s", "limit_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} = {getattr(self, name)} must be positive")
        if not self.limit_gib >= 0:
            raise UserError(f"limit_gib = {self.limit_gib} must be 0 or positive")


@dataclass(frozen=True)
class Arm:
    """One of those that take turns."""

    block: Block
    images: int = 1
    """Of one iteration."""
    step: Step | None = None
    """An iteration that is queued on a device and not waited for, where the arm has one."""


@dataclass(frozen=True)
class BlockTime:
    """A block's means over its iterations."""

    seconds: float
    page_faults: float | None
    """None where other processes do the work."""


@dataclass(frozen=True, kw_only=True)
class Round(Machine):
    """A block of each arm, with the machine's state, which the system counts too coarsely to read
    it for each block."""

    order: tuple[str, ...]
    started: float
    """Seconds since 1970."""
    disturbed: bool
    blocks: dict[str, BlockTime]


@dataclass(frozen=True)
class WarmUp:
    """Blocks before those that count; `ended` says by what: `steady` or `time`."""

    ended: str
    seconds: float
    first_s: dict[str, float]
    seconds_each: dict[str, float]
    """Of an iteration of each arm: the median of its last three blocks."""


@dataclass(frozen=True, kw_only=True)
class PairTimes:
    """What one process has timed."""

    rounds: list[Round]
    quiet: bool
    """Whether enough rounds were undisturbed, so that only they are used."""
    iterations: dict[str, int]
    images: dict[str, int]
    """Of one iteration of each arm."""
    threads: int
    warm_up: WarmUp
    gpu_readings: dict[str, str] | None
    forked: bool = False

    @property
    def used(self) -> list[Round]:
        """Where the machine was never quiet, the disturbed rounds are all there is; no verdict
        follows from them."""
        return [entry for entry in self.rounds if not (self.quiet and entry.disturbed)]

    @property
    def disturbed(self) -> int:
        return sum(entry.disturbed for entry in self.rounds)

    @property
    def paired(self) -> bool:
        return set(self.images) == set(ARMS)

    def blocks(self, arms: Iterable[str]) -> list[BlockTime]:
        """The used blocks of these arms, one arm after the other."""
        return [entry.blocks[arm] for arm in arms for entry in self.used]

    def rates(self, arms: Iterable[str]) -> list[float]:
        """Images per second of those blocks."""
        return [self.images[arm] / b.seconds for arm in arms for b in self.blocks([arm])]

    def log_ratios(self) -> tuple[float, float]:
        """Those of `log_ratios`, where all of `ARMS` were timed."""
        times = {arm: [block.seconds for block in self.blocks([arm])] for arm in ARMS}
        return log_ratios(times, self.images)

    def raw(self) -> dict[str, Any]:
        """The times, order and machine state of every round, as plain values."""
        return {
            "rounds": [asdict(entry) for entry in self.rounds],
            "warm_up": asdict(self.warm_up),
            "iterations": self.iterations,
        }


def time_rounds(
    arms: Mapping[str, Arm],
    config: TimingConfig,
    number: int,
    device: torch.device,
    *,
    tree: bool = False,
) -> PairTimes:
    """Blocks of all arms in random balanced order, with the machine's state around each round.

    `number` is that of the process, which draws the order. A disturbed round is made again, up to
    half of them. With `tree` processes that this one has started work on the blocks, so that their
    time is not that of others.
    """
    warm = warm_up(arms, config)
    iterations = iterations_of(warm.seconds_each, config.block_s)
    round_s = sum(count * warm.seconds_each[arm] for arm, count in iterations.items())
    permutations = math.factorial(len(arms))
    goal = permutations * max(1, round(config.pair_s / round_s / permutations))
    rounds: list[Round] = []
    clean = 0
    with torch.compiler.set_stance("fail_on_recompile"):
        for order in orders(random.Random(config.seed * 1000 + number), tuple(arms)):
            if clean == goal or len(rounds) == goal + max(goal // 2, 1):
                break
            rounds.append(_round(arms, order, iterations, device, rounds, tree=tree))
            clean += not rounds[-1].disturbed
    return PairTimes(
        rounds=rounds,
        quiet=clean >= max(goal // 2, 1),
        iterations=iterations,
        images={name: arm.images for name, arm in arms.items()},
        threads=torch.get_num_threads(),
        warm_up=warm,
        gpu_readings=_gpu_at_work(arms.get("candidate"), iterations, device),
    )


def warm_up(arms: Mapping[str, Arm], config: TimingConfig) -> WarmUp:
    """Blocks of every arm until each arm has had three in a row within 3 %, at most `warm_up_s`."""
    first = {name: arm.block(1) for name, arm in arms.items()}
    start = time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    counts = dict.fromkeys(arms, 1)
    steady: set[str] = set()
    while not all(seconds.values()) or (
        len(steady) < len(arms) and time.perf_counter() - start < config.warm_up_s
    ):
        for name, arm in arms.items():
            seconds[name].append(arm.block(counts[name]) / counts[name])
            counts[name] = max(1, math.ceil(config.block_s / seconds[name][-1]))
            last = seconds[name][-3:]
            if len(last) == 3 and max(last) <= 1.03 * min(last):
                steady.add(name)
    return WarmUp(
        ended="steady" if len(steady) == len(arms) else "time",
        seconds=time.perf_counter() - start,
        first_s=first,
        seconds_each={name: statistics.median(each[-3:]) for name, each in seconds.items()},
    )


def iterations_of(seconds: Mapping[str, float], block_s: float) -> dict[str, int]:
    """The fewest iterations per block: the same number for arms of like speed.

    Arms of which one takes more than twice as long have numbers of their own.
    """
    if "again" in seconds:  # the same module twice
        both = min(seconds["reference"], seconds["again"])
        seconds = {**seconds, "reference": both, "again": both}

    def fastest(mine: float) -> float:
        return min(other for other in seconds.values() if mine / 2 <= other <= 2 * mine)

    return {arm: max(1, math.ceil(block_s / fastest(mine))) for arm, mine in seconds.items()}


def log_ratios(times: Mapping[str, list[float]], images: Mapping[str, int]) -> tuple[float, float]:
    """Medians over rounds of the log ratios of seconds per image.

    Of the reference to the candidate, as the mean over both arms of the reference; and of the
    reference to itself. Positive means that the later of the two is faster. Differences of single
    arms have symmetric noise, also where that of the times is not: a mean of two arms against one
    would favour the candidate, as slow blocks are rare and long.
    """
    logs = {arm: [math.log(seconds / images[arm]) for seconds in times[arm]] for arm in ARMS}

    def between(one: str, other: str) -> float:
        return statistics.median(a - b for a, b in zip(logs[one], logs[other], strict=True))

    both = between("reference", "candidate"), between("again", "candidate")
    return statistics.mean(both), between("reference", "again")


def orders(rng: random.Random, arms: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Endless orders of the arms: each run of n! holds every permutation once."""
    while True:
        permutations = list(itertools.permutations(arms))
        rng.shuffle(permutations)
        yield from permutations


def _round(
    arms: Mapping[str, Arm],
    order: tuple[str, ...],
    iterations: Mapping[str, int],
    device: torch.device,
    before: list[Round],
    *,
    tree: bool,
) -> Round:
    clock = max((entry.clock_mhz or 0.0 for entry in before), default=0.0)
    started, watch = time.time(), Watch(tree=tree)
    blocks = {arm: _block(arms[arm].block, iterations[arm], tree=tree) for arm in order}
    state = watch.read()
    return Round(
        **asdict(state),
        order=order,
        started=started,
        # What the CPU's other users do says little of a GPU.
        disturbed=device.type == "cpu" and state.is_disturbed(max(clock, state.clock_mhz or 0.0)),
        blocks=blocks,
    )


def _block(block: Block, iterations: int, *, tree: bool) -> BlockTime:
    faults = page_faults()
    seconds = block(iterations) / iterations
    return BlockTime(seconds, None if tree else (page_faults() - faults) / iterations)


def _gpu_at_work(
    arm: Arm | None, iterations: Mapping[str, int], device: torch.device
) -> dict[str, str] | None:
    """What a CUDA device reads while it works off a block that was queued; None of another."""
    if device.type != "cuda" or arm is None or arm.step is None:
        return None
    for _ in range(iterations["candidate"]):
        arm.step()
    readings = gpu(device)
    synchronise(device)
    return readings


def step_arm(step: Step, images: int, device: torch.device) -> Arm:
    """The arm whose iteration is a step of this process."""
    return Arm(lambda iterations: time_block(step, iterations, device), images, step)


def time_block(step: Step, iterations: int, device: torch.device) -> float:
    """Seconds of so many iterations; the device is waited for at both ends, not between."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(iterations):
        step()
    synchronise(device)
    return time.perf_counter() - start
