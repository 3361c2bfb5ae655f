"""What a result claims is what its values say, or it is refused: packed or not."""

import json
import math
import random
from copy import deepcopy

import pytest
from throughputs import EQUAL, changed, failed, plain, speed, throughput

from benchmarks import pack, render
from benchmarks.kinds import Accuracy, EqualResult, Gate, Step, Trial, shares
from benchmarks.report import charts
from experiments.study.results import decode, read
from vitx.measure import breakdown
from vitx.training.provenance import environment

SLOW = {"median": 3.0, "low": 2.0, "high": 1.0}
NONE = {"median": 0.0, "low": 0.0, "high": 0.0}
LESS = dict.fromkeys(breakdown.STAGES, -0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidate": 5}, "Expected `str`"),
        ({"surprise": 5}, "has no surprise"),
        ({"comparison.candidate.compile_s": 5.0}, "Expected `object | null`"),
        ({"comparison.candidate.latency": {"calls": 3}}, "missing required field"),
        ({"comparison.candidate.rate": None}, "without images per second"),
        ({"comparison.reference": None}, "without images per second"),
        ({"comparison.verdict": "slower"}, "ratio, floor and verdict are not those"),
        ({"comparison.ratio.low": 1.09}, "ratio, floor and verdict are not those"),
        ({"comparison.processes.0.log_ratio": 1000.0}, "no whole result"),
        ({"comparison.floor": 0.0}, "ratio, floor and verdict are not those"),
        ({"comparison.floor": None, "comparison.verdict": "faster"}, "'faster' without an"),
        ({"comparison.ratio": None, "comparison.verdict": "faster"}, "'faster' without an"),
        ({"comparison.processes.0.log_ratio": None}, "3 processes of 2 ratios"),
        ({"comparison.processes": []}, "0 processes of 0 ratios|at least 2 values"),
        ({"comparison.candidate.peak_mib": -1}, r">= 0.0 - at `\$.comparison.candidate.peak_mib`"),
        ({"comparison.candidate.macs": 1e300}, "no whole result"),
        ({"comparison.reference.stages": LESS}, "'patchify': -0.01.* no seconds of"),
        ({"comparison.candidate.saved": {
            "pairs": 3, "seconds": {"value": 1.0, "low": 2.0, "high": 3.0}}}, "2.0, 1.0, 3.0"),
        ({"comparison.equality": None}, "the outputs were not checked"),
        ({"comparison.equality.passed": False}, "the outputs were not checked"),
        ({"kind": "noise"}, "is not a result of schema 2"),
        ({"comparison.config.mode": "/../../out"}, "mode"),
        ({"comparison.batch": 8.5}, "Expected `int`"),
        ({"comparison.batch": True}, "Expected `int`"),
        ({"comparison.batch": 0}, "batch = 0 must be at least 1"),
        ({"comparison.candidate.peak_mib": "many"}, "Expected `float | null`"),
        ({"comparison.candidate.rate": SLOW}, "not in order"),
        ({"comparison.candidate.rate": NONE}, "> 0.0 - at"),
    ],
)  # fmt: skip
def test_a_result_that_cant_be_or_claims_too_much_is_refused(tmp_path, changes, message):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(changed(throughput(), changes)) + "\n")
    with pytest.raises(ValueError, match=rf"results\.jsonl line 1.*({message})"):
        read(path)


def test_a_pack_is_refused_for_what_its_results_claim(tmp_path, monkeypatch):
    """With a right checksum too, which anyone can make."""
    path = tmp_path / "results.pack"
    wrong = changed(throughput(), {"comparison.verdict": "slower"})
    monkeypatch.setattr(pack.results_file, "encode", lambda _: json.dumps(wrong))
    pack.write([throughput()], path)
    with pytest.raises(ValueError, match=r"results\.pack result 1 .* are not those of its"):
        pack.read(path)


def test_a_failure_needs_no_rate_and_its_best_batch_may_be_unknown():
    for places in ({}, {"comparison.batch": 0}, {"comparison.reason": ""}):
        made = decode(changed(failed(), places), "here")
        assert made.untimed


def trial(**changes):
    number = shares().index(0.05)
    values = {"planted": 0.05, "planted_counted": 0.05, "trial": number, "protocol": 4,
              "seconds": 1.0, "kind": "trial"}  # fmt: skip
    return plain(speed()) | values | changes


def test_a_trial_is_one_that_was_fixed_beforehand():
    assert isinstance(decode(trial(), "here"), Trial)
    for places, message in (
        ({"planted": 0.5}, "there is no trial"),
        ({"planted": 0.0}, "there is no trial"),
        ({"trial": 120}, "there is no trial 120 of 0.05"),
        ({"trial": -1}, "there is no trial -1"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(trial(**places), "here")
    worse = changed(speed(), {"comparison.verdict": "slower"})
    with pytest.raises(ValueError, match="not those of its"):
        decode(worse | {key: trial()[key] for key in ("planted", "planted_counted", "trial",
               "protocol", "seconds", "kind")}, "here")  # fmt: skip


def test_gates_and_steps_without_kept_ratios_are_read_and_others_are_checked():
    kinds = {"gate": (Gate, {"model": "Ti/16", "threshold": 0.03, "outputs_apart": 0.0,
                             "failed": False}),
             "step": (Step, {"name": "wandb"})}  # fmt: skip
    for kind, (result, values) in kinds.items():
        made = changed(speed(), {"kind": kind}) | values
        assert isinstance(decode(made, "here"), result)
        made["comparison"]["ratio"]["value"] = 1.101
        with pytest.raises(ValueError, match="are not those of its processes"):
            decode(made, "here")
        made["comparison"]["processes"] = []
        assert isinstance(decode(made, "here"), result)


def test_equal_models_have_small_errors():
    made = EqualResult(id="a-0", environment=environment(), candidate="a", batch=2, image=(8, 8),
                       equality=EQUAL, verdict="equal")  # fmt: skip
    decode(plain(made), "here")
    for places in ({"equality.output_error": "nan"}, {"equality.passed": False}):
        with pytest.raises(ValueError, match="outputs or gradients differ"):
            decode(changed(made, places), "here")
    decode(changed(made, {"equality.output_error": "inf", "verdict": "not equal"}), "here")


def test_an_equivalence_is_that_of_its_values():
    made = Accuracy(
        id="a-0", environment=environment(), candidate="a", data="digits", trajectory_error=0.0,
        trajectory_steps=1, test_images=360, config={}, seeds=3, reference_values=(0.9, 0.8, 0.7),
        candidate_values=(0.7, 0.8, 0.9), margin=0.01, difference=0.0, low=-0.1, high=0.1,
        p_equivalence=0.01, verdict="equivalent",
    )  # fmt: skip
    with pytest.raises(ValueError, match="not that of its values"):
        decode(plain(made), "here")
    with pytest.raises(ValueError, match="'equivalent' without an interval"):
        decode(changed(made, {"low": "nan"}), "here")
    with pytest.raises(ValueError, match="seeds = 4 of 3 values"):
        decode(changed(made, {"seeds": 4}), "here")


def test_numbers_that_json_lacks_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    odd = changed(throughput(), {"comparison.candidate.macs": math.inf})
    path.write_text(json.dumps(odd) + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl line 1 is not JSON"):
        read(path)
    path.write_text('{"schema": 2, "kind": ' + "[" * 10**5 + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl line 1 is not JSON"):
        read(path)


def test_a_result_is_refused_or_can_be_shown_and_drawn(tmp_path):
    """Whatever one of its values was changed to."""
    draws = random.Random(0)
    others = (None, -1, 0, 1e300, "text", [], {}, True)
    refused = []
    for number in range(100):
        odd = deepcopy(plain(throughput()))
        place, key = draws.choice(list(_places(odd)))
        place[key] = draws.choice(others)
        if number % 4 == 0:
            del place[key]
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(odd) + "\n")
        try:
            results = pack.read(path)
        except ValueError as error:
            refused.append(str(error))
        else:
            for name, table in render.TABLES.items():
                assert isinstance(table(results).markdown(), str), name
            charts.charts(results)
    assert 30 < len(refused) < 95
    assert all("line 1" in words for words in refused)


def _places(value):
    """Every dictionary within a value, with each of its keys."""
    for key, each in value.items():
        yield value, key
        if isinstance(each, dict) and key not in ("environment", "raw"):
            yield from _places(each)
