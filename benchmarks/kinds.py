"""The kinds of results that programs of this folder make, and what is checked of each."""

import math
import random
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from msgspec import Meta

from experiments.study.results import Result
from vitx.measure import stats
from vitx.measure.breakdown import STAGES
from vitx.measure.comparison import Comparison, Count, Positive
from vitx.measure.equality import TOLERANCE, Equality, largest
from vitx.registry import UserError

CHECKED = "checked"
"""Said of outputs that were compared with the reference's."""
DIFFERENCES = {"residual", "remainder"}
"""Stages whose time is what others leave, so that noise may make it negative."""
PHASES = ("forward", "backward", "optimizer")
"""Of a training step."""
TRIALS = {0.0: 60, 0.03: 30, 0.05: 30}
"""Trials of the timing by the planted share of further work."""

Share = Annotated[float, Meta(ge=0, le=1)]


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
    verdict: Literal["equal", "not equal"]

    def check(self) -> None:
        errors = largest((self.equality.output_error, self.equality.gradient_error))
        passed = self.equality.passed and errors <= TOLERANCE
        if self.verdict == "equal" and not passed:
            raise UserError("verdict = 'equal': outputs or gradients differ")


@dataclass(frozen=True, kw_only=True)
class Timed(Pair):
    """A timing, in pairs if there is a reference."""

    needs_ratios: ClassVar[bool] = True
    """Whether rates and the log ratio of each process must be kept; the first of a kind may lack
    them."""
    comparison: Comparison
    image: tuple[int, ...] = ()

    @property
    def untimed(self) -> bool:
        """Whether there is nothing to show but the reason."""
        return self.comparison.untimed

    def check(self) -> None:
        self.comparison.check(ratios=self.needs_ratios)
        for side in self.comparison.sides.values():
            for parts, names in ((side.stages, STAGES), (side.phases, PHASES)):
                if parts is None:
                    continue
                if parts.keys() != {*names}:
                    raise UserError(f"stages or phases are not {', '.join(names)}")
                if sum(parts.values()) <= 0 or min(parts[k] for k in {*names} - DIFFERENCES) < 0:
                    raise UserError(f"{parts} are no seconds of stages or phases")


@dataclass(frozen=True, kw_only=True)
class Speed(Timed, kind="speed"):
    """The main job's timing of vitx beside timm."""


@dataclass(frozen=True, kw_only=True)
class Control(Timed, kind="control"):
    """A timing whose answer is known: timm with planted work, or timm beside itself."""

    planted: Share
    """The share of further work that was meant; 0 for none."""
    planted_counted: float
    """And that was counted, in MACs."""


@dataclass(frozen=True, kw_only=True)
class Trial(Control, kind="trial"):
    """One of the fixed trials that say how often the timing is wrong."""

    trial: int
    protocol: int
    seconds: Positive

    def check(self) -> None:
        super().check()
        if not 0 <= self.trial < len(shares()) or shares()[self.trial] != self.planted:
            raise UserError(f"there is no trial {self.trial} of {self.planted}")


@dataclass(frozen=True, kw_only=True)
class Throughput(Timed, kind="throughput"):
    """One timing configuration of `benchmarks.throughput`."""

    configuration: str
    """A hash of the settings, by which the result is found again."""
    batch_asked: str
    """The batch of the settings: a number, or `auto`."""
    batches_tried: dict[str, float | str] = field(default_factory=dict)
    """By each batch that `auto` has tried its images per second, or why there are none."""
    checked: str = ""
    """`checked`, or why the outputs were not."""
    protocol: int

    def check(self) -> None:
        super().check()
        passed = self.comparison.equality is not None and self.comparison.equality.passed
        if self.checked == CHECKED and not self.untimed and not passed:
            raise UserError("checked = 'checked': the outputs were not checked")


@dataclass(frozen=True, kw_only=True)
class Gate(Timed, kind="gate"):
    """One commit beside another; `reference` and `candidate` are their hashes."""

    needs_ratios = False
    model: str
    threshold: Positive
    outputs_apart: float
    failed: bool

    @property
    def outcome(self) -> str:
        """Whether the gate fails, for people."""
        if self.failed:
            return "FAILED"
        inconclusive = self.comparison.verdict == stats.INCONCLUSIVE
        return "passed: not shown to be slower" if inconclusive else "passed"


@dataclass(frozen=True, kw_only=True)
class Step(Timed, kind="step"):
    """Whole training steps, data included, beside others."""

    needs_ratios = False
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
    seconds: Annotated[tuple[Positive, ...], Meta(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Mutants(Pair, kind="mutants"):
    """How many planted bugs each check catches."""

    caught: Count
    caught_by_common_check: Count
    planted: Count

    def check(self) -> None:
        if max(self.caught, self.caught_by_common_check) > self.planted:
            raise UserError(f"planted = {self.planted}: more were caught")


@dataclass(frozen=True, kw_only=True)
class Pilot(Pair, kind="pilot"):
    """The spread over a few seeds, and how many the margin needs."""

    data: str
    seeds: int
    reference_std: float
    candidate_std: float
    margin: Positive
    seeds_needed: int


@dataclass(frozen=True, kw_only=True)
class Accuracy(Pair, kind="accuracy"):
    """Test accuracy of both sides over seeds, and the test of equivalence."""

    data: str
    trajectory_error: float
    trajectory_steps: int
    svm: Share | None = None
    test_images: Annotated[int, Meta(ge=1)]
    config: dict[str, Any]
    """Of the recipe, flat."""
    seeds: int
    reference_values: Annotated[tuple[Share, ...], Meta(min_length=2)]
    candidate_values: Annotated[tuple[Share, ...], Meta(min_length=2)]
    reference_seconds: float | None = None
    candidate_seconds: float | None = None
    margin: Positive
    difference: float
    low: float
    """Of the 90 % interval of the difference; undefined where the values can't be tested."""
    high: float
    p_equivalence: float
    verdict: str

    def check(self) -> None:
        if self.seeds != len(self.candidate_values):
            raise UserError(f"seeds = {self.seeds} of {len(self.candidate_values)} values")
        if math.isnan(self.low):
            if self.verdict == "equivalent":
                raise UserError("verdict = 'equivalent' without an interval")
            return
        test = stats.equivalence(self.reference_values, self.candidate_values, margin=self.margin)
        claimed = (self.difference, self.low, self.high, self.p_equivalence)
        expected = (test.difference, test.low, test.high, test.p_equivalence)
        same = np.allclose(expected, claimed, rtol=1e-6, atol=1e-12)
        if not same or (self.verdict == "equivalent" and not test.equivalent):
            raise UserError("the equivalence test is not that of its values")


@dataclass(frozen=True, kw_only=True)
class Accurate:
    """What one model makes of a folder of pictures."""

    top1: Share
    top5: Share
    seconds: Positive

    def top1_text(self, images: int) -> str:
        """Top-1 with its binomial standard error."""
        return f"{self.top1:.2%} ± {(self.top1 * (1 - self.top1) / images) ** 0.5:.2%}"


@dataclass(frozen=True, kw_only=True)
class Pretrained(Pair, kind="pretrained"):
    """Accuracy of the same weights in timm and in vitx, on a folder of pictures."""

    weights: str
    data: str
    images: Annotated[int, Meta(ge=1)]
    classes: int
    of_reference: Accurate
    of_candidate: Accurate
    identical: Count
    logits_apart: float
    preprocessing: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Check(Result, kind="check"):
    """Whether a device computes what the CPU does."""

    facts: dict[str, str | float | None]
    kernels: dict[str, str]
    logits_error: dict[str, float]
    trajectory_apart: float
    losses: tuple[float, ...]
    bands: dict[str, float]
    """Of each dtype's logits, and of the `trajectory`."""

    @property
    def apart(self) -> dict[str, float]:
        """How far the device is from the CPU, by the name of the band."""
        return self.logits_error | {"trajectory": self.trajectory_apart}

    @property
    def within(self) -> dict[str, bool]:
        """Whether each deviation lies within its band."""
        return {name: error <= self.bands[name] for name, error in self.apart.items()}

    @property
    def verdict(self) -> str:
        return "within all bands" if all(self.within.values()) else "outside a band"

    def deviations(self) -> list[tuple[str, str, str, str]]:
        """What was compared, how far it is apart, its band, and whether it lies within."""
        names = {dtype: f"logits in {dtype}, float64 on the CPU" for dtype in self.logits_error}
        names["trajectory"] = f"losses of {len(self.losses)} steps"
        words = {True: "yes", False: "no"}
        return [
            (names[key], f"{error:.1e}", f"{self.bands[key]:.0e}", words[self.within[key]])
            for key, error in self.apart.items()
        ]

    def check(self) -> None:
        if missing := self.apart.keys() - self.bands.keys():
            raise UserError(f"bands has no {sorted(missing)[0]}")


@dataclass(frozen=True, kw_only=True)
class Failure(Pair, kind="failure"):
    """A training that failed."""

    data: str = ""
    reason: str


@lru_cache(maxsize=1)
def shares() -> tuple[float, ...]:
    """The planted share of every trial, in the order in which they are made."""
    planted = [share for share, count in TRIALS.items() for _ in range(count)]
    random.Random(0).shuffle(planted)
    return tuple(planted)
