"""The kinds of results that programs of this folder make."""

from dataclasses import dataclass, field
from typing import Any

from experiments.study.results import Result
from vitx.measure.comparison import Comparison
from vitx.measure.equality import Equality


@dataclass(frozen=True, kw_only=True)
class Pair(Result):
    """Two models that were compared; `reference` is empty where one was timed alone."""

    reference: str = ""
    candidate: str


@dataclass(frozen=True, kw_only=True)
class EqualResult(Pair, kind="equality"):
    """Whether two models compute the same in float64."""

    batch: int
    image: tuple[int, ...]
    equality: Equality
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Timed(Pair):
    """A timing, in pairs if there is a reference."""

    comparison: Comparison
    image: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Speed(Timed, kind="speed"):
    """The main job's timing of vitx beside timm."""


@dataclass(frozen=True, kw_only=True)
class Control(Timed, kind="control"):
    """A timing whose answer is known: timm with planted work, or timm beside itself."""

    planted: float
    """Share of further work that was asked for; 0 for none."""
    planted_counted: float
    """And that was counted, in MACs."""


@dataclass(frozen=True, kw_only=True)
class Trial(Control, kind="trial"):
    """One of the fixed trials that say how often the timing is wrong."""

    trial: int
    protocol: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Throughput(Timed, kind="throughput"):
    """One timing configuration of `benchmarks.throughput`."""

    configuration: str
    """A hash of what was asked for, by which it is found again."""
    batch_asked: str
    """The batch as it was asked for: a number, or `auto`."""
    batches_tried: dict[str, float | str] = field(default_factory=dict)
    checked: str = ""
    """`checked`, or why the outputs were not."""
    protocol: int


@dataclass(frozen=True, kw_only=True)
class Gate(Timed, kind="gate"):
    """One commit beside another; `reference` and `candidate` are their hashes."""

    model: str
    threshold: float
    outputs_apart: float
    failed: bool


@dataclass(frozen=True, kw_only=True)
class Step(Timed, kind="step"):
    """Whole training steps, data included, beside others."""

    name: str
    """Of the pair, as `benchmarks.steps --only` takes it."""
    logits_error: float | None = None
    """Largest difference of both models' logits, where they are the same function."""
    data_share: float | None = None
    """The part of a step's time that goes into its batch."""


@dataclass(frozen=True, kw_only=True)
class Start(Result, kind="start"):
    """Seconds from the start of the training program to the end of its first step."""

    recipe: str
    seconds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Mutants(Pair, kind="mutants"):
    """How many planted bugs each check catches."""

    caught: int
    caught_by_common_check: int
    planted: int


@dataclass(frozen=True, kw_only=True)
class Pilot(Pair, kind="pilot"):
    """The spread over a few seeds, and how many the margin needs."""

    data: str
    seeds: int
    reference_std: float
    candidate_std: float
    margin: float
    seeds_needed: int


@dataclass(frozen=True, kw_only=True)
class Accuracy(Pair, kind="accuracy"):
    """Test accuracy of both sides over seeds, and the test of equivalence."""

    data: str
    trajectory_error: float
    trajectory_steps: int
    svm: float | None = None
    test_images: int
    config: dict[str, Any]
    seeds: int
    reference_values: tuple[float, ...]
    candidate_values: tuple[float, ...]
    reference_seconds: float | None = None
    candidate_seconds: float | None = None
    margin: float
    difference: float
    low: float
    high: float
    p_equivalence: float
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Pretrained(Pair, kind="pretrained"):
    """Accuracy of the same weights in timm and in vitx, on a folder of pictures."""

    weights: str
    data: str
    images: int
    classes: int
    top1: tuple[float, float]
    """Of the reference and the candidate; likewise below."""
    top5: tuple[float, float]
    identical: int
    logits_apart: float
    seconds: tuple[float, float]
    preprocessing: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Check(Result, kind="check"):
    """Whether a device computes what the CPU does."""

    facts: dict[str, Any]
    kernels: dict[str, str]
    logits_error: dict[str, float]
    bands: dict[str, float]
    trajectory_apart: float
    losses: tuple[float, ...]
    within: dict[str, bool]
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Failure(Pair, kind="failure"):
    """A training that failed."""

    data: str = ""
    reason: str
