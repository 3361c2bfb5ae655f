"""The engine of paired timing: order, rounds, log ratios, and what a configuration refuses."""

import math
import random
import statistics
from dataclasses import replace

import pytest
import torch

from vitx.measure import machine, timing
from vitx.measure.machine import Machine
from vitx.measure.timing import Arm, TimingConfig

CPU = torch.device("cpu")
QUICK = TimingConfig(processes=2, pair_s=0.05, block_s=0.002, warm_up_s=0.05, limit_s=120.0)


def arms(seconds: dict[str, float]) -> dict[str, Arm]:
    """Arms whose iterations take these seconds, of a clock that is not read."""
    return {
        name: Arm(lambda iterations, each=each: iterations * each) for name, each in seconds.items()
    }


def test_six_rounds_hold_every_order_once():
    orders = timing.orders(random.Random(0), timing.ARMS)
    first, second = ([next(orders) for _ in range(6)] for _ in range(2))
    assert len(set(first)) == len(set(second)) == 6
    assert first != second


def test_a_pair_finds_planted_times(monkeypatch):
    """With blocks of known length, the median log ratios are those lengths' ratios."""
    seconds = {"reference": 0.20, "again": 0.21, "candidate": 0.10}
    monkeypatch.setattr(machine.Watch, "read", lambda self: Machine(0.0, 0.0, None, 0.0))
    times = timing.time_rounds(arms(seconds), replace(QUICK, block_s=0.3, warm_up_s=60.0), 0, CPU)
    candidate, again = times.log_ratios()
    assert candidate == pytest.approx((math.log(2.0) + math.log(2.1)) / 2)
    assert again == pytest.approx(math.log(0.20 / 0.21))
    assert times.iterations == dict.fromkeys(seconds, 3)
    assert len(times.rounds) == 6
    assert times.warm_up.ended == "steady"
    assert times.rates(["candidate"]) == [pytest.approx(10.0)] * 6


def test_noise_that_only_slows_favours_no_arm():
    noise = random.Random(0)
    times = {arm: [1 + noise.expovariate(10) for _ in range(20_000)] for arm in timing.ARMS}
    candidate, again = timing.log_ratios(times, dict.fromkeys(timing.ARMS, 1))
    assert abs(candidate) < 0.002
    assert abs(again) < 0.002
    logs = ([math.log(seconds) for seconds in times[arm]] for arm in timing.ARMS)
    mean_against_one = [(a + b) / 2 - c for a, b, c in zip(*logs, strict=True)]
    assert statistics.median(mean_against_one) > 0.005  # what the test would find otherwise


def test_arms_of_unlike_speed_have_blocks_of_like_length():
    seconds = {"reference": 0.05, "again": 0.04, "candidate": 0.001}
    iterations = timing.iterations_of(seconds, 0.1)
    assert iterations == {"reference": 3, "again": 3, "candidate": 100}


def test_disturbed_rounds_are_run_again_and_kept(monkeypatch):
    states = iter([Machine(0.5, 0.0, None, 0.0)] + [Machine(0.0, 0.0, None, 0.0)] * 99)
    monkeypatch.setattr(machine.Watch, "read", lambda self: next(states))
    times = timing.time_rounds(arms(dict.fromkeys(timing.ARMS, 0.1)), QUICK, 0, CPU)
    assert times.disturbed == 1
    assert times.quiet
    assert len(times.used) == 6
    assert len(times.rounds) == 7
    assert times.rounds[0].disturbed
    raw = times.raw()["rounds"][0]
    assert raw["foreign"] == 0.5
    assert raw["blocks"]["again"]["seconds"] == 0.1


def test_a_machine_that_is_never_quiet_leaves_the_disturbed_rounds(monkeypatch):
    monkeypatch.setattr(machine.Watch, "read", lambda self: Machine(0.5, 0.0, None, 0.0))
    times = timing.time_rounds(arms(dict.fromkeys(timing.ARMS, 0.1)), QUICK, 0, CPU)
    assert not times.quiet
    assert len(times.used) == len(times.rounds) == 9


def test_page_faults_of_other_processes_are_not_this_ones():
    one, other = (
        timing.time_rounds(arms({"candidate": 0.1}), QUICK, 0, CPU, tree=tree)
        for tree in (False, True)
    )
    assert one.rounds[0].blocks["candidate"].page_faults is not None
    assert other.rounds[0].blocks["candidate"].page_faults is None


def test_an_arm_by_itself_has_a_rate_and_no_ratio():
    times = timing.time_rounds({"candidate": Arm(lambda n: 0.1 * n, 2)}, QUICK, 0, CPU)
    assert not times.paired
    assert times.images == {"candidate": 2}
    assert times.rates(["candidate"])[0] == pytest.approx(20)


def test_wrong_configurations_are_refused(unchecked):
    with pytest.raises(ValueError, match="mode = 'infer' is not known"):
        TimingConfig(mode="infer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compile = 'max' is not known"):
        TimingConfig(compile="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="processes = 0 must be at least 1"):
        TimingConfig(processes=0)
    with pytest.raises(ValueError, match=r"warm_up_s = 0\.0 must be positive"):
        TimingConfig(warm_up_s=0.0)
