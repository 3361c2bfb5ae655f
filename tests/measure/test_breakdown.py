"""Where the time of a call or step goes: stages, phases, quantiles, what compiling saves."""

import itertools
import random
import time
from functools import partial

import pytest
import torch
from torch import nn

from vitx.measure import breakdown, jobs, tasks, timing
from vitx.measure.subjects import step_config
from vitx.measure.timing import TimingConfig
from vitx.model.config import ModelConfig, size
from vitx.model.cost import forward_macs
from vitx.model.vit import build
from vitx.settings import override

CONFIG = ModelConfig(image=16, patch=4, width=24, depth=2, heads=3, classes=5)


def test_every_stage_of_a_call_is_seen_and_the_model_stays_as_it_is():
    vit = build(override(CONFIG, width=96, depth=4)).eval()
    image = torch.randn(8, 3, 16, 16)
    before = forward_macs(vit, image)
    seconds_by_stage = breakdown.stages(vit, image)
    assert set(seconds_by_stage) == set(breakdown.STAGES)
    assert all(seconds > 0 for stage, seconds in seconds_by_stage.items() if stage != "remainder")
    assert seconds_by_stage["mlp"] > seconds_by_stage["head"]
    assert not any(module._forward_hooks for module in vit.modules())
    assert forward_macs(vit, image) == before
    with pytest.raises(ValueError, match="has no module patch_embed"):
        breakdown.stages(nn.Linear(3, 3), image)


@pytest.mark.timing
def test_little_of_a_call_belongs_to_no_stage():
    seconds = breakdown.stages(build(size("Ti/16")), torch.randn(1, 3, 224, 224))
    assert abs(seconds["remainder"]) <= 0.05 * sum(seconds.values())


def test_phases_of_a_step_are_all_there():
    config = step_config(4, TimingConfig(mode="training"))
    phases = breakdown.phases(build(CONFIG), torch.randn(4, 3, 16, 16), config)
    assert set(phases) == {"forward", "backward", "optimizer"}
    assert all(seconds > 0 for seconds in phases.values())


@pytest.mark.parametrize("share", breakdown.QUANTILES)
def test_intervals_of_quantiles_hold_them_95_times_in_100(share):
    draws, held = random.Random(0), 0
    for _ in range(1000):
        times = sorted(draws.random() for _ in range(breakdown.LEAST_CALLS))
        interval = breakdown._quantile(times, share)
        held += interval.low <= share <= interval.high
    assert 0.93 < held / 1000 < 0.99


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self):
        self.seconds = 0.0

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.seconds)
    return clock


def test_latency_waits_for_every_call(monkeypatch, clock):
    """Of a device that works on by itself, as a GPU does."""
    slow, given = itertools.cycle([0.001] * 19 + [0.02]), []  # every twentieth call

    def synchronise(device):
        while given:
            clock.sleep(given.pop())

    monkeypatch.setattr(timing, "synchronise", synchronise)
    arm = timing.step_arm(lambda: given.append(next(slow)), 1, torch.device("cuda"))
    latency = breakdown.latency(arm.block, 0.01)
    assert latency.calls == breakdown.LEAST_CALLS
    for quantile, seconds in ((latency.p50, 0.001), (latency.p90, 0.001), (latency.p99, 0.02)):
        assert quantile.value == pytest.approx(seconds)
        assert quantile.low <= quantile.value <= quantile.high


class SlowAtFirst(nn.Module):
    def __init__(self, clock):
        super().__init__()
        self.clock, self.calls = clock, 0

    def forward(self, image):
        self.calls += 1
        self.clock.sleep(0.3 if self.calls == 1 else 0.001)
        return image


def test_what_a_first_call_does_once_is_no_latency(tmp_path, monkeypatch, clock):
    config = TimingConfig(pair_s=0.01, warm_up_s=0.1, block_s=0.01, details=True)
    job = jobs.write(tmp_path, config, None, nn.Identity(), torch.zeros(1, 3), None)
    monkeypatch.setattr(
        jobs.Job,
        "load",
        lambda _, name: torch.zeros(1, 3) if name == "example" else SlowAtFirst(clock),
    )
    side = tasks.details(job, "candidate")
    assert side.latency.p99.high == pytest.approx(0.001)


def test_what_compiling_saves_comes_from_pairs_of_blocks(clock):
    seconds = {"eager": 0.004, "compiled": 0.001}
    arms = {
        name: timing.step_arm(partial(clock.sleep, each), 2, torch.device("cpu"))
        for name, each in seconds.items()
    }
    saved = breakdown.saved(arms, {"eager": 1, "compiled": 3}, 0.01)
    assert saved.pairs == breakdown.LEAST_PAIRS
    interval = saved.seconds
    assert [interval.low, interval.value, interval.high] == [pytest.approx(0.0015)] * 3


def test_the_mean_of_calls_leaves_out_the_first(clock):
    calls = []
    arm = timing.step_arm(lambda: calls.append(clock.sleep(0.3 if not calls else 0.001)), 1,
                          torch.device("cpu"))  # fmt: skip
    assert breakdown.mean_of_calls(arm.block) == pytest.approx(0.001)
    assert len(calls) == breakdown.MEAN_WARM + breakdown.MEAN_CALLS
