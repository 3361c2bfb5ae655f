"""Statistics against simulation: intervals cover, tests keep their error, power is as predicted."""

import math

import numpy as np
import pytest

from vitx import stats

RNG = np.random.default_rng


def test_the_ratios_interval_covers_the_true_ratio_95_times_in_100():
    rng = RNG(0)
    covered = 0
    for _ in range(2000):
        logs = rng.normal(math.log(1.05), 0.02, 5).tolist()
        ratio = stats.paired_ratio(logs)
        covered += ratio.low <= 1.05 <= ratio.high
    assert 0.935 <= covered / 2000 <= 0.965


def test_the_floor_is_the_larger_end_of_the_aa_interval():
    logs = [0.010, 0.012, 0.011, 0.009]
    mean = stats.mean_interval(logs)
    assert stats.noise_floor(logs) == pytest.approx(math.expm1(mean.high))
    assert stats.noise_floor([-x for x in logs]) == pytest.approx(math.expm1(mean.high))


@pytest.mark.parametrize(
    ("low", "high", "floor", "word"),
    [
        (1.03, 1.05, 0.02, "faster"),
        (1.01, 1.05, 0.02, "no difference seen"),
        (0.99, 1.01, 0.02, "no difference seen"),
        (0.95, 0.97, 0.02, "slower"),
        (0.95, 0.985, 0.02, "no difference seen"),
        (1.10, 1.20, 0.031, "inconclusive"),
    ],
)
def test_a_verdict_needs_the_whole_interval_beyond_the_floor(low, high, floor, word):
    assert stats.speed_verdict(stats.Interval((low + high) / 2, low, high), floor) == word


def test_equivalence_is_claimed_at_most_5_times_in_100_at_the_margin():
    rng = RNG(1)
    claims = 0
    for _ in range(4000):
        a, b = rng.normal(0, 0.5, 6).tolist(), rng.normal(1.0, 0.5, 6).tolist()
        claims += stats.equivalence(a, b, margin=1.0).equivalent
    assert claims / 4000 <= 0.05 + 3 * (0.05 * 0.95 / 4000) ** 0.5


@pytest.mark.parametrize(("std", "seeds"), [(0.4, 5), (0.6, 5), (0.6, 8), (0.9, 10)])
def test_power_is_as_predicted(std, seeds):
    rng = RNG(2)
    runs = 3000
    wins = sum(_equivalent(rng, std, seeds) for _ in range(runs))
    predicted = stats.power(margin=1.0, std=std, seeds=seeds)
    assert wins / runs == pytest.approx(predicted, abs=0.04)


def _equivalent(rng, std, seeds):
    a, b = (rng.normal(0, std, seeds).tolist() for _ in range(2))
    return stats.equivalence(a, b, margin=1.0).equivalent


def test_seeds_for_is_the_fewest_that_reach_the_power():
    seeds = stats.seeds_for(margin=1.0, std=0.6, wanted=0.9)
    assert stats.power(margin=1.0, std=0.6, seeds=seeds) >= 0.9
    assert stats.power(margin=1.0, std=0.6, seeds=seeds - 1) < 0.9
    with pytest.raises(ValueError, match="more than 20 seeds"):
        stats.seeds_for(margin=0.01, std=1.0, most=20)


def test_copies_of_one_run_are_refused_as_uninformative():
    with pytest.raises(stats.Uninformative, match="both sides hold the same values"):
        stats.equivalence([0.9, 0.91, 0.92], [0.9, 0.91, 0.92], margin=0.01)
    with pytest.raises(stats.Uninformative, match="neither side varies"):
        stats.equivalence([0.9, 0.9], [0.91, 0.91], margin=0.01)


def test_too_few_values_and_no_margin_are_refused():
    with pytest.raises(ValueError, match="at least 2 values"):
        stats.mean_interval([1.0])
    with pytest.raises(ValueError, match="at least 2 values a side, not 1 and 2"):
        stats.equivalence([1.0], [1.0, 2.0], margin=1.0)
    with pytest.raises(ValueError, match=r"margin = 0\.0 must be positive"):
        stats.equivalence([1.0, 2.0], [1.0, 3.0], margin=0.0)
