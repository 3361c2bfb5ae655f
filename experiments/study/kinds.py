"""The kinds of results that programs of this folder make, and what follows from their values."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from experiments.study.results import SCHEMA, Result
from vitx.data.dataset import same_data
from vitx.measure import stats
from vitx.measure.comparison import Comparison
from vitx.measure.stats import Components, Effect
from vitx.registry import UserError
from vitx.training import tracking
from vitx.training.evaluate import Score

Scalar = bool | int | float | str | None
Plain = Scalar | list[Any]
"""A setting as JSON holds it."""
SOURCES = ("seed_init", "seed_order", "seed_augment")
"""Sources of the variance over seeds, as fields of a configuration."""
Seed = TypeVar("Seed", int, str)


@dataclass(frozen=True, kw_only=True)
class Trained(Result, kind="run"):
    """A finished training run: what it reached, its curve, and what it cost."""

    recipe: str
    seed: int
    steps: int
    batch: int
    parameters: int
    macs: int
    """Multiply-accumulates of one image's forward pass."""
    training_flops: int
    """Floating-point operations of all steps; a multiplication and an addition are two."""
    curve_of: Literal["val", "test"]
    curve: tuple[tuple[int, float, float], ...]
    """Step, accuracy and loss (nats) of each evaluation."""
    config: dict[str, Plain]
    seconds: float
    cpu_seconds: float
    test: Score
    val: Score | None = None
    data: str = ""
    fingerprint: str = ""
    """Of the images and their splits."""
    skipped: tuple[str, ...] = ()
    """Pictures that could not be decoded."""

    def check(self) -> None:
        for name in ("seed", "steps", "batch"):
            if getattr(self, name) != self.config[name]:
                raise UserError(f"{name} = {getattr(self, name)} is not that of config")
        evaluated = [step for step, _, _ in self.curve]
        if evaluated != sorted(set(evaluated)) or (evaluated and evaluated[-1] > self.steps):
            raise UserError(f"curve must have growing steps up to {self.steps}")


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One arm of an answer; the first one is the baseline."""

    name: str
    changes: dict[str, Plain]
    """Fields in which it differs from the baseline."""
    adjusted: str = ""
    parameters: int
    macs: int
    values: dict[str, dict[str, float]]
    """Final value per metric and seed, of the runs that ended well."""
    failed: tuple[str, ...] = ()
    """Errors of the runs that did not."""
    images: tuple[str, ...] = ()
    """Fingerprints of the images that its runs were trained on."""
    stale: int = 0
    """Runs that another version made."""
    speed: Comparison | None = None
    """Its training step beside the baseline's, without raw times."""


@dataclass(frozen=True, kw_only=True)
class Answer(Result, kind="answer"):
    """Every arm of a question beside its baseline."""

    question: str
    text: str
    metric: str
    effect: float
    """The smallest difference of interest, in the metric's unit."""
    config: dict[str, Plain]
    """The baseline's."""
    arms: tuple[ArmResult, ...]
    seconds: float
    before: tuple[dict[str, Any], ...] = ()
    """Commit and machine of the runs and timings."""

    @property
    def metrics(self) -> list[str]:
        """The metrics of its runs, the question's first; none if nothing was trained."""
        return list(self.arms[0].values)

    def effects(self, metric: str) -> dict[str, Effect | None]:
        """The arms beside the baseline, judged together, by name."""
        before, *others = (arm.values[metric] for arm in self.arms)
        return dict(
            zip(
                (arm.name for arm in self.arms[1:]),
                stats.effects(
                    [list(paired(before, values).values()) for values in others],
                    margin=self.effect if metric == self.metric else math.inf,
                    lower_is_better=metric == tracking.VAL_LOSS,
                ),
                strict=True,
            )
        )

    def pairs(self, arm: ArmResult) -> int:
        """Seeds that ended well in the arm and in the baseline."""
        before, after = (one.values.get(self.metric, {}) for one in (self.arms[0], arm))
        return len(paired(before, after))

    def verdict(self, arm: ArmResult, effect: Effect | None) -> str:
        """The verdict on an arm, or why there is none."""
        base = self.arms[0]
        if failed := (*arm.failed, *base.failed):
            return f"{len(failed)} failed: {failed[0]}"
        if self._several_images(arm):
            return "runs on different images"
        words = effect.verdict if effect else "too few seeds"
        words += f" (runs on {self.device})" if " and " in self.device else ""
        stale = arm.stale + base.stale
        return f"{words} (stale: {stale} runs of another version)" if stale else words

    def _several_images(self, arm: ArmResult) -> bool:
        """Whether runs on the same data settings saw different images, as of another folder.

        An arm that itself changes the images differs from the baseline, but not within itself.
        """
        before, after = self.arms[0].images, arm.images
        shared = not any(name.startswith("data.") for name in arm.changes)
        return not all(map(same_data, [before + after] if shared else [before, after]))

    def check(self) -> None:
        for metric in self.metrics:
            self.effects(metric)
        for arm in self.arms:
            if list(arm.values) != self.metrics:
                raise UserError(f"arm {arm.name} has other metrics than the baseline")
            if arm.speed:
                try:
                    arm.speed.check()
                except UserError as error:
                    raise UserError(f"arm {arm.name}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One trial of a sweep."""

    state: Literal["complete", "pruned", "fail", "running", "waiting"]
    settings: dict[str, Scalar]
    value: float | None = None
    """Final value of the metric."""
    steps: int | None = None
    """Step of its last evaluation."""
    error: str = ""


@dataclass(frozen=True)
class Saving:
    """What stopping early has saved."""

    ended: int
    """Trials that ended, early or not."""
    stopped: int
    share: float
    """Of the steps of all, counted to the last evaluation of those that were stopped."""

    def __str__(self) -> str:
        if not self.stopped:
            return f"{self.ended} trials ended, none stopped early"
        return (
            f"{self.ended} trials ended, {self.stopped} of them early, which saved "
            f"{self.share:.0%} of the steps"
        )


def saving(trials: Sequence[TrialResult]) -> Saving:
    """How many trials were stopped early, and what that has saved."""
    steps = [trial.steps or 0 for trial in trials if trial.state == "complete"]
    stopped = [trial.steps or 0 for trial in trials if trial.state == "pruned"]
    ended, full = len(steps) + len(stopped), max(steps, default=0)
    share = sum(full - last for last in stopped) / (full * ended) if full else 0.0
    return Saving(ended, len(stopped), share)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Settings of a sweep: what they reached in it, and on fresh seeds."""

    settings: dict[str, Scalar]
    """Empty for the sweep's command with only what all trials set."""
    value: float | None = None
    """Mean of its trials in the sweep."""
    seeds: int = 0
    """Trials of that mean."""
    values: dict[str, float | None] = field(default_factory=dict)
    """Final value per fresh seed; None of a run that failed."""

    @property
    def reached(self) -> dict[str, float]:
        """The values of the runs that have one, by seed."""
        return {seed: value for seed, value in self.values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class SweepResult(Result, kind="sweep"):
    """The trials of a sweep, and its best settings on fresh seeds beside the unchanged command."""

    sweep: str
    method: str
    metric: str
    goal: str
    config: dict[str, Plain]
    trials: tuple[TrialResult, ...]
    stale: int = 0
    saved: Saving
    importance: dict[str, float]
    confirmed: tuple[Candidate, ...]
    """The unchanged command first."""
    before: tuple[dict[str, Any], ...] = ()

    @property
    def gains(self) -> list[Effect | None]:
        """The confirmed settings beside the unchanged command, judged together."""
        unchanged, *others = (one.reached for one in self.confirmed)
        differences = [list(paired(unchanged, one).values()) for one in others]
        return stats.effects(differences, margin=0.0, lower_is_better=self.goal == "minimize")

    def check(self) -> None:
        if saving(self.trials) != self.saved:
            raise UserError(f"the trials give {saving(self.trials)}, not {self.saved}")
        if not self.confirmed or self.confirmed[0].settings:
            raise UserError("the unchanged command must be the first that was confirmed")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The variance of one metric over seeds."""

    components: Components
    """Their shares are in the order of SOURCES, then what their combinations add."""
    values: tuple[float, ...]
    """Of all combinations, in the order of `itertools.product`."""
    held_out: tuple[float, ...]
    """Of runs with seeds of their own."""


@dataclass(frozen=True, kw_only=True)
class Variance(Result, kind="variance"):
    """The variance over seeds of a configuration, split among its sources."""

    name: str
    base: str
    """Identity of the configuration."""
    config: dict[str, Plain]
    levels: int
    """Seeds per source."""
    runs: int
    metrics: dict[str, Spread]
    before: tuple[dict[str, Any], ...] = ()

    def check(self) -> None:
        for metric, spread in self.metrics.items():
            again = split(spread.values)
            for name, value in asdict(spread.components).items():
                if not np.allclose(value, getattr(again, name), rtol=1e-6, atol=1e-9):
                    raise UserError(f"{metric}: {name} = {value} does not follow from the values")


def split(values: Sequence[float]) -> Components:
    """Variance components of one value per combination of the levels of SOURCES."""
    levels = round(len(values) ** (1 / len(SOURCES)))
    return stats.components(np.reshape(values, (levels,) * len(SOURCES)))


@dataclass(frozen=True, kw_only=True)
class Fault(Result, kind="fault"):
    """Counts of a campaign of tests: how often training or a sweep survived a fault."""

    fault: str
    trials: int
    passed: int
    inside_a_save: int | None = None
    """Kills that hit while a checkpoint was written."""
    different_steps: int | None = None
    """Steps at which kills hit."""

    def check(self) -> None:
        if not 0 <= self.passed <= self.trials:
            raise UserError(f"passed = {self.passed} must lie between 0 and {self.trials}")


@dataclass(frozen=True, kw_only=True)
class StepTiming(Result):
    """What a table here reads of a timing of whole training steps, which benchmarks make."""

    name: str
    comparison: Comparison


def step_timings(folder: Path, name: str) -> list[StepTiming]:
    """The step timings of that name in the results of benchmarks, oldest first."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.open(encoding="utf8")]
    objects = [json.loads(line) for line in lines if f'"{name}"' in line]
    timings = [
        msgspec.convert(values, StepTiming)
        for values in objects
        if (values["schema"], values["kind"], values.get("name")) == (SCHEMA, "step", name)
    ]
    return sorted(timings, key=lambda timing: timing.when)


def paired(before: Mapping[Seed, float], after: Mapping[Seed, float]) -> dict[Seed, float]:
    """After minus before per seed, where both have it."""
    return {seed: after[seed] - before[seed] for seed in after if seed in before}
