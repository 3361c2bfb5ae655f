"""The trials of the timing: fixed, each made once, and counted together only where they may be."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from throughputs import EQUAL, comparison_of

from benchmarks import calibration, speed
from benchmarks.kinds import EqualResult, Trial, shares
from benchmarks.report import calibration as report
from benchmarks.report import verdicts
from experiments.study import pages
from experiments.study.results import Results, encode
from vitx.measure import stats, timing, worker

CPU = torch.device("cpu")


def add(results, number, verdict, *, share=None, config=None, **more):
    """A trial of this machine, with what is said of its timing."""
    comparison = comparison_of(batch=2, config=config, verdict=verdict)
    processes = tuple(replace(p, forked=worker.forks(CPU)) for p in comparison.processes)
    share = shares()[number] if share is None else share
    values = {"reference": "timm:vit", "candidate": "b", "planted": share, "trial": number,
              "planted_counted": share, "protocol": timing.PROTOCOL, "seconds": 100.0}  # fmt: skip
    comparison = replace(comparison, processes=processes)
    return results.add(Trial, comparison=comparison, **values | more)


@pytest.fixture
def unchecked_results(monkeypatch):
    """Verdicts of these tests are not those of their times."""
    monkeypatch.setattr(Trial, "check", lambda trial: None)


def test_the_trials_are_fixed_and_each_is_made_once(tmp_path, unchecked_results):
    assert {share: shares().count(share) for share in set(shares())} == {
        0.0: 60, 0.03: 30, 0.05: 30,
    }  # fmt: skip
    config, results = timing.TimingConfig(), Results(tmp_path)
    numbers = [number for number, share in enumerate(shares()) if share == 0.05][:2]
    for number, verdict in zip(numbers, ("slower", "no difference seen"), strict=True):
        add(results, number, verdict, config=config)
    (tmp_path / "committed.jsonl").write_text(results.path.read_text())
    paths = sorted(tmp_path.glob("*.jsonl"))  # a trial that stands in both counts once
    made = partial(calibration.made, paths, reference="timm:vit", device=CPU)
    trials = made(config, batch=2)
    assert [trial.trial for trial in trials] == numbers
    assert made(timing.TimingConfig(processes=9), batch=2) == []
    assert made(config, batch=8) == []
    (line,) = report.table([*trials, *results.kept]).body
    first, second = results.kept
    other = replace(first, protocol=0)
    assert len(report.table([*results.kept, other]).body) == 2  # never in one rate
    threads = replace(first, environment=replace(first.environment, threads=64))
    assert len(report.table([*results.kept, threads]).body) == 2
    chip = replace(second, environment=replace(second.environment, cpu="another"))
    lines = report.table([first, chip]).body  # each machine's, then all
    assert [line[2] for line in lines] == ["1 of 30", "1 of 30", "2 of 30"]
    assert [line[-1] for line in lines][1:] == [lines[1][-1], "all of these"]
    exact = stats.proportion(1, 2)
    assert line[7] == f"found: 50% ({exact.low:.0%} to {exact.high:.0%})"


def test_a_trial_is_found_again_by_its_own_words(tmp_path, unchecked_results):
    name, config = "vit_tiny_patch16_224", timing.TimingConfig()
    pair = speed.make_pair(name, batch=2, device=CPU, img_size=32, depth=1)
    results = Results(tmp_path)
    add(results, 0, "no difference seen", config=config, **pair.labels)
    for batch, count in ((2, 1), (8, 0)):
        trials = calibration.made(
            [results.path], config, reference=f"timm:{name}", batch=batch, device=CPU
        )
        assert len(trials) == count


def test_a_trial_that_was_made_twice_counts_as_it_did_first(tmp_path, unchecked_results):
    results, number = Results(tmp_path), shares().index(0.0)
    for verdict in ("faster", "no difference seen"):
        add(results, number, verdict, config=timing.TimingConfig())
    (trial,) = calibration.made(
        [results.path], timing.TimingConfig(), reference="timm:vit", batch=2, device=CPU
    )
    assert trial.comparison.verdict == "faster"
    (line,) = report.table(results.kept).body
    assert line[:5] == ("nothing", "0.00% to 0.00%", "1 of 60", "0", "1")


def test_the_verdict_table_has_the_rates_of_a_series_that_is_whole(tmp_path):
    results, alarm = Results(tmp_path), shares().index(0.0)
    for number, share in enumerate(shares()):
        verdict = "slower" if share == 0.05 or number == alarm else "no difference seen"
        add(results, number, verdict)
    equal = results.add(EqualResult, candidate="a", batch=2, image=(8, 8), equality=EQUAL,
                        verdict="equal")  # fmt: skip
    trials = results.kept[:-1]
    assert report.complete(trials[1:]) == []
    (line,) = [line for line in verdicts.headline([equal, *trials]).body
               if line[0] == verdicts.TRIALS]  # fmt: skip
    assert line[1] == (
        f"batch 2, on {pages.machine(trials[0])}: false alarms: 1 of 60 (0% to 9%); "
        "3% more work: 0 of 30 (0% to 12%); 5% more work: 30 of 30 (88% to 100%)"
    )
    assert len(report.short_table(trials).body) == 3
    assert encode(trials[0])


def test_exact_intervals_of_proportions():
    # Clopper and Pearson: none of n has the upper end 1 - 0.025^(1/n).
    assert stats.proportion(0, 60).high == pytest.approx(1 - 0.025 ** (1 / 60))
    assert stats.proportion(0, 60).low == 0
    half = stats.proportion(15, 30)
    assert half.low + half.high == pytest.approx(1)
