"""Statistics against simulation: intervals cover, tests keep their error, power is as predicted."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW, ttost_ind

from vitx.measure import stats

RNG = np.random.default_rng


def test_the_ratios_interval_covers_the_true_ratio_95_times_in_100():
    rng = RNG(0)
    covered = 0
    for _ in range(2000):
        logs = rng.normal(math.log(1.05), 0.02, 5).tolist()
        ratio = stats.paired_ratio(logs)
        covered += ratio.low <= 1.05 <= ratio.high
    assert 0.935 <= covered / 2000 <= 0.965


def test_an_interval_is_in_order_and_an_undefined_mean_is_no_error():
    assert math.isnan(stats.mean_interval([math.nan, 1.0]).value)
    with pytest.raises(ValueError, match=r"2\.0, 1\.0, 3\.0 are not in order"):
        stats.Interval(1.0, 2.0, 3.0)


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


@pytest.mark.slow
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
    seeds = stats.seeds_for(margin=1.0, std=0.6, chance=0.9)
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
    with pytest.raises(ValueError, match="at least 2 values per side, not 1 and 2"):
        stats.equivalence([1.0], [1.0, 2.0], margin=1.0)
    with pytest.raises(ValueError, match=r"margin = 0\.0 must be positive"):
        stats.equivalence([1.0, 2.0], [1.0, 3.0], margin=0.0)


def many_flips(differences):
    """p of every row of (answers, pairs), by all patterns of signs."""
    pairs = differences.shape[1]
    signs = np.array(list(itertools.product([1, -1], repeat=pairs)))
    sums = abs(differences @ signs.T)
    return (sums >= abs(differences.sum(axis=1))[:, None] - 1e-9).mean(axis=1)


def test_the_sign_flip_test_is_scipys():
    rng = RNG(21)
    for pairs in (5, 9):
        values = rng.normal(0.3, 1, pairs).tolist()
        expected = scipy.stats.permutation_test(
            (values,), np.mean, permutation_type="samples", n_resamples=10**6
        )
        assert stats.sign_flip(values) == pytest.approx(expected.pvalue)
    assert stats.sign_flip([1.0] * 5) == 2 / 2**5
    assert stats.sign_flip([1.0] * 20) == 1 / 2048  # of the drawn patterns only the one seen


def test_holm_multiplies_sorted_p_and_never_falls():
    # Holm 1979: sorted p times m, m - 1, …, and never below the one before.
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "seeds"), [(1, 8), (3, 8), (5, 9), (3, 14)])
def test_a_family_without_effects_is_claimed_in_5_of_100_answers_at_most(family, seeds):
    rng = RNG(22)
    answers = 1000
    # One baseline for all: differences to it are correlated.
    base = rng.normal(size=(answers, 1, seeds))
    differences = rng.normal(size=(answers, family, seeds)) - base
    claims = [stats.effects(some, margin=1e-9) for some in differences.tolist()]
    false = sum(any(one.verdict in ("better", "worse") for one in some) for some in claims)
    assert false / answers < 0.05 + 3 * math.sqrt(0.05 * 0.95 / answers)
    assert false / answers > 0.005


@pytest.mark.parametrize(
    ("seeds", "family", "effect"), [(8, 1, 1.2), (8, 3, 1.5), (10, 2, 1.1), (12, 5, 1.2)]
)
def test_the_power_of_a_family_is_as_predicted(seeds, family, effect):
    rng = RNG(23)
    answers = 2000
    differences = rng.normal(size=(answers, family, seeds))
    differences[:, 0] += effect
    p = many_flips(differences.reshape(-1, seeds)).reshape(answers, family)
    found = np.mean([stats.holm(list(row))[0] < stats.ALPHA for row in p])
    predicted = stats.paired_power(effect=effect, std=1.0, seeds=seeds, family=family)
    # Both are shares of simulated answers.
    assert found == pytest.approx(predicted, abs=4 * math.sqrt(0.25 / answers))
    assert 0.3 < predicted < 0.95


def test_the_smallest_effect_has_the_power_that_is_named():
    least = stats.smallest_effect(std=0.7, seeds=9, family=2, chance=0.8)
    assert stats.paired_power(effect=least, std=0.7, seeds=9, family=2) == pytest.approx(
        0.8, abs=0.01
    )
    assert stats.smallest_effect(std=1.0, seeds=5) == math.inf
    assert stats.paired_power(effect=9.0, std=1.0, seeds=7) == 0  # where no verdict is given


@pytest.mark.parametrize(("family", "fewest"), [(1, 8), (3, 8), (5, 8), (10, 9), (20, 10)])
def test_fewer_seeds_could_never_be_claimed(family, fewest):
    assert stats.fewest_seeds(family) == fewest
    best = [[1.0 + k / 100 for k in range(fewest)]] * family
    assert {effect and effect.verdict for effect in stats.effects(best, margin=1.0)} == {"better"}
    few = [values[:5] for values in best]
    assert {effect and effect.verdict for effect in stats.effects(few, margin=1.0)} == {
        "too few seeds"
    }


def test_verdicts_say_direction_and_equivalence():
    def verdict(values, **how):
        (effect,) = stats.effects([list(values)], **{"margin": 0.1} | how)
        return effect.verdict

    spread = np.linspace(-1, 1, 8)
    assert verdict(0.5 + 0.1 * spread) == "better"
    assert verdict(0.5 + 0.1 * spread, lower_is_better=True) == "worse"
    assert verdict(-0.5 + 0.1 * spread, lower_is_better=True) == "better"
    assert verdict(0.05 * spread) == "equivalent"
    assert verdict(0.5 * spread) == "no difference seen"
    assert verdict(0 * spread) == "identical"
    one, none = stats.effects([list(0.5 + 0.1 * spread), [1.0]], margin=0.1)
    assert none is None
    assert one.p == pytest.approx(2 * 2 / 2**8)  # the other still counts in the family


@pytest.mark.parametrize("family", [1, 3])
def test_equivalence_of_a_family_is_wrong_in_5_of_100_answers_at_most(family, monkeypatch):
    """At the margin itself, where it must not be claimed of any; a difference is always there."""
    monkeypatch.setattr(stats, "holm", lambda p: [1.0] * len(p))
    rng = RNG(24)
    answers, seeds = 2000, 10
    wrong = 0
    for some in rng.normal(1.0, 0.5, (answers, family, seeds)).tolist():
        wrong += any(one.verdict == "equivalent" for one in stats.effects(some, margin=1.0))
    assert wrong / answers < 0.05 + 3 * math.sqrt(0.05 * 0.95 / answers)
    assert wrong / answers > 0.02


def test_more_comparisons_than_any_number_of_pairs_can_bear_are_refused():
    assert stats.fewest_seeds(stats.MOST_COMPARISONS) == 12
    best = [[1.0 + k / 100 for k in range(14)]] * stats.MOST_COMPARISONS
    assert stats.effects(best, margin=1.0)[0].verdict == "better"
    with pytest.raises(ValueError, match="family = 103 must be at most 102 comparisons"):
        stats.fewest_seeds(stats.MOST_COMPARISONS + 1)


@pytest.mark.parametrize("family", [1, 3])
def test_equivalence_is_tested_on_both_sides_for_the_whole_family(family):
    values = np.linspace(-1, 1, 9)
    error = values.std(ddof=1) / 3
    needed = scipy.stats.t.ppf(1 - stats.ALPHA / family, 8) * error
    for margin, word in ((1.001 * needed, "equivalent"), (0.999 * needed, "no difference seen")):
        found = stats.effects([values.tolist()] * family, margin=margin)
        assert {effect and effect.verdict for effect in found} == {word}


def test_simultaneous_intervals_hold_together_95_times_in_100():
    rng = RNG(25)
    answers, family, seeds = 1000, 3, 8
    base = rng.normal(size=(answers, 1, seeds))
    differences = rng.normal(size=(answers, family, seeds)) - base
    held = 0
    for some in differences.tolist():
        found = [effect.difference for effect in stats.effects(some, margin=1.0)]
        held += all(one.low < 0 < one.high for one in found)
    assert 0.95 - 3 * math.sqrt(0.05 * 0.95 / answers) < held / answers < 0.995


def test_components_find_what_was_put_in():
    rng = RNG(26)
    shares, inside, covered = [], 0, 0
    for _ in range(300):
        a, b, c = (rng.normal(0, s, 4) for s in (2.0, 1.0, 0.0))
        values = (
            a[:, None, None] + b[None, :, None] + c[None, None, :] + rng.normal(0, 1, (4, 4, 4))
        )
        found = stats.components(10 + values)
        shares.append(np.array(found.shares) * found.std**2)
        inside += found.low < 10 + rng.normal(0, math.sqrt(6)) < found.high
        covered += found.std_low < math.sqrt(6) < found.std_high
    assert np.mean(shares, axis=0) == pytest.approx([4, 1, 0, 1], abs=0.6)
    assert 0.90 < inside / 300 < 0.99
    assert covered / 300 > 0.88
    assert sum(found.shares) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 2 factors of 2 levels"):
        stats.components(np.zeros((4, 1)))
    with pytest.raises(stats.Uninformative, match="no variance to split"):
        stats.components(np.ones((2, 2)))


@pytest.mark.parametrize("seed", range(5))
def test_holms_adjustment_is_statsmodels(seed):
    p_values = np.random.default_rng(seed).uniform(size=6) ** 2
    _, expected, *_ = multipletests(p_values, method="holm")
    assert stats.holm(list(p_values)) == pytest.approx(list(expected))


@pytest.mark.parametrize("seed", range(5))
def test_equivalence_is_statsmodels_two_one_sided_tests(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, 1, 7).tolist(), rng.normal(0.2, 2, 11).tolist()
    expected, *_ = ttost_ind(b, a, -1.5, 1.5, usevar="unequal")
    result = stats.equivalence(a, b, margin=1.5)
    assert result.p_equivalence == pytest.approx(expected)
    assert (result.low, result.high) == pytest.approx(
        CompareMeans(DescrStatsW(b), DescrStatsW(a)).tconfint_diff(0.1, usevar="unequal")
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers_give_no_answer(value):
    odd = [0.1, value, 0.2]
    for call in (
        lambda: stats.effects([odd * 4], margin=0.01),
        lambda: stats.noise_floor(odd),
        lambda: stats.paired_ratio(odd),
        lambda: stats.sign_flip(odd),
        lambda: stats.equivalence(odd, [0.1, 0.2, 0.3], margin=0.1),
        lambda: stats.equivalence([0.1, 0.2], [0.1, 0.3], margin=value),
        lambda: stats.components(np.array([[0.1, value], [0.2, 0.3]])),
        lambda: stats.power(margin=0.01, std=value, seeds=5),
        lambda: stats.paired_power(effect=0.01, std=value, seeds=10),
        lambda: stats.paired_power(effect=value, std=0.1, seeds=10),
    ):
        with pytest.raises(ValueError, match=r"finite|std > 0|must be positive"):
            call()
