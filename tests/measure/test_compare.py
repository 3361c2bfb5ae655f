"""Comparisons: the verdict from the times of processes, failures as results, words for people."""

import math
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

import vitx
from vitx.measure import jobs, subjects, tasks
from vitx.measure.compare import compare, equality, summarise
from vitx.measure.comparison import Comparison, Side
from vitx.measure.timing import ARMS, BlockTime, PairTimes, Round, TimingConfig, WarmUp
from vitx.measure.worker import Workers
from vitx.model.config import ModelConfig

CONFIG = ModelConfig(image=12, patch=3, width=24, depth=2, heads=3, classes=7)
QUICK = TimingConfig(processes=2, pair_s=0.05, block_s=0.002, warm_up_s=0.05, limit_s=120.0)


class Crash(nn.Module):
    """Computes in one process and fails in any other: what a broken kernel looks like."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 7)
        self.home = os.getpid()

    def forward(self, x):
        if os.getpid() != self.home:
            raise RuntimeError("the kernel is broken")
        return self.head(x)


def process(log_ratio: float, again: float = 0.001, *, quiet: bool = True) -> PairTimes:
    """What a process has timed whose log ratios are these."""
    reference = 0.1
    seconds = {
        "reference": reference,
        "again": reference * math.exp(-again),
        "candidate": reference * math.exp(-log_ratio - again / 2),
    }
    faults = {"reference": 9.0, "again": 7.0, "candidate": 0.5}
    blocks = {arm: BlockTime(seconds[arm], faults[arm]) for arm in ARMS}
    entry = Round(
        foreign=0.0, steal=0.0, clock_mhz=None, load=0.0, order=ARMS, started=0.0,
        disturbed=not quiet, blocks=blocks,
    )  # fmt: skip
    return PairTimes(
        rounds=[entry], quiet=quiet, iterations=dict.fromkeys(ARMS, 1),
        images=dict.fromkeys(ARMS, 8), threads=1, warm_up=WarmUp("steady", 0.1, {}, seconds),
        gpu_readings=None,
    )  # fmt: skip


def comparison(pairs: list[PairTimes]) -> Comparison:
    a = vitx.build(CONFIG)
    checked = equality(a, a, torch.randn(2, 3, 12, 12))
    base = Comparison(
        config=QUICK, verdict="not timed", equality=checked, batch=8, reference=Side()
    )
    return summarise(base, pairs)


def test_a_comparison_says_faster_only_beyond_the_floor():
    fast = comparison([process(0.050), process(0.052), process(0.051)])
    assert fast.verdict == "faster"
    assert fast.ratio.low > 1.04
    assert fast.log_ratios == pytest.approx([0.050, 0.052, 0.051])
    assert fast.log_ratios_again == pytest.approx([0.001] * 3)
    noisy = comparison([process(0.050, 0.05), process(0.052, -0.05), process(0.051, 0.0)])
    assert noisy.verdict == "inconclusive"
    assert fast.reference.rate.median == pytest.approx(80, rel=0.01)
    assert fast.reference.page_faults == 8.0
    assert fast.candidate.page_faults == 0.5


def test_a_machine_that_was_never_quiet_gives_no_verdict():
    timed = comparison([process(0.050), process(0.052, quiet=False), process(0.051)])
    assert timed.verdict == "inconclusive"
    assert "the machine was disturbed" in timed.reason


def test_one_process_gives_no_verdict():
    timed = comparison([process(0.5)])
    assert timed.verdict == "one process, no verdict"
    assert timed.ratio.value == timed.ratio.low == pytest.approx(math.exp(0.5))
    assert timed.floor is None
    assert timed.candidate.rate.mean is None
    assert "one process, no interval" in str(timed)


def test_a_side_takes_what_another_has_measured():
    side = Side(macs=3, peak_mib=1.0) | Side(peak_mib=2.0, timed_error=0.1)
    assert side == Side(macs=3, peak_mib=2.0, timed_error=0.1)


@pytest.mark.slow
def test_compare_times_two_equal_models_in_fresh_processes():
    a, b = vitx.build(CONFIG), vitx.build(CONFIG)
    lines = []
    timed = compare(a, b, torch.randn(4, 3, 12, 12), config=QUICK, say=lines.append)
    assert timed.equality.passed
    assert len(timed.processes) == 2
    assert timed.ratio.low <= timed.ratio.value <= timed.ratio.high
    assert timed.reference.macs == timed.candidate.macs > 0
    assert timed.reference.peak_mib > 0
    assert 0 < timed.candidate.timed_error < 1e-5
    assert sum("process" in line for line in lines) == 2
    text = str(timed)
    assert "95 %" in text
    assert "floor" in text
    assert timed.config.keep_memory
    assert timed.candidate.page_faults >= 0
    for process in timed.raw:
        order = [arm for entry in process["rounds"] for arm in entry["order"]]
        assert order.count("reference") == order.count("candidate") >= 6


@pytest.mark.slow
def test_compare_times_compiled_modules(compiled, tmp_path):
    a, b = (vitx.build(replace(CONFIG, depth=1)) for _ in range(2))
    config = replace(QUICK, processes=1, compile="default", limit_s=900.0)
    timed = compare(a, b, torch.randn(4, 3, 12, 12), config=config)
    assert timed.verdict == "one process, no verdict", timed.reason
    assert 0 < timed.candidate.timed_error < 1e-5
    assert timed.reference.compile_s.cold > 0
    assert timed.candidate.compile_s.cold > 0
    # The second start compiled nothing: what the first left was enough for it.
    job = jobs.write(tmp_path / "job", config, None, a, torch.randn(4, 3, 12, 12), None)
    codes = []
    with Workers() as workers:
        for _ in range(2):
            workers.run(job, tmp_path / "cache", tasks.alone, "candidate")
            codes.append({path.name for path in (tmp_path / "cache").rglob("*.so")})
    assert codes[0] == codes[1] != set()


@pytest.mark.slow
def test_models_in_float64_are_timed():
    a, b = (
        vitx.build(vitx.override(CONFIG, attention=core), dtype=torch.float64)
        for core in ("sdpa", "math")
    )
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    timed = compare(a, b, images, config=replace(QUICK, processes=1))
    assert timed.ratio is not None, timed.reason


def test_unequal_models_are_not_timed():
    a, b = vitx.build(CONFIG), vitx.build(vitx.override(CONFIG, norm="layernorm(eps=1e-3)"))
    timed = compare(a, b, torch.randn(4, 3, 12, 12), config=QUICK)
    assert timed.verdict == "not timed"
    assert "outputs differ" in timed.reason
    assert timed.ratio is None


def test_a_crash_is_a_failure_with_its_last_words(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    timed = compare(Crash(), Crash(), torch.randn(4, 3), config=QUICK)
    assert timed.verdict == "failed"
    assert timed.reason == "RuntimeError: the kernel is broken"


def test_without_a_compiler_the_compiled_configuration_fails_by_name(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    a = vitx.build(CONFIG)
    timed = compare(a, a, torch.randn(4, 3, 12, 12), config=replace(QUICK, compile="default"))
    assert timed.verdict == "failed"
    assert "needs a C++ compiler" in timed.reason


def test_what_no_other_process_can_rebuild_is_timed_in_one_without_verdict():
    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 7)

        def forward(self, x):
            return self.head(x)

    timed = compare(Local(), Local(), torch.randn(4, 3), config=QUICK)
    assert timed.verdict == "one process, no verdict"
    assert "no fresh process could rebuild" in timed.reason
    assert timed.ratio is not None
    assert not timed.config.keep_memory


def test_an_example_without_images_is_refused():
    with pytest.raises(ValueError, match="example holds no image"):
        compare(nn.Linear(3, 5), nn.Linear(3, 5), torch.randn(0, 3))


@pytest.mark.timing
def test_a_model_against_itself_is_no_different():
    a = vitx.build(vitx.size("Ti/16", image=64))
    config = TimingConfig(processes=5, pair_s=5.0)
    timed = compare(a, a, torch.randn(8, 3, 64, 64), config=config)
    assert timed.verdict in ("no difference seen", "inconclusive")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_inference_in_half_precision_and_training_under_autocast(dtype):
    image = torch.randn(2, 3, 12, 12)
    vit, half = subjects.as_timed(vitx.build(CONFIG), image, replace(QUICK, dtype=dtype))
    assert half.dtype == next(vit.parameters()).dtype == getattr(torch, dtype)
    config = replace(QUICK, dtype=dtype, mode="training")
    vit, given = subjects.as_timed(vitx.build(CONFIG), image, config)
    assert given.dtype == next(vit.parameters()).dtype == torch.float32
    before = vit.head.weight.detach().clone()
    step = subjects.make_step(vit, None, given, config)
    for _ in range(20):  # float16 finds its scale first
        metrics = step()
    assert metrics["loss"].isfinite()
    assert not torch.equal(before, vit.head.weight)


def test_the_step_of_a_module_is_the_trainers():
    """With clipping and the optimizer: the weights change as by the trainer."""
    vit = vitx.build(CONFIG)
    before = vit.head.weight.detach().clone()
    image = torch.randn(4, 3, 12, 12)
    subjects.make_step(vit, None, image, replace(QUICK, mode="training"))()
    assert 0 < (vit.head.weight - before).abs().max() < 1e-4
    assert vit.training


class Planted:
    """Blocks that say how long they took."""

    images = 3

    def make_block(self):
        return lambda iterations: 0.5 * iterations


def test_blocks_that_time_themselves_are_a_subject(unchecked):
    times = subjects.pair({"candidate": Planted()}, torch.zeros(1), QUICK, 0)
    assert times.rates(["candidate"])[0] == pytest.approx(6.0)
    assert times.rounds[0].blocks["candidate"].page_faults is None


def test_a_probe_runs_all_that_a_pair_does_and_gives_the_candidates_rate(monkeypatch):
    calls = []
    seconds = iter([9.0, 9.0, 0.5, 0.1, 0.1, 0.4, 0.1, 0.1, 0.3, 0.1, 0.1, 0.2])

    class Noted(Planted):
        images = 8

        def __init__(self, arm):
            self.arm = arm

        def make_block(self):
            return lambda iterations: calls.append(self.arm) or next(seconds)

    arms = {arm: Noted(arm) for arm in ARMS}
    assert subjects.probe(arms, torch.zeros(8, 3), TimingConfig()) == 8 / 0.2
    assert calls == [*ARMS] * 4


def test_a_probe_keeps_memory_as_a_pair_does(tmp_path, monkeypatch):
    kept: list[bool] = []
    monkeypatch.setattr(tasks, "keep_memory", lambda: kept.append(True))
    small = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    config = TimingConfig(processes=1, pair_s=0.01, block_s=0.001, warm_up_s=0.01)
    job = jobs.write(tmp_path, config, small, small, torch.randn(1, 3, 2, 2), {})
    tasks.pair(job, 0)
    tasks.probe(job, 0)
    tasks.alone(job, "candidate")
    assert len(kept) == 2
