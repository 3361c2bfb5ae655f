"""The gate: two commits in pairs, which fails only for a slowdown beyond threshold and floor."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gate
from benchmarks.kinds import Gate
from benchmarks.report import tables
from experiments.study.pages import ROOT
from experiments.study.results import read
from vitx.measure import stats
from vitx.measure.comparison import Comparison, Process, Side
from vitx.measure.timing import TimingConfig
from vitx.training import provenance


@pytest.mark.slow
def test_a_gate_passes_the_same_commit_and_names_what_it_cant_read(tmp_path):
    words = ["--against", "HEAD", "--model", "Pico/16", "--mode", "inference", "--processes", "2",
             "--seconds", "0.1", "--block-s", "0.01", "--threshold", "0.9", "--out",
             str(tmp_path)]  # fmt: skip
    gate.main(words)
    (path,) = tmp_path.glob("gate/*/results.jsonl")
    (result,) = read(path)
    assert isinstance(result, Gate)
    assert result.outputs_apart == 0
    assert not result.failed
    assert result.reference == result.candidate
    assert 0.3 < result.comparison.ratio.value < 3
    assert len(result.comparison.processes) == 2
    (shown,) = tables.gate_table([result]).body
    assert "2 of 0.1 s, blocks of 0.01 s" in shown
    assert shown[:3] == (result.candidate[:7], result.reference[:7], "Pico/16")
    with pytest.raises(ValueError, match="against = 'nowhere' is no commit"):
        gate.main(["--against", "nowhere"])
    with pytest.raises(ValueError, match="mode names nothing to time"):
        gate.main(["--against", "HEAD", "--mode"])


@pytest.mark.slow
def test_a_gate_times_two_commits_and_fails_for_the_slower_one(tmp_path):
    """In a checkout of its own, whose newer commit sleeps in every attention."""
    for name in ("vitx", "experiments", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("results"))

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=b"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "before")
    model = tmp_path / "vitx" / "model" / "vit.py"  # it also takes more draws for its weights
    made = "        vit = Vit(config, seed=seed)\n"
    assert model.read_text().count(made) == 1
    model.write_text(model.read_text().replace(made, f"        torch.rand(3)\n{made}"))
    path = tmp_path / "vitx" / "model" / "layers.py"
    text, line = path.read_text(), "        q, k, v = self.split(tokens, queries)\n"
    assert text.count(line) == 1
    path.write_text("import time\n" + text.replace(line, f"        time.sleep(0.25)\n{line}"))
    git("commit", "-am", "after")
    words = ["--against", "HEAD~1", "--model", "Pico/16", "--mode", "inference", "--processes",
             "4", "--seconds", "0.2", "--block-s", "0.01", "--threshold", "0.5"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gate", *words], cwd=tmp_path, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (path,) = tmp_path.glob("runs/gate/*/results.jsonl")
    (result,) = read(path)
    assert isinstance(result, Gate)
    assert result.failed
    assert result.outputs_apart == 0
    assert result.reference != result.candidate
    assert result.comparison.ratio.high < 0.5


def test_a_side_of_the_gate_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "side.py").write_text("import time; time.sleep(100)")
    monkeypatch.setattr(gate, "SIDE", tmp_path / "side.py")
    with pytest.raises(ValueError, match=r"killed, at the latest after 0\.5 s without an answer"):
        gate.Side({}, tmp_path, 0.5)


def timing(processes: int = 5) -> gate.Timing:
    config = TimingConfig(processes=processes)
    return gate.Timing("Ti/16", 2, torch.device("cpu"), Path(), {}, config)


@pytest.fixture
def planted(monkeypatch):
    """Gives what the gate says of processes with these log ratios."""

    def plant(values, apart=0.0, noise=0.001):
        calls = []

        def process(_, number):
            calls.append(number)
            difference = apart if number == 0 else 0.0
            times = object() if difference <= gate.TOLERANCE else None
            return difference, times

        def summarised(base, pairs):
            ratios = zip(values, (noise * k for k in range(len(values))), strict=True)
            processes = tuple(Process(*each) for each in ratios)
            return _judged(base, processes)

        monkeypatch.setattr(gate, "time_pair", process)
        monkeypatch.setattr(gate, "summarise", summarised)
        return *gate.compare(timing(len(values))), calls

    return plant


def _judged(base: Comparison, processes: tuple[Process, ...]) -> Comparison:
    timed = replace(base, processes=processes, candidate=Side())
    ratio = stats.paired_ratio(timed.log_ratios)
    floor = stats.noise_floor(timed.log_ratios_again)
    verdict = stats.speed_verdict(ratio, floor)
    return replace(timed, ratio=ratio, floor=floor, verdict=verdict)


def test_a_gate_fails_only_with_the_whole_interval(planted):
    logs = [math.log(0.94), math.log(0.95), math.log(0.96), math.log(0.95), math.log(0.95)]

    def fails(*values, **options) -> bool:
        _, comparison, _ = planted(*values, **options)
        return gate.fails(comparison, 0.03)

    assert fails(logs)
    assert not fails(logs, noise=0.03)  # the floor is wider than the threshold
    assert not fails([math.log(0.90), math.log(0.99), *logs[2:]])


def test_commits_that_compute_otherwise_are_not_timed(planted):
    apart, comparison, calls = planted([0.0] * 5, apart=1e-3)
    assert apart == 1e-3
    assert gate.fails(comparison, 0.03)
    assert (comparison.verdict, comparison.ratio) == ("not equal", None)
    assert comparison.reason == "outputs or gradients differ by 1.0e-03"
    assert calls == [0]  # the first process ended it


def test_a_line_says_how_the_gate_went(planted):
    def line(comparison, *, failed):
        environment = provenance.environment()
        return gate.line(Gate(
            id="2026-01-01T00:00:00Z-0", environment=environment, reference="a" * 40,
            candidate="b" * 40, comparison=comparison, model="Ti/16", threshold=0.03,
            outputs_apart=0.0, failed=failed,
        ))  # fmt: skip

    _, noisy, _ = planted([math.log(0.95), math.log(0.96)], noise=0.1)
    assert line(noisy, failed=False).endswith("passed: not shown to be slower")
    _, other, _ = planted([0.0, 0.0], apart=1e-3)
    assert line(other, failed=True) == ("inference: outputs or gradients differ by 1.0e-03: FAILED")


def test_an_undefined_number_is_no_equal_output():
    assert gate.largest_error([1.0, 2.0, 3.0], [1.0, math.nan, 3.0]) == math.inf
    assert gate.largest_error([1.0], [1.0, 2.0]) == math.inf
