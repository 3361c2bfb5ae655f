"""Intervals and tests: paired ratios of times, families of paired differences, equivalence, power.

All take plain lists of numbers and know nothing of models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
from msgspec import Meta
from scipy import optimize, stats

from vitx.registry import UserError

INCONCLUSIVE = "inconclusive"
FLOOR_LIMIT = 0.03
"""With a noise floor above this fraction a comparison of speeds is called inconclusive."""
ALPHA = 0.05
"""Rate of false claims that a family of comparisons may have."""
PATTERNS = 2048
"""Patterns of signs that a sign-flip test looks at, at most."""
MOST_COMPARISONS = int(ALPHA * PATTERNS)
"""Comparisons of a family with which p, adjusted, can still fall below ALPHA."""
LARGEST = 1e21
"""No measured number is as large, whatever its unit."""
Finite = Annotated[float, Meta(gt=-LARGEST, lt=LARGEST)]


def check_order(low: float, value: float, high: float) -> None:
    """ValueError for a value outside its ends; what is undefined (NaN) passes."""
    if low > value or value > high:
        raise UserError(f"{low}, {value}, {high} are not in order")


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval."""

    value: Finite
    low: Finite
    high: Finite

    def __post_init__(self):
        check_order(self.low, self.value, self.high)


def check_finite(*samples: Sequence[float]) -> None:
    """ValueError for values that are no numbers, from which nothing follows."""
    for values in samples:
        if odd := [value for value in values if not math.isfinite(value)]:
            raise UserError(f"{len(odd)} of {len(values)} values are not finite: {odd[0]}")


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean with Student's interval over independent values; at least two of them."""
    if len(values) < 2:
        raise UserError(f"an interval needs at least 2 values, not {len(values)}")
    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def proportion(count: int, of: int, confidence: float = 0.95) -> Interval:
    """A share with its exact binomial interval (Clopper and Pearson 1934)."""
    exact = stats.binomtest(count, of).proportion_ci(confidence, method="exact")
    return Interval(count / of, float(exact.low), float(exact.high))


def paired_ratio(log_ratios: Sequence[float], confidence: float = 0.95) -> Interval:
    """Ratio with its interval from one log ratio per process: Student's, exponentiated."""
    check_finite(log_ratios)
    log = mean_interval(log_ratios, confidence)
    return Interval(math.exp(log.value), math.exp(log.low), math.exp(log.high))


def noise_floor(log_ratios: Sequence[float], confidence: float = 0.95) -> float:
    """The larger end, in size, of the interval of the reference against itself, as a fraction."""
    check_finite(log_ratios)
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


class Uninformative(UserError):
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
        raise UserError(f"equivalence needs at least 2 values per side, not {len(a)} and {len(b)}")
    if not 0 < margin < math.inf:
        raise UserError(f"margin = {margin} must be positive")
    check_finite(reference, candidate)
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
    """Chance that `equivalence` succeeds with `seeds` per side, if the true means are equal.

    `std` is the standard deviation over seeds of one side, in the unit of `margin`. Integrated
    over the chi-squared law of the estimated error (Phillips 1990), with both sides' variance
    pooled, where `equivalence` estimates the two apart.
    """
    if seeds < 2 or not (0 < std < math.inf and 0 < margin < math.inf):
        raise UserError(f"power needs seeds >= 2, std > 0, margin > 0: {seeds}, {std}, {margin}")
    df = 2 * (seeds - 1)
    error = std * math.sqrt(2 / seeds)
    quantiles = (np.arange(2000) + 0.5) / 2000
    estimate = error * np.sqrt(stats.chi2.ppf(quantiles, df) / df)
    room = np.maximum(margin - stats.t.ppf(0.95, df) * estimate, 0.0)
    return float(np.mean(2 * stats.norm.cdf(room / error) - 1))


def seeds_for(*, margin: float, std: float, chance: float = 0.9, most: int = 200) -> int:
    """The fewest seeds per side with that power; ValueError if more than `most`."""
    for seeds in range(2, most + 1):
        if power(margin=margin, std=std, seeds=seeds) >= chance:
            return seeds
    raise UserError(f"a margin of {margin} with std {std} needs more than {most} seeds")


@dataclass(frozen=True)
class Effect:
    """Candidate minus baseline of one comparison in a family, over pairs that share a seed."""

    difference: Interval
    """Mean with the interval that holds for all of the family at once (Bonferroni, Student's t)."""
    p: float
    """Two-sided p of the exact sign-flip test, adjusted for the family (Holm 1979)."""
    verdict: str


def effects(
    differences: Sequence[Sequence[float]], *, margin: float, lower_is_better: bool = False
) -> list[Effect | None]:
    """The comparisons of one family, each a list of paired differences, candidate minus baseline.

    `margin` is the smallest difference of interest, in the unit of the values. Verdicts are those
    of `effect_verdict`. A comparison with fewer than two pairs has none, but counts in the family.
    """
    family = len(differences)
    adjusted = holm([sign_flip(values) if len(values) > 1 else 1.0 for values in differences])
    answers: list[Effect | None] = []
    for values, p in zip(differences, adjusted, strict=True):
        if len(values) < 2:
            answers.append(None)
            continue
        wide = mean_interval(values, 1 - ALPHA / family)
        # Two one-sided tests at ALPHA/family: the interval that leaves that much on either side.
        narrow = mean_interval(values, 1 - 2 * ALPHA / family)
        verdict = effect_verdict(
            wide.value, p, narrow, seeds=len(values), family=family, margin=margin,
            lower_is_better=lower_is_better,
        )  # fmt: skip
        answers.append(Effect(wide, p, verdict))
    return answers


def effect_verdict(
    difference: float,
    p: float,
    narrow: Interval,
    *,
    seeds: int,
    family: int,
    margin: float,
    lower_is_better: bool,
) -> str:
    """`better`, `worse`, `equivalent`, `no difference seen`, `identical` or `too few seeds`.

    The words are defined here only. A difference is claimed when its adjusted p is below ALPHA;
    equivalence when `narrow`, the interval of the one-sided tests, lies within ±margin (both may
    hold: then the difference is claimed). With too few seeds even the strongest result could not be
    claimed, so nothing is said; nor when every difference is 0, as between runs that are the same.
    """
    if seeds < fewest_seeds(family):
        return "too few seeds"
    if narrow.low == narrow.high == 0:
        return "identical"
    if p < ALPHA:
        return "better" if (difference < 0) == lower_is_better else "worse"
    return "equivalent" if -margin < narrow.low and narrow.high < margin else "no difference seen"


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p that paired differences are symmetric around 0, by flipping their signs.

    Exact over all patterns to 12 pairs (Fisher 1935); above, over the one that was seen and random
    ones, PATTERNS together.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        raise UserError(f"a sign-flip test needs at least 2 pairs, not {len(values)}")
    check_finite(differences)
    sums = np.abs(_signs(len(values)) @ values)
    return float(np.mean(sums >= sums[0] * (1 - 1e-12)))  # rounding makes no tie a difference


@lru_cache
def _signs(pairs: int) -> np.ndarray:
    """Different patterns of signs, (patterns, pairs), without their negatives; the first all +1."""
    free = pairs - 1
    if 2**free <= PATTERNS:
        codes = np.arange(2**free)
    else:
        others = np.random.default_rng(0).choice(2 ** min(free, 62) - 1, PATTERNS - 1, False)
        codes = np.concatenate([[0], 1 + others])
    bits = codes[:, None] >> np.arange(free) & 1
    return np.column_stack([np.ones(len(codes)), 1.0 - 2.0 * bits])


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for all comparisons of a family at once (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    adjusted, highest = [0.0] * len(order), 0.0
    for place, k in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * p_values[k]))
        adjusted[k] = highest
    return adjusted


def fewest_seeds(family: int) -> int:
    """Pairs with which the sign-flip test can reach ALPHA after Holm's adjustment: 2·m/2ⁿ < ALPHA.

    Eight at least, below which the intervals lean on the normal law more than a few pairs can bear.
    Raises ValueError for more than MOST_COMPARISONS, where no number of pairs is enough.
    """
    if family > MOST_COMPARISONS:
        raise UserError(f"family = {family} must be at most {MOST_COMPARISONS} comparisons")
    return max(8, math.floor(math.log2(2 * family / ALPHA)) + 1)


def paired_power(*, effect: float, std: float, seeds: int, family: int = 1) -> float:
    """Chance that `effects` claims a true difference `effect`, if it is the only one of its family.

    `std` is that of the paired differences, which are normal. The share of 4,000 simulated answers
    with p below ALPHA/family, the first step of Holm's; the same draws at each call. 0 with fewer
    seeds than `fewest_seeds`, where nothing is claimed.
    """
    if seeds < 2 or not 0 < std < math.inf or family < 1 or not math.isfinite(effect):
        raise UserError(
            "power needs a finite effect, seeds >= 2, std > 0, family >= 1: "
            f"{effect}, {seeds}, {std}, {family}"
        )
    if seeds < fewest_seeds(family):
        return 0.0
    sums = np.abs(_noise(seeds) + (abs(effect) / std) * _signs(seeds).sum(axis=1))
    p_values = np.mean(sums >= sums[:, :1] * (1 - 1e-6), axis=1)
    return float(np.mean(p_values < ALPHA / family))


@lru_cache(maxsize=2)
def _noise(seeds: int) -> np.ndarray:
    """Sums of standard normal differences, (4,000 answers, patterns of signs)."""
    draws = np.random.default_rng(0).standard_normal((4000, seeds), dtype=np.float32)
    return draws @ _signs(seeds).T.astype(np.float32)


def smallest_effect(*, std: float, seeds: int, family: int = 1, chance: float = 0.8) -> float:
    """The difference that `paired_power` finds with that chance; infinite if there is none."""

    def short(effect: float) -> float:
        return paired_power(effect=effect, std=std, seeds=seeds, family=family) - chance

    enough = std
    while short(enough) < 0:
        if enough > 64 * std:
            return math.inf
        enough *= 2
    return optimize.brentq(short, 0.0, enough)  # type: ignore[return-value]


@dataclass(frozen=True)
class Components:
    """The variance of a value over crossed factors, split among them."""

    mean: float
    std: float
    """Of one value whose levels are all new."""
    std_low: float
    std_high: float
    shares: tuple[float, ...]
    """Of the variance: each factor's own, then what their combinations add."""
    low: float
    """95 % of new values lie between this and `high`."""
    high: float


def components(values: np.ndarray) -> Components:
    """Split a balanced table, an axis a factor and one value a cell, into variance components.

    Random effects by the method of moments, those below 0 taken as 0; interactions of all orders
    are one rest. The interval of the standard deviation is by Satterthwaite (1946).
    """
    sizes, mean = values.shape, float(values.mean())
    if values.ndim < 2 or min(sizes) < 2:
        raise UserError(f"components need at least 2 factors of 2 levels, not {sizes}")
    check_finite(values.ravel().tolist())
    if values.min() == values.max():
        raise Uninformative(f"all values are {mean}: there is no variance to split")
    squares, freedom, cells = [], [], []
    for axis, size in enumerate(sizes):
        others = tuple(k for k in range(values.ndim) if k != axis)
        cells.append(values.size // size)
        freedom.append(size - 1)
        squares.append(
            cells[-1] * float(((values.mean(axis=others) - mean) ** 2).sum()) / (size - 1)
        )
    total = float(((values - mean) ** 2).sum())
    freedom_rest = values.size - 1 - sum(freedom)
    rest = (total - sum(m * f for m, f in zip(squares, freedom, strict=True))) / freedom_rest
    own = [max(m - rest, 0.0) / n for m, n in zip(squares, cells, strict=True)]
    variance = sum(own) + rest
    # The estimate is a sum of mean squares with these weights.
    parts = [(m / n, f) for m, n, f, o in zip(squares, cells, freedom, own, strict=True) if o > 0]
    weight = 1 - sum(1 / n for n, o in zip(cells, own, strict=True) if o > 0)
    parts.append((weight * rest, freedom_rest))
    df = sum(part for part, _ in parts) ** 2 / sum(part**2 / f for part, f in parts)
    std = math.sqrt(variance)
    error = math.sqrt(
        sum(o / size for o, size in zip(own, sizes, strict=True)) + rest / values.size
    )
    half = float(stats.t.ppf(0.975, df)) * math.hypot(std, error)
    low, high = (math.sqrt(df / float(stats.chi2.ppf(q, df))) * std for q in (0.975, 0.025))
    shares = tuple(part / variance for part in (*own, rest))
    return Components(mean, std, low, high, shares, mean - half, mean + half)


def _welch(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Standard error of the difference of means and its degrees of freedom (Welch 1947)."""
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    if va + vb == 0:
        return 0.0, 1.0
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return math.sqrt(va + vb), float(df)
