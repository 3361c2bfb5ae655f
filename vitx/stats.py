"""Intervals and tests: paired ratios of times, equivalence of two means, seeds that a margin needs.

All take plain lists of numbers and know nothing of models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

INCONCLUSIVE = "inconclusive"
FLOOR_LIMIT = 0.03
"""With a noise floor above this fraction a comparison of speeds is called inconclusive."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean with Student's interval over independent values; at least two of them."""
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 values, not {len(values)}")
    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def paired_ratio(log_ratios: Sequence[float], confidence: float = 0.95) -> Interval:
    """Ratio with its interval from one log ratio a process: Student's, exponentiated."""
    log = mean_interval(log_ratios, confidence)
    return Interval(math.exp(log.value), math.exp(log.low), math.exp(log.high))


def noise_floor(log_ratios: Sequence[float], confidence: float = 0.95) -> float:
    """The larger end, in size, of the interval of the reference against itself, as a fraction."""
    log = mean_interval(log_ratios, confidence)
    return math.expm1(max(abs(log.low), abs(log.high)))


def speed_verdict(ratio: Interval, floor: float) -> str:
    """`faster`, `slower`, `no difference seen` or `inconclusive`; the only place of these words.

    A difference is claimed only when the whole interval lies beyond the floor.
    """
    if floor > FLOOR_LIMIT:
        return INCONCLUSIVE
    if ratio.low > 1 + floor:
        return "faster"
    if ratio.high < 1 / (1 + floor):
        return "slower"
    return "no difference seen"


class Uninformative(ValueError):
    """Samples that say nothing about a difference of means."""


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided Welch tests of candidate minus reference against ±margin."""

    difference: float
    low: float
    high: float
    margin: float
    p_equivalence: float

    @property
    def equivalent(self) -> bool:
        """Both one-sided tests reject at 5 %, so the 90 % interval lies within the margin."""
        return self.p_equivalence < 0.05


def equivalence(
    reference: Sequence[float], candidate: Sequence[float], *, margin: float
) -> Equivalence:
    """Whether two independent samples have means closer than `margin` (Schuirmann 1987, TOST).

    Raises Uninformative when both sides hold the same values in the same order, as copies of the
    same runs do, or do not vary.
    """
    a, b = np.asarray(reference, dtype=float), np.asarray(candidate, dtype=float)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"equivalence needs at least 2 values a side, not {len(a)} and {len(b)}")
    if margin <= 0:
        raise ValueError(f"margin = {margin} must be positive")
    if np.array_equal(a, b):
        raise Uninformative("both sides hold the same values: draw them independently")
    difference = float(b.mean() - a.mean())
    error, df = _welch(a, b)
    if error == 0:
        raise Uninformative("neither side varies: the test needs independent seeds")
    p_low = float(stats.t.sf((difference + margin) / error, df))
    p_high = float(stats.t.cdf((difference - margin) / error, df))
    half = float(stats.t.ppf(0.95, df)) * error
    return Equivalence(difference, difference - half, difference + half, margin, max(p_low, p_high))


def power(*, margin: float, std: float, seeds: int) -> float:
    """Chance that `equivalence` succeeds with `seeds` a side, if the true means are equal.

    `std` is the standard deviation over seeds of one side, in the unit of `margin`. Integrated
    over the chi-squared law of the estimated error (Phillips 1990), with both sides' variance
    pooled, where `equivalence` estimates the two apart.
    """
    if seeds < 2 or std <= 0 or margin <= 0:
        raise ValueError(f"power needs seeds >= 2, std > 0, margin > 0: {seeds}, {std}, {margin}")
    df = 2 * (seeds - 1)
    error = std * math.sqrt(2 / seeds)
    quantiles = (np.arange(2000) + 0.5) / 2000
    estimate = error * np.sqrt(stats.chi2.ppf(quantiles, df) / df)
    room = np.maximum(margin - stats.t.ppf(0.95, df) * estimate, 0.0)
    return float(np.mean(2 * stats.norm.cdf(room / error) - 1))


def seeds_for(*, margin: float, std: float, wanted: float = 0.9, most: int = 200) -> int:
    """The fewest seeds a side with that power; ValueError if more than `most`."""
    for seeds in range(2, most + 1):
        if power(margin=margin, std=std, seeds=seeds) >= wanted:
            return seeds
    raise ValueError(f"a margin of {margin} with std {std} needs more than {most} seeds")


def _welch(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Standard error of the difference of means and its degrees of freedom (Welch 1947)."""
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    if va + vb == 0:
        return 0.0, 1.0
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return math.sqrt(va + vb), float(df)
