"""What a timing says: plain frozen values, which results hold as they are."""

from dataclasses import astuple, dataclass, field, fields, replace
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from vitx.measure import stats
from vitx.measure.equality import Equality
from vitx.measure.stats import LARGEST, Finite, Interval
from vitx.measure.timing import TimingConfig
from vitx.registry import UserError

ONE_PROCESS, ALONE = "one process, no verdict", "timed alone"
NO_VERDICT = "smoke run, no verdict"
"""Of a run whose settings are too small to tell anything."""
UNTIMED = ("failed", "not timed", "not equal")
"""Verdicts of a timing that has no ratio or rate to show."""

Count = Annotated[int, Meta(ge=0, lt=2**62)]
Amount = Annotated[float, Meta(ge=0, lt=LARGEST)]
Positive = Annotated[float, Meta(gt=0, lt=LARGEST)]


@dataclass(frozen=True)
class Rate:
    """Images per second."""

    median: Positive
    """Over all blocks of all processes; `low` and `high` are the 10 % and 90 % quantiles."""
    low: Positive
    high: Positive
    mean: Interval | None = None
    """Geometric mean of the processes' medians with its 95 % interval; None of one process."""

    def __post_init__(self):
        stats.check_order(self.low, self.median, self.high)


@dataclass(frozen=True)
class CompileSeconds:
    """Seconds of the first call beyond a later one, with an empty and with a filled cache."""

    cold: Amount
    warm: Amount


@dataclass(frozen=True)
class Latency:
    """Quantiles of the seconds of single calls, with 95 % intervals of order statistics."""

    calls: Count
    p50: Interval
    p90: Interval
    p99: Interval


@dataclass(frozen=True)
class Saved:
    """Seconds per image that compiling saves: the median over pairs of blocks, with 95 %."""

    pairs: Count
    seconds: Interval


@dataclass(frozen=True)
class Utilisation:
    """The rate of a model's counted work beside the machine's peak before and after it."""

    flops: Positive
    """Operations per second; a multiplication and an addition are two."""
    peak_low: Positive
    peak_high: Positive
    bandwidth: Positive
    """Bytes per second of the fastest copy."""
    mfu: Amount | None
    """`flops` over `peak_high`; None where `why` says why not."""
    why: str = ""
    data_sheet: Amount | None = None
    bytes: Positive | None = None
    """Read and written per second by the operations of a call; None of a training step."""


@dataclass(frozen=True)
class Side:
    """One of the two models of a timing. What was not measured is None."""

    rate: Rate | None = None
    page_faults: Amount | None = None
    """Median over all blocks, per iteration."""
    macs: Count | None = None
    """Multiply-accumulates of one image's forward pass."""
    parameters: Count | None = None
    peak_mib: Amount | None = None
    host_mib: Amount | None = None
    compile_s: CompileSeconds | None = None
    timed_error: float | None = None
    """Relative root-mean-square error to float64, as timed."""
    mean_images_per_s: Positive | None = None
    """The mean of 40 calls of one process, which is what timm's benchmark reports."""
    latency: Latency | None = None
    stages: dict[str, Finite] | None = None
    """Median seconds of each stage of an eager inference call."""
    phases: dict[str, Finite] | None = None
    """Median seconds of each phase of an eager training step."""
    saved: Saved | None = None
    utilisation: Utilisation | None = None

    def __or__(self, other: "Side") -> "Side":
        """The other's values where it has them."""
        values = {each.name: getattr(other, each.name) for each in fields(other)}
        return replace(self, **{k: value for k, value in values.items() if value is not None})

    def __str__(self) -> str:
        """Rate and resources for people."""
        parts = [] if self.macs is None else [f"{self.macs / 1e9:.3f} GMAC per image"]
        if self.peak_mib is not None:
            parts.append(f"peak {self.peak_mib:.0f} MiB")
        if seconds := self.compile_s:
            parts.append(f"compile {seconds.cold:.1f} s cold, {seconds.warm:.1f} s warm")
        rate = f"{self.rate.median:.2f} images per second; " if self.rate else ""
        return f"{rate}{'; '.join(parts)}"


@dataclass(frozen=True)
class Process:
    """What one process of a timing found; its raw times lie beside it."""

    log_ratio: Finite | None
    """Median over rounds of the log of the reference's time per image over the candidate's."""
    log_ratio_again: Finite | None
    """The same of the reference's first arm over its second."""
    warm_up: str = ""
    """What ended the warm-up: `steady` or `time`."""
    rounds_used: Count | None = None
    rounds_disturbed: Count | None = None
    quiet: bool = True
    """Whether enough rounds were undisturbed."""
    threads: Count | None = None
    forked: bool | None = None
    gpu_readings: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a timing found. Ratios are the candidate's images per second over the reference's."""

    config: TimingConfig
    verdict: str
    """A word of `stats.speed_verdict`, or of this module."""
    reason: str = ""
    ratio: Interval | None = None
    """From one process the value stands at both ends, and there is no floor."""
    floor: Amount | None = None
    """Noise floor, as a fraction."""
    candidate: Side = Side()
    reference: Side | None = None
    equality: Equality | None = None
    """None where nothing was checked: of modules that need not compute the same, or of one."""
    batch: Count = 0
    dtype: str = ""
    device: str = ""
    processes: tuple[Process, ...] = ()
    raw: list[dict[str, Any]] = field(default_factory=list)
    """Of each process: times, order and machine state of every round."""

    @property
    def sides(self) -> dict[str, Side]:
        """Those that were measured, by name."""
        both = {"reference": self.reference, "candidate": self.candidate}
        return {name: side for name, side in both.items() if side is not None}

    @property
    def untimed(self) -> bool:
        """Whether there is nothing to show but the reason."""
        return self.verdict in UNTIMED

    @property
    def log_ratios(self) -> list[float]:
        """Of all processes, where there is a reference."""
        return [p.log_ratio for p in self.processes if p.log_ratio is not None]

    @property
    def log_ratios_again(self) -> list[float]:
        """Of the reference beside itself."""
        return [p.log_ratio_again for p in self.processes if p.log_ratio_again is not None]

    def check(self, *, ratios: bool = True) -> None:
        """Check that ratio, floor and verdict are those of the processes' log ratios.

        With `ratios` rates and log ratios must be there. Raises ValueError for a claim that does
        not follow from what was kept.
        """
        if self.untimed:
            return
        if self.batch < 1:
            raise UserError(f"batch = {self.batch} must be at least 1")
        sides = (self.candidate, self.reference) if self.ratio else (self.candidate,)
        if ratios and not all(side and side.rate for side in sides):
            raise UserError(f"verdict = {self.verdict!r} without images per second")
        if self.ratio is None or self.floor is None:
            alone = self.ratio is None and self.verdict in (ALONE, stats.INCONCLUSIVE)
            one = len(self.processes) == 1 and self.verdict in (ONE_PROCESS, NO_VERDICT)
            if not (alone or (self.ratio and one)):
                raise UserError(f"verdict = {self.verdict!r} without an interval")
            return
        logs, again = self.log_ratios, self.log_ratios_again
        if not (logs or ratios):
            return
        if not len(logs) == len(again) == len(self.processes):
            raise UserError(f"{len(self.processes)} processes of {len(logs)} ratios")
        ratio, floor = stats.paired_ratio(logs), stats.noise_floor(again)
        expected, claimed = (*astuple(ratio), floor), (*astuple(self.ratio), self.floor)
        verdicts = (stats.speed_verdict(ratio, floor), stats.INCONCLUSIVE, NO_VERDICT)
        if not np.allclose(expected, claimed, rtol=1e-6) or self.verdict not in verdicts:
            raise UserError("ratio, floor and verdict are not those of its processes")

    def __str__(self) -> str:
        """A short table for people."""
        lines = [f"equality   {self.equality or 'not checked: different functions'}"]
        errors = {name: side.timed_error for name, side in self.sides.items() if side.timed_error}
        if errors:
            each = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            lines.append(f"as timed   error to float64: {each}")
        if self.ratio is not None:
            ratio, interval = self.ratio, "one process, no interval"
            if self.floor is not None:
                interval = f"95 % {ratio.low:.3f} to {ratio.high:.3f}; floor ±{self.floor:.1%}"
            times = f"{ratio.value:.3f}× the reference's images per second"
            lines.append(f"speed      {times} ({interval})")
        lines += [f"{name:<10} {side}" for name, side in self.sides.items() if side.rate]
        reason = f": {self.reason}" if self.reason else ""
        what = f"{self.config.mode}, compile {self.config.compile}"
        lines.append(f"verdict    {self.verdict} ({what}){reason}")
        return "\n".join(lines)
