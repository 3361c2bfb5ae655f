"""The benchmark's matrix: what is refused, what fails without stopping the rest, what rows say."""

import csv
import gzip
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import types
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from experiments.study.rows import Rows, read
from torch import nn

from benchmarks import (
    calibration,
    check,
    pack,
    peers,
    pretrained,
    render,
    speed,
    throughput,
    trials,
)
from benchmarks.report import charts, matrix, plots
from experiments.study import pages
from experiments.study.pages import ROOT
from vitx import pictures
from vitx.measure import breakdown, machine, peak, stats, timing, worker
from vitx.measure.compare import equality
from vitx.model.config import ModelConfig
from vitx.training import provenance

PLANTED = ROOT / "tests" / "planted.py"
CONFIG = ModelConfig(image=16, patch=4, width=24, depth=2, heads=3, classes=5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "vitx"], "model = 'vitx' is not known; did you mean 'vitx:'"),
        (["--models", "tim:vit_tiny_patch16_224"], "did you mean 'timm:'"),
        (["--models", "timm:vit_tiny_patch16_22"], "timm has no model 'vit_tiny_patch16_22'"),
        (["--models", "timm:vit_tiny_patch16_224.no"], r"Invalid pretrained tag \(no\)"),
        (["--models", "hf:/nowhere/x"], "there is no /nowhere/x/config.json"),
        (["--models", "hf:tests"], "there is no tests/config.json"),
        (["--models", "hf:T/16"], "model = 'hf:T/16': size = 'T/16' is not known"),
        (["--models", "python:nowhere.py:f"], "there is no file 'nowhere.py'"),
        (["--models", f"python:{PLANTED}:nothing"], "has no function 'nothing'"),
        (["--dtype", "float8"], "dtype = 'float8' is not known"),
        (["--mode", "trainig"], "mode = 'trainig' is not known"),
        (["--reference", "vitx:Ti/16"], "models names no other model than the reference"),
        (["--processes", "0"], "processes = 0 must be at least 1"),
        (["--seconds", "0"], "^seconds = 0.0 must be positive and finite"),
        (["--limit-gib", "-1"], "limit_gib = -1.0 must be 0 or positive"),
        (["--batch", "--dtype", "float32"], "batch names nothing to time"),
        (["--mode", "--dtype", "float32"], "mode names nothing to time"),
        (["--compile", "--dtype", "float32"], "compile names nothing to time"),
        (["--limit-s", "inf"], "limit_s = inf must be less than 1,000,000"),
        (["--unchecked"], "--unchecked goes with --reference"),
        (["--resume"], "holds no run of these settings and versions to resume"),
    ],
)
def test_what_cant_be_timed_is_one_sentence(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        throughput.main([*words, "--out", str(tmp_path)])
    assert not list(tmp_path.rglob("rows.jsonl"))


def run(out: Path, models: list[str], *more: str) -> list[dict]:
    names = [f"python:{PLANTED}:{name}" for name in models]
    throughput.main(
        ["--models", *names, "--processes", "2", "--seconds", "0.1", "--batch", "1",
         "--wandb", "disabled", "--out", str(out), *more]
    )  # fmt: skip
    (path,) = out.glob("throughput/*/rows.jsonl")
    return read(path)


@pytest.mark.slow
def test_a_model_is_timed_beside_a_reference_and_a_wrong_one_is_not(tmp_path, capsys):
    reference = f"python:{PLANTED}:small"
    models = ["wrong", "others_names"]
    rows = run(tmp_path, models, "--reference", reference)
    wrong, other = rows
    assert (wrong["kind"], wrong["verdict"]) == ("failure", "not equal")
    assert "outputs differ by 1.0e-03" in wrong["reason"]
    assert other["kind"] == "speed"
    assert other["checked"].startswith("not checked: the state dicts do not match")
    assert other["latency"]["candidate"]["p50"]["value"] > 0
    assert other["stages"]["reference"]["attention"] > 0
    assert other["stages"]["candidate"] is None
    assert other["utilisation"]["reference"]["flops"] > 0
    assert other["parameters"]["candidate"] == 3 * 16 * 16 * 5 + 5
    rate = other["images_per_s"]["candidate"]
    assert rate["mean_low"] < rate["mean"] < rate["mean_high"]
    # Meant to be another function, it is timed and not judged.
    (other,) = run(tmp_path / "meant", ["wrong"], "--reference", reference, "--unchecked")
    assert other["checked"] == "not checked: it is meant to compute something else"
    assert (other["kind"], matrix.verdict(other)[:11]) == ("speed", "not checked")
    # Going on makes nothing again.
    before = list(tmp_path.glob("throughput/*"))
    assert run(tmp_path, models, "--reference", reference, "--resume") == rows
    assert list(tmp_path.glob("throughput/*")) == before
    said = capsys.readouterr().out
    assert said.count("[1 of 2]") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_what_pytorch_tunes_is_timed(tmp_path):
    """Compile mode max-autotune, whose choices are made in the processes that time it."""
    (found,) = run(tmp_path, ["small"], "--compile", "max-autotune")
    assert (found["kind"], found["compile"]) == ("speed", "max-autotune"), found["reason"]
    assert found["compile_s"]["candidate"]["cold"] > 0
    assert found["saved"]["candidate"]["pairs"] >= breakdown.LEAST_PAIRS


@pytest.mark.slow
def test_more_work_than_the_machine_can_do_is_a_failure_with_its_times(tmp_path, monkeypatch):
    slow = peak.Peak(1e3, (1, 1, 1), 1e3)
    monkeypatch.setattr(throughput.peak, "peak", lambda *_: slow)
    plan = timing.TimingConfig(dtype="float32", processes=1, pair_s=0.1, block_s=0.01)
    configuration = throughput.Configuration(f"python:{PLANTED}:small", "", 1, plan, "cpu")
    *_, found = throughput.measure(configuration, tmp_path)
    assert (found["kind"], found["verdict"]) == ("failure", "failed")
    assert found["reason"].startswith("candidate: more work a second than the machine can do")
    assert found["raw"][0]["rounds"]


@pytest.mark.parametrize("reference", ["", f"python:{PLANTED}:small"])
def test_a_model_whose_outputs_are_not_finite_is_not_timed(tmp_path, reference):
    plan = timing.TimingConfig(dtype="float32", processes=1, pair_s=0.1, block_s=0.01)
    name = f"python:{PLANTED}:undefined"
    configuration = throughput.Configuration(name, reference, 1, plan, "cpu")
    with pytest.raises(ValueError, match="undefined gives outputs that are not finite"):
        next(throughput.measure(configuration, tmp_path))


@pytest.mark.slow
def test_times_are_kept_where_the_last_peak_cant_be_measured(tmp_path, monkeypatch):
    asked = tmp_path / "work" / "configuration.json"
    real, calls = peak.peak, []

    def fails(*given):
        calls.append(given)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return real(*given)

    def here(command, *_, **__):
        try:
            throughput.child(Path(command[-1]))
        except RuntimeError as error:
            return 1, str(error)
        return 0, ""

    monkeypatch.setattr(throughput.peak, "peak", fails)
    monkeypatch.setattr(worker, "run_limited", here)
    plan = timing.TimingConfig(dtype="float32", processes=1, pair_s=0.1, block_s=0.01)
    configuration = throughput.Configuration(f"python:{PLANTED}:small", "", 1, plan, "cpu")
    kind, found = throughput.timed(configuration, asked.parent)
    assert kind == "speed"
    assert found["reason"].endswith("no utilisation: out of memory")  # after what others disturbed
    assert found["images_per_s"]["candidate"]["median"] > 0
    assert found["utilisation"] == {}


@pytest.mark.campaign
def test_four_that_fail_do_not_stop_the_others(tmp_path, record):
    reference = f"python:{PLANTED}:small"
    models = ["crash", "others_names", "hang", "same", "hungry", "deep", "wrong", "wide"]
    rows = run(tmp_path, models, "--reference", reference, "--limit-s", "90", "--limit-gib", "3")
    said = {row["candidate"].rpartition(":")[2]: row for row in rows}
    assert list(said) == models
    reasons = {name: row.get("reason", "") for name, row in said.items()}
    assert "the kernel is broken" in reasons["crash"]
    assert "took longer than 90 s" in reasons["hang"]
    assert "GiB of memory, more than 3" in reasons["hungry"]
    assert said["wrong"]["verdict"] == "not equal"
    assert "images_per_s" not in said["wrong"]
    good = [name for name, row in said.items() if row["kind"] == "speed"]
    record("a matrix with a crash, a hang, too much memory, a wrong output", trials=8,
           passed=4 + len(good))  # fmt: skip
    assert good == ["others_names", "same", "deep", "wide"]
    assert not machine.descendants(os.getpid())  # nothing is left running


def test_the_best_batch_is_found_up_to_what_fits(tmp_path, monkeypatch):
    rates = {1: 10.0, 2: 30.0, 4: 20.0}

    def task(tasks, name, process, cache):
        assert (tmp_path / "probe" / "reference.pt").exists()
        images = len(torch.load(tmp_path / "probe" / "example.pt"))
        return {"images_per_s": rates[images]} if images in rates else {"failure": "out of memory"}

    monkeypatch.setattr(worker.Tasks, "run", task)
    model = peers.make(f"python:{PLANTED}:small")
    found = throughput.best_batch(
        model, model, timing.TimingConfig(), tmp_path, torch.device("cpu")
    )
    assert found == (2, {"1": 10.0, "2": 30.0, "4": 20.0, "8": "out of memory"})
    monkeypatch.setattr(worker.Tasks, "run", lambda *_, **__: {"failure": "a crash"})
    with pytest.raises(ValueError, match="not one image can be timed: a crash"):
        throughput.best_batch(None, model, timing.TimingConfig(), tmp_path, torch.device("cpu"))


def test_the_best_batch_of_what_cant_be_pickled_is_refused(tmp_path):
    model = peers.make(f"python:{PLANTED}:small")
    model.module.anything = lambda: None
    with pytest.raises(ValueError, match="batch = 'auto' needs models that can be pickled"):
        throughput.best_batch(None, model, timing.TimingConfig(), tmp_path, torch.device("cpu"))


@pytest.mark.slow
def test_a_training_step_of_the_best_batch_is_timed_beside_a_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "AUTO_MOST", 2)
    plan = timing.TimingConfig(mode="training", dtype="float32", processes=1, pair_s=0.1, block_s=0.01,
                       warm_up_s=0.1, details=True, limit_gib=20.0)  # fmt: skip
    names = (f"python:{PLANTED}:{name}" for name in ("same", "small"))
    *_, found = throughput.measure(throughput.Configuration(*names, 0, plan, "cpu"), tmp_path)
    assert found["kind"] == "speed"
    assert set(found["batches_tried"]) == {"1", "2"}
    tried = found["batches_tried"]
    assert tried[str(found["batch"])] == max(tried.values())
    assert 15 < found["plan"]["limit_gib"] < 20
    assert all(found["phases"][side]["backward"] > 0 for side in ("reference", "candidate"))


def test_what_looks_for_a_batch_has_what_is_left_of_the_limit(monkeypatch):
    monkeypatch.setattr(machine, "tree_mib", lambda _: 3 * 2**10)
    assert throughput.room_gib(timing.TimingConfig(limit_gib=10.0)) == 7
    with pytest.raises(ValueError, match=r"limit_gib = 2 is less than the 3\.0 before"):
        throughput.room_gib(timing.TimingConfig(limit_gib=2.0))


def test_most_of_the_machines_memory_is_the_limit_if_none_is_given(monkeypatch):
    monkeypatch.setattr(machine, "memory_gib", lambda: 10.0)
    for given, limit in ((0.0, 8.0), (3.0, 3.0)):
        settings = throughput.Settings(models=("vitx:Ti/16",), dtype=("float32",), limit_gib=given)
        (found,) = throughput.configurations(settings)
        assert found.plan.limit_gib == limit


def test_a_model_with_batch_norm_is_counted_and_its_step_has_phases():
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8))
    model = peers.Model("python:x:f", module, (3, 4, 4), 1, None)
    plan = timing.TimingConfig(mode="training", dtype="float32")
    image = torch.randn(4, 3, 4, 4)
    assert throughput._work(model, image, plan).flops == 2 * 2 * 48 * 8
    found = breakdown.phases(module, image, timing.step_config(4, plan))
    assert set(found) == {"forward", "backward", "optimizer"}


def test_a_gpu_without_bfloat16_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old GPU")
    throughput._check_dtype("float16", torch.device("cuda"))
    throughput._check_dtype("bfloat16", torch.device("cpu"))
    with pytest.raises(ValueError, match="dtype = 'bfloat16': an old GPU has no bfloat16"):
        throughput._check_dtype("bfloat16", torch.device("cuda"))


def test_a_folder_of_transformers_and_lucidrains_vit_give_logits(tmp_path):
    small = _shrunk("hf:Ti/32")
    small.module.model.save_pretrained(tmp_path)
    found = peers.make(f"hf:{tmp_path}")
    image = torch.randn(2, *found.image)
    assert (found.image, found.depth) == ((3, 64, 64), 2)
    torch.testing.assert_close(found.module.eval()(image), small.module.eval()(image))
    other = _shrunk("vit_pytorch:Ti/32")
    assert other.module(image).shape == (2, 5)
    assert peers.conversion(other, found) is None
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"model_type": "vit"', '"model_type": "deit"'))
    with pytest.raises(ValueError, match=r"config\.json is of a model 'deit', not 'vit'"):
        peers.check(f"hf:{tmp_path}")
    for text in ("[]", '{"model_type": '):
        config.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json can't be read"):
            peers.check(f"hf:{tmp_path}")


def test_torchvisions_models_are_known_by_its_names_too():
    made = peers.make("torchvision:vit_b_32")
    assert (made.image, made.depth) == ((3, 224, 224), 12)
    assert made.module.hidden_dim == 768
    with pytest.raises(ValueError, match=r"'torchvision:vit_s_16' is not known; .*vit_b_16"):
        peers.check("torchvision:vit_s_16")


@pytest.mark.parametrize("name", ["torchvision:Ti/32", "hf:Ti/32", "vitx:Ti/32"])
def test_a_peers_weights_are_made_from_timms(name):
    # The names are those of every size.
    reference = peers.Model("timm", _small_timm(), (3, 64, 64), 2, None)
    candidate = _shrunk(name)
    keys = peers.conversion(reference, candidate)
    found = equality(reference.module, candidate.module, torch.randn(2, 3, 64, 64), keys=keys)
    assert found.passed, found.reason
    assert found.parameters_reference == found.parameters_candidate


def _small_timm() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=64, patch_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )


def _shrunk(name: str) -> peers.Model:
    """A peer's model in a size for tests."""
    small = ModelConfig(image=64, patch=32, width=24, depth=2, heads=3, classes=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "size", lambda _: small)
        patch.setattr(peers, "check", lambda _: None)
        return peers.make(name)


def test_utilisation_is_shown_beside_the_peak():
    used = row()["utilisation"]["candidate"]
    assert matrix._utilisation([used]) == ("45%", "2 to 2.1")
    unsteady = used | {"mfu": None, "why": "unsteady", "data_sheet": 989e12}
    assert matrix._utilisation([unsteady]) == ("unsteady", "2 to 2.1, data sheet 989")
    said = matrix._utilisation([unsteady, used | {"mfu": 0.5}, used | {"mfu": 0.4}])
    assert said == ("45% (40% to 50%), 2 of 3 runs steady", "2 to 2.1")


def row(model="vitx:S/16", batch=8, rate=100.0, threads=2, ratio=1.1, **more) -> dict:
    """A row of a model beside timm's, which has 100 images/s."""

    def side(rate):
        return {"median": rate, "low": rate * 0.9, "high": rate * 1.1, "mean": rate,
                "mean_low": rate * 0.95, "mean_high": rate * 1.05}  # fmt: skip

    def used(rate):
        return {"flops": 9.2e9 * rate, "peak_low": 2e12, "peak_high": 2.1e12, "bandwidth": 2e10,
                "bytes": 3e7 * rate, "mfu": 0.45, "why": ""}  # fmt: skip

    quantile = {"value": 0.01, "low": 0.009, "high": 0.011}
    logs, again = ([middle - 0.01, middle, middle + 0.01] for middle in (math.log(ratio), 0.0))
    found, floor = stats.paired_ratio(logs), stats.noise_floor(again)
    return {
        "schema": 1, "kind": "speed", "id": f"2026-11-22T00:00:00Z-{batch}", "what": "throughput",
        "candidate": model, "reference": "timm:vit_small_patch16_224", "mode": "inference",
        "batch": batch, "batch_asked": str(batch), "dtype": "float32", "compile": "none",
        "device": "cpu", "plan": vars(timing.TimingConfig()), "protocol": "0123456789",
        "images_per_s": {"reference": side(100.0), "candidate": side(rate)}, "checked": "checked",
        "equality": {"passed": True},
        "ratio": found.value, "ratio_low": found.low, "ratio_high": found.high,
        "log_ratios": logs, "log_ratios_again": again, "noise_floor": floor,
        "verdict": stats.speed_verdict(found, floor),
        "macs": {"reference": 4.6e9, "candidate": 4.3e9},
        "parameters": {"reference": 22_000_000, "candidate": 22_000_000},
        "peak_mib": {"reference": 310.0, "candidate": 300.0},
        "compile_s": {"reference": None, "candidate": None}, "reason": "",
        "utilisation": {"reference": used(100.0), "candidate": used(rate)},
        "stages": both(dict.fromkeys(breakdown.STAGES, 0.01)),
        "processes": 3,
        "latency": {"candidate": {"calls": 300, "p50": quantile, "p90": quantile, "p99": quantile}},
        "phases": {}, "raw": [[1, 2, 3]],
        "environment": provenance.environment() | {"threads": threads, "dirty": False},
    } | more  # fmt: skip


def both(found) -> dict:
    return {side: found for side in matrix.SIDES}


def compiled(rate=150.0, cold=60.0, **more) -> dict:
    seconds = {"cold": cold, "warm": 20.0}
    return row(rate=rate, compile="default", compile_s={"candidate": seconds}, **more)


def test_tables_and_figures_come_from_rows(tmp_path):
    failed = row(batch=64) | {"kind": "failure", "verdict": "failed", "reason": "no memory"}
    paths = charts.write([row(), row(batch=1), compiled(), failed], tmp_path)
    names = {path.name for path in paths}
    assert {"throughput-settings.md", "throughput-ratios.md", "throughput.md", "latency.md",
            "stages.csv", "throughput-costs.csv"} <= names  # fmt: skip
    drawn = {name.partition("-timm-vit_small_patch16_224-inference-float32-")[0]
             for name in names if name.endswith(".svg")}  # fmt: skip
    assert drawn == set(charts.DRAWN)
    table = (tmp_path / "throughput.md").read_text()
    assert "100.0 (95.0 to 105.0, within a run)" in table
    assert "110.0 (107.3 to 112.8)" in table
    assert "failed: no memory" in table
    with (tmp_path / "measurements.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["side"] for line in lines] == ["reference", "candidate"] * 3 + ["candidate"]
    assert float(lines[1]["images_per_s_mean_low"]) == 95
    assert float(lines[5]["compile_s_cold"]) == 60
    assert lines[6]["reason"] == "no memory"


def test_models_stand_below_their_reference_from_the_fastest_to_those_that_failed():
    failed = row("hf:S/16") | {"kind": "failure", "verdict": "failed", "reason": "no memory"}
    rows = [row("torchvision:S/16", ratio=0.9), failed, row("vitx:S/16", ratio=1.2), row(batch=1)]
    body = matrix.throughput_table(rows).body
    batch, name = (matrix.START.index(word) for word in ("batch", "model"))
    assert [(line[batch], line[name].partition(":")[0]) for line in body] == [
        ("1", "timm"), ("1", "vitx"),
        ("8", "timm"), ("8", "vitx"), ("8", "torchvision"), ("8", "hf"),
    ]  # fmt: skip


def test_ratios_stand_side_by_side_for_each_batch_and_compile_mode():
    wrong = row("hf:S/16") | {"kind": "failure", "verdict": "not equal", "reason": "off"}
    other = row("vit_pytorch:S/16", checked="not checked: other weights")
    table = matrix.summary_table([row(batch=1), row(), compiled(), wrong, other])
    assert table.header[5:] == ("batch 1, eager", "batch 8, eager", "batch 8, compiled")
    lines = {line[4].partition(" ")[0]: line[5:] for line in table.body}
    assert lines["vitx:S/16"] == ("1.100 (1.073 to 1.128)",) * 3
    assert lines["hf:S/16"] == ("–", "not equal", "–")
    assert lines["vit_pytorch:S/16"] == ("–", "1.100 (1.073 to 1.128), not checked", "–")


def test_a_model_whose_outputs_were_not_checked_gets_no_verdict():
    other = row("vit_pytorch:S/16", checked="not checked: other weights", verdict="inconclusive",
                reason="the machine was disturbed")  # fmt: skip
    _, line = matrix.throughput_table([other]).body
    assert line[-2:] == (
        "not checked, inconclusive: the machine was disturbed", "not checked: other weights"
    )  # fmt: skip
    drawn = charts.figures([other])
    (ratios,) = (figure for name, figure in drawn.items() if name.startswith("ratios"))
    (label,) = ratios.axes[0].get_yticklabels()
    assert label.get_text().endswith("not checked, 0.935× the MACs, inconclusive")
    assert "faster" not in throughput.line(other | {"verdict": "faster"})


def test_compiling_pays_only_where_it_is_known_to_save():
    def line(low, value, high, **more):
        saved = {"pairs": 200, "value": value, "low": low, "high": high}
        *_, found = matrix.break_even_table(
            [row(), compiled(saved={"candidate": saved} | more)]
        ).body
        return found[6:]

    assert line(0.002, 0.004, 0.005) == (
        "+4.000 (+2.000 to +5.000)",
        "15,000 (12,000 to 30,000)",
        "5,000 (4,000 to 10,000)",
    )
    assert line(-0.001, 0.004, 0.005)[1:] == ("not told apart", "not told apart")
    assert line(-0.003, -0.002, -0.001)[1:] == ("never", "never")
    assert not matrix.break_even_table([row(), compiled()]).body


def test_a_reference_that_was_timed_with_every_model_is_one_line_of_its_readings():
    """Its rate at the geometric mean, between the lowest and the highest."""
    rows = [row("vitx:S/16"), row("hf:S/16", ratio=0.8)]
    for found, rate in zip(rows, (100.0, 121.0), strict=True):
        found["images_per_s"]["reference"] = {"median": rate, "low": rate - 1, "high": rate + 1,
                                              "mean": rate, "mean_low": rate - 1,
                                              "mean_high": rate + 1}  # fmt: skip
        found["peak_mib"]["reference"] = rate
    reference, vitx, hf = matrix.entries(rows)
    assert (reference.side, len(reference.rows)) == ("reference", 2)
    assert reference.rate() == (pytest.approx(110), 100, 121)
    (line, *_) = matrix.throughput_table(rows).body
    assert line[6:] == ("110.0 (100.0 to 121.0)", "–", "–", "–", "reference, 2 runs", "–")
    (line, *_) = matrix.cost_table(rows).body
    assert line[8] == "110 (100 to 121)"
    # Models of different runs are compared by their ratios to it.
    for entry, ratio in ((vitx, 1.1), (hf, 0.8)):
        assert entry.rate()[0] == pytest.approx(110 * ratio)
        assert entry.rate()[1] == pytest.approx(110 * entry.row["ratio_low"])
    alike = [row("vitx:S/16"), row("hf:S/16")]  # whose mean is their rate but for rounding
    assert matrix.entries(alike)[0].rate() == (100, 100, 100)
    assert charts.figures(alike)


def test_a_references_compiling_is_counted_beside_whatever_model_it_was_timed():
    seconds = both({"cold": 60.0, "warm": 20.0})
    saved = both({"pairs": 200, "value": 0.004, "low": 0.002, "high": 0.005})
    rows = [row("vitx:S/16"), row("hf:S/16"), compiled() | {"compile_s": seconds, "saved": saved}]
    assert [line[5].partition(":")[0] for line in matrix.break_even_table(rows).body] == [
        "timm", "vitx",
    ]  # fmt: skip


def test_figures_of_two_versions_of_a_reference_are_two():
    older = row(reference="hf:S/16")
    versions = older["environment"]["versions"] | {"transformers": "0.1"}
    older["environment"] = older["environment"] | {"versions": versions}
    drawn = charts.figures([older, row(reference="hf:S/16")])
    assert len([name for name in drawn if name.startswith("ratios")]) == 2


def test_every_model_has_a_colour_of_its_own():
    names = ["timm:a", "vitx:a", "vitx:b", *(f"python:f:{number}" for number in range(15))]
    colours = plots.colours(names)
    assert len(set(colours.values())) == len(names)
    assert colours["vitx:a"] == pictures.COLOURS["vitx"]


def test_the_best_batch_that_was_found_later_replaces_an_earlier_one():
    found = [row(batch=batch, batch_asked="auto") for batch in (8, 16)]
    (cell,) = matrix.cells(found)
    assert cell["batch"] == 16
    *_, line = matrix.throughput_table(found).body
    assert line[matrix.START.index("batch")] == "16 (auto)"
    assert len(matrix.cells([*found, row(batch=16)])) == 2


def test_what_belongs_to_no_stage_is_marked_where_it_is_much():
    parts = dict.fromkeys(breakdown.STAGES, 0.0) | {"mlp": 0.9, "remainder": 0.1}
    few = parts | {"mlp": 0.98, "remainder": 0.02}
    _, line = matrix.stage_table([row(stages={"reference": few, "candidate": parts})]).body
    assert line[-1] == "10.0%, above 5%"
    found = row("hf:S/16", stages={"reference": few, "candidate": None})
    reference, other = matrix.stage_table([found]).body
    assert reference[-1] == "2.0%"
    assert other[6] == "its modules do not have timm's names"


def test_a_mean_stands_beside_the_rate_of_the_same_run():
    """Also where only some runs of a reference have one."""
    means = {"mean_images_per_s": both(90.0)}
    rows = [row("vitx:S/16"), row("hf:S/16", ratio=0.8, **means)]
    reference, candidate = matrix.mean_table(rows).body
    assert (reference[-3:], candidate[5][:7]) == (
        ("100.0", "90.0", "-10.0%"),
        "hf:S/16",
    )


def test_rows_that_cant_be_shown_are_not_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(render, "READMES", ())
    run = tmp_path / "20261129-000000-full"
    run.mkdir()
    (run / "rows.jsonl").write_text(json.dumps(row() | {"images_per_s": None}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl row 1 is a throughput row without"):
        render.main(["--keep", str(run)])
    (run / "rows.jsonl").write_text(json.dumps(row(checked="checked")) + "\n")

    other = tmp_path / "other" / run.name
    other.mkdir(parents=True)
    (other / "rows.jsonl").write_text((run / "rows.jsonl").read_text())
    with pytest.raises(ValueError, match="two of the folders to keep are called 20261129-000000"):
        render.main(["--keep", str(run), str(other)])
    (other / "rows.jsonl").write_text(json.dumps(row(environment={"cpu": "a"})) + "\n")
    changed = other.rename(tmp_path / "changed")
    with pytest.raises(ValueError, match="without environment"):
        render.main(["--keep", str(run), str(changed)])
    with pytest.raises(ValueError, match="--out goes with --files"):
        render.main(["--out", str(tmp_path)])
    with pytest.raises(ValueError, match="--out does not go with --pack"):
        render.main([str(run / "rows.jsonl"), "--pack", "x", "--out", str(tmp_path)])
    monkeypatch.setattr(render, "speed_figure", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        render.main(["--keep", str(run)])
    assert not (tmp_path / "results").exists()


def test_rows_of_other_threads_never_replace_each_other():
    rows = [row("vitx:a", threads=threads, keep_memory=True) for threads in (2, 1)]
    for made in rows:
        del made["what"]
        made["environment"] |= {"cores": 2}
    assert len(render.speed_rows(rows)) == 2
    assert [pages.machine(made).endswith("1 thread)") for made in rows] == [False, True]


def test_figures_of_rows_that_were_replaced_are_removed(tmp_path, monkeypatch):
    bar = plots.Bar("a", 1.1, 1.0, 1.2)
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    monkeypatch.setattr(render, "FIGURE", tmp_path / "speed.svg")
    monkeypatch.setattr(render, "READMES", (tmp_path / "README.md",))
    monkeypatch.setattr(render, "speed_figure", lambda _: plots.ratios([bar], title=""))
    (tmp_path / "README.md").write_text("a\n<!-- figures -->\n<!-- end -->\nb\n")
    (tmp_path / "throughput-old.svg").write_text("")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row()) + "\n")
    render.main([])
    drawn = {path.stem for path in tmp_path.glob("*.svg")}
    assert len(drawn) == 1 + len(charts.DRAWN)
    text = (tmp_path / "README.md").read_text()
    assert {name for name in drawn if f"](results/{name}.svg)" in text} == drawn - {"speed"}
    assert text.startswith("a\n")
    assert text.endswith("<!-- end -->\nb\n")


def test_rows_of_other_settings_are_never_ranked_together():
    bound = row()
    bound["environment"] |= {"affinity": 0}
    newer = row()
    newer["environment"] |= {"versions": newer["environment"]["versions"] | {"timm": "9.0"}}
    slow = row(plan=vars(timing.TimingConfig(pair_s=1.0)))
    other = row(protocol="other")
    rows = [row(), row(), bound, newer, slow, other, row(origin="a"), row(origin="b")]
    assert len(matrix.cells(rows)) == 7
    rows = [row(), row(threads=1, rate=60.0)]
    table = matrix.throughput_table(rows)
    settings = [line[0] for line in matrix.settings_table(rows).body]
    assert len(settings) == 2
    assert [line[0] for line in table.body] == [settings[0]] * 2 + [settings[1]] * 2
    assert len([name for name in charts.figures(rows) if name.startswith("ratios")]) == 2


def test_a_pack_holds_rows_without_places(tmp_path, monkeypatch):
    path = tmp_path / "rows.pack"
    monkeypatch.setattr(pack.socket, "gethostname", lambda: "somehost")
    placed = row(
        model="hf:/home/someone/weights",
        reference="python:clients/someone/model.py:make",
        reason="on somehost no file '/home/someone/x.pt', -I/home/someone/include",
    )
    pack.write([placed], path)
    assert path.stat().st_size < pack.LIMIT
    (found,) = pack.read(path)
    assert "someone" not in json.dumps(found)
    assert "somehost" not in json.dumps(found)
    assert found["candidate"] == "hf:weights"
    assert found["reference"] == "python:model.py:make"
    for text, left in (
        ("vitx:S/16 and hf:Ti/16", "vitx:S/16 and hf:Ti/16"),
        ("hf:/scratch/alice/1000", "hf:1000"),
        ("no '/data/Project X/secret/f.pt'", "no 'f.pt'"),
        (r"C:\data\secret\f.pt", "C:f.pt"),
        ("~/secret/runs/", "runs"),
    ):
        assert pack._without_places(text) == left
    assert "raw" not in found
    assert "command" not in found["environment"]
    assert matrix.throughput_table([found]).body[0][6] == "100.0 (95.0 to 105.0, within a run)"
    with pytest.raises(ValueError, match=r"rows of rows [0-9a-f]{6} were packed before"):
        pack.write([found], tmp_path / "again.pack")


def test_models_of_one_name_in_two_folders_stay_two(tmp_path):
    path = tmp_path / "rows.pack"
    pack.write([row(f"hf:/{place}/weights") for place in ("a", "b", "a")], path)
    names = [found["candidate"] for found in pack.read(path)]
    assert names == ["hf:weights", "hf:weights (2)", "hf:weights"]


def test_a_persons_name_is_no_part_of_other_words(tmp_path, monkeypatch):
    for name in ("tim", "max"):
        monkeypatch.setenv("USER", name)
        pack._secrets.cache_clear()
        path = tmp_path / f"{name}.pack"
        pack.write([row(compile="max-autotune", reason=f"by {name}")], path)
        (found,) = pack.read(path)
        assert found["reference"] == "timm:vit_small_patch16_224"
        assert found["compile"] == "max-autotune"
        assert found["reason"] == "by …"
        assert re.fullmatch(rf"{name} [0-9a-f]{{6}}", found["origin"])
        assert re.search(
            rf"sent as {name} [0-9a-f]{{6}}, commit [0-9a-f]{{7}}", matrix.setting(found)
        )
    pack._secrets.cache_clear()
    unknown = {"getpwuid": lambda _: {}["no such user"]}  # as in containers
    monkeypatch.setattr(pack, "pwd", types.SimpleNamespace(**unknown))
    assert str(Path.home()) in pack._secrets()
    pack._secrets.cache_clear()


@pytest.mark.parametrize("name", ["candidate", "macs", "environment"])
def test_a_row_without_what_is_shown_is_refused_by_name(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    odd = {key: value for key, value in row().items() if key != name or name == "environment"}
    if name == "environment":
        odd["environment"] = {}
    path.write_text(json.dumps(odd) + "\n")
    with pytest.raises(ValueError, match=rf"row 1 is (a throughput|no whole) row.*{name}"):
        render.main([str(path), "--out", str(tmp_path / "out")])
    path.write_text("")
    with pytest.raises(ValueError, match="holds no row that a table shows"):
        render.main([str(path), "--out", str(tmp_path / "out")])


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with_by_the_same_code_alone(tmp_path, monkeypatch):
    """Killed within its first configuration, and while a row was written."""
    real = throughput.timed

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(throughput, "timed", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ["small"])
    monkeypatch.setattr(throughput, "timed", real)
    (folder,) = tmp_path.glob("throughput/*")
    assert not (folder / "rows.jsonl").exists()
    (row,) = run(tmp_path, ["small"], "--resume")
    path = folder / "rows.jsonl"
    path.write_text(path.read_text() + '{"schema": 1, "ki')
    assert run(tmp_path, ["small"], "--resume") == [row]
    assert list(tmp_path.glob("throughput/*")) == [folder]
    monkeypatch.setattr(timing, "PROTOCOL", 0)
    with pytest.raises(ValueError, match="holds no run of these settings and versions to resume"):
        run(tmp_path, ["small"], "--resume")


def test_what_stands_beside_a_persons_model_is_its_code_too(tmp_path):
    model, beside = tmp_path / "mine.py", tmp_path / "layers.py"
    model.write_text("import layers\n")
    found = []
    for text in ("print 'of another time'", "print 'of today'"):
        beside.write_text(text)
        found.append(throughput.versions([f"python:{model}:make", "vitx:Ti/16"]))
    assert len(set(found)) == 2
    assert throughput.versions([f"python:{model}:make"]) == found[1]


def test_undefined_numbers_pass_nowhere():
    nan = math.nan
    assert not check.apart([1.0, nan, 1.0], [1.0, 1.0, 1.0]) <= check.BAND


def test_a_pack_that_was_changed_is_refused(tmp_path):
    path = tmp_path / "rows.pack"
    pack.write([row()], path)
    said = json.loads(gzip.decompress(path.read_bytes()))
    said["rows"][0]["images_per_s"]["candidate"]["mean"] = 1e6
    path.write_bytes(gzip.compress(json.dumps(said).encode()))
    with pytest.raises(ValueError, match=r"rows\.pack does not fit its checksum"):
        pack.read(path)
    path.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ValueError, match=r"rows\.pack is no file of packed rows"):
        pack.read(path)
    for text in (b"[" * 10**6, b'{"rows": NaN}', b" " * (pack.MOST + 1)):
        path.write_bytes(gzip.compress(text))
        with pytest.raises(ValueError, match=r"rows\.pack can't be unpacked"):
            pack.read(path)
    path.write_bytes(gzip.compress(b"") + b"x" * pack.LIMIT)
    with pytest.raises(ValueError, match=r"rows\.pack is larger than the 200 KiB"):
        pack.read(path)
    path.unlink()
    pack.write([row()], path)
    with pytest.raises(FileExistsError):  # nothing is written over
        pack.write([row()], path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.pack can't be unpacked"):
        pack.read(path)
    path.write_text('{"kind": "speed"}\n')
    with pytest.raises(ValueError, match=r"rows\.pack line 1 is not a row of schema 1"):
        render.main([str(path)])
    with pytest.raises(ValueError, match="is no file of rows"):
        render.main([str(tmp_path / "absent")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_s": None}, "without images_per_s"),
        ({"candidate": 5}, "no whole row of kind speed"),
        ({"compile_s": {"candidate": 5.0}}, "no whole row of kind speed"),
        ({"latency": {"candidate": {"calls": 3}}}, "no whole row of kind speed"),
        ({"stages": {"candidate": {"attention": 1.0}}}, "no whole row of kind speed"),
        ({"kind": "failure", "reason": None, "verdict": "failed"}, None),
        ({"verdict": "slower"}, "ratio, floor and verdict are not those of its processes"),
        ({"ratio_low": 1.09}, "ratio, floor and verdict are not those of its processes"),
        ({"log_ratios": [1000.0, 1001.0]}, "no whole row of kind speed"),
        ({"noise_floor": 0.0}, "ratio, floor and verdict are not those of its processes"),
        ({"ratio_low": None, "verdict": "faster"}, "'faster' without an interval"),
        ({"processes": 10}, "processes = 10 of 3 ratios"),
        ({"peak_mib": both(-1)}, "reference = -1"),
        ({"stages": both(dict.fromkeys(breakdown.STAGES, -0.01))}, "patchify = -0.01"),
        ({"saved": both({"pairs": 3, "value": 1, "low": 2, "high": 3})}, "saved: 2, 1, 3"),
        ({"equality": None}, "no whole row of kind speed"),
        ({"equality": {"passed": False}}, "its outputs were not checked"),
        ({"what": "trial", "trial": 3, "share": 0.0, "verdict": "slower"}, "not those of its"),
        ({"what": "trial", "trial": 3, "share": 0.0, "log_ratios": None}, "no whole row"),
        ({"what": "trial", "trial": 3, "share": 0.5}, "no trial 3 of 0.5"),
        ({"what": "gate", "ratio": 2.0}, "ratio, floor and verdict are not those"),
        ({"kind": "noise"}, "kind = 'noise'"),
        ({"mode": "/../../out"}, "mode = '/../../out'"),
        ({"batch": 8.0}, "no whole row of kind speed"),
        ({"batch": True}, "no whole row of kind speed"),
        ({"batch": 0}, "no whole row of kind speed"),
        ({"peak_mib": {"candidate": "many"}}, "no whole row of kind speed"),
        ({"images_per_s": both({"median": 3.0, "low": 2.0, "high": 1.0})}, "not in order"),
        ({"images_per_s": both({"median": 0.0, "low": 0.0, "high": 0.0})}, "not in order"),
    ],
)
def test_a_row_that_cant_be_or_claims_too_much_is_refused_packed_or_not(tmp_path, changes, message):
    """With a right checksum too, which anyone can make."""
    packed, plain = tmp_path / "rows.pack", tmp_path / "rows.jsonl"
    pack.write([row() | changes], packed)
    plain.write_text(json.dumps(row() | changes) + "\n")
    for path in (packed, plain):
        if message is None:
            assert len(pack.read(path)) == 1
        else:
            with pytest.raises(ValueError, match=rf"row 1 is .*{message}"):
                pack.read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "slower"}, "are not those of its processes"),
        ({"batch": -1}, "batch = -1"),
        ({"macs": both(-1)}, "macs_reference = -1"),
        ({"kind": "equality", "verdict": "equal", "equality": {"passed": True,
          "output_error": "nan", "gradient_error": 0.0}}, "said to be equal is not"),
        ({"kind": "accuracy", "seeds": 3, "reference_values": [0.9, 0.8, 0.7], "low": -0.1,
          "candidate_values": [0.7, 0.8, 0.9], "margin": 0.01, "difference": 0.0, "high": 0.1,
          "p_equivalence": 0.01, "verdict": "equivalent"}, "not that of its values"),
    ],
)  # fmt: skip
def test_a_row_of_the_main_job_claims_no_more_than_its_values(tmp_path, changes, message):
    made = {k: v for k, v in row().items() if k != "what"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(made) + "\n")
    assert len(pack.read(path)) == 1
    path.write_text(json.dumps(made | changes) + "\n")
    with pytest.raises(ValueError, match=f"row 1 is no whole row of kind .*{message}"):
        pack.read(path)


def test_two_packs_of_one_name_never_rank_together(tmp_path):
    paths = [tmp_path / name / "rows.pack" for name in "ab"]
    for path, rate in zip(paths, (100.0, 50.0), strict=True):
        path.parent.mkdir()
        pack.write([row(rate=rate)], path)
    given = [one for path in paths for one in pack.read(path)]
    rows = [*given, row()]
    assert len(matrix.settings_table(rows).body) == 3
    assert len({line[0] for line in matrix.throughput_table(rows).body}) == 3
    assert len([name for name in charts.figures(rows) if name.startswith("ratios")]) == 3


def test_two_processors_in_one_pack_never_rank_together(tmp_path):
    rows = [row(rate=rate) for rate in (100.0, 50.0)]
    for found, number in zip(rows, ("25/1/1", "26/2/1"), strict=True):
        found["environment"] |= {"cpu_id": number}
    pack.write(rows, tmp_path / "rows.pack")
    lines = matrix.settings_table(pack.read(tmp_path / "rows.pack")).body
    assert " 25/1/1, " in lines[0][-1]
    assert " 26/2/1, " in lines[1][-1]


def test_numbers_that_json_has_not_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(macs={"candidate": math.inf})) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl line 1 is not JSON"):
        read(path)
    path.write_text('{"schema": 1, "kind": ' + "[" * 10**5 + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl line 1 is not JSON"):
        read(path)


def test_a_row_is_refused_or_can_be_shown_and_drawn(tmp_path):
    """Whatever one of its values was changed to."""
    draws = random.Random(0)
    others = (None, -1, 0, 1e300, "text", [], {}, True)
    refused = []
    for number in range(100):
        changed = deepcopy(row())
        place, key = draws.choice(list(_places(changed)))
        place[key] = draws.choice(others)
        if number % 4 == 0:
            del place[key]
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(changed) + "\n")
        try:
            rows = render.read(path)
        except ValueError as error:
            refused.append(str(error))
        else:
            for name, table in render.TABLES.items():
                assert isinstance(table(rows).markdown(), str), name
            charts.figures(rows)
    assert 30 < len(refused) < 90
    assert all("row 1 is" in said or "line 1 is" in said for said in refused)


def _places(value):
    """Every dictionary within a value, with each of its keys."""
    for key, each in value.items():
        yield value, key
        if isinstance(each, dict) and key != "environment":
            yield from _places(each)


def test_a_packed_file_adds_a_column_to_the_verdicts(tmp_path, capsys):
    """Also where it is of the same kind of machine, with rows of the main job."""
    ones = both(1.0)
    kept = {"candidate": "vitx:from_timm(a)", "reference": "timm:vit_tiny_patch16_224",
            "keep_memory": True, "page_faults": ones, "macs": ones, "peak_mib": ones}  # fmt: skip
    ours = {k: v for k, v in row().items() if k != "what"} | kept
    plain, packed = tmp_path / "rows.jsonl", tmp_path / "theirs.pack"
    plain.write_text(json.dumps(ours) + "\n")
    render.main([str(plain), "--pack", str(packed)])
    with pytest.raises(FileExistsError):
        render.main([str(plain), "--pack", str(packed)])
    render.main([str(plain), str(packed), "--out", str(tmp_path / "shown")])
    names = {Path(line).name for line in capsys.readouterr().out.splitlines()[1:]}
    assert {"headline.md", "speed.csv", "cost.md", "speed.svg"} <= names
    header, _, line = (tmp_path / "shown" / "headline.md").read_text().splitlines()
    assert header.count("cores)") == 2
    assert header.count("sent as theirs") == 1
    assert line.count("ViT-Ti/16, batch 8: 1.100 (") == 2
    both_files = [*render.read(plain), *render.read(packed)]
    assert len(render.speed_table(both_files).body) == 2
    (axes,) = render.speed_figure(both_files).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert sum("sent as theirs" in label for label in labels) == 1
    assert all("cores" in label for label in labels)


def test_what_went_wrong_can_be_shown_and_sent(tmp_path):
    """An equality check that found no number; a failure has no figure."""
    equal = {"output_error": "nan", "gradient_error": 1e-9, "gradients": 3,
             "parameters_candidate": 10}  # fmt: skip
    wrong = row(verdict="not equal", equality=equal, what="") | {"kind": "equality"}
    failed = {k: v for k, v in row(candidate="vitx:a").items() if k != "what"} | {
        "kind": "failure", "verdict": "failed", "ratio": None, "images_per_s": {}
    }  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(wrong)}\n{json.dumps(failed)}\n")
    render.main([str(path), "--pack", str(tmp_path / "rows.pack")])
    render.main([str(tmp_path / "rows.pack"), "--out", str(tmp_path / "shown")])
    assert "| nan | 1e-09 |" in (tmp_path / "shown" / "equality.md").read_text()
    assert "largest relative error inf" in (tmp_path / "shown" / "headline.md").read_text()
    assert not (tmp_path / "shown" / "speed.svg").exists()


def test_a_file_of_rows_that_no_table_shows_is_said_to_be(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row() | {"kind": "sweep", "what": "else"}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl holds no row that a table shows"):
        render.main([str(path), "--out", str(tmp_path / "shown")])
    path.write_text(json.dumps(row() | {"kind": "equality", "what": ""}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl row 1 is no whole row of kind equality"):
        render.main([str(path), "--out", str(tmp_path / "shown")])


@pytest.mark.slow
def test_too_many_rows_make_no_pack(tmp_path):
    noise = random.Random(0)
    rows = [row(reason=noise.randbytes(2000).hex()) for _ in range(300)]
    with pytest.raises(ValueError, match="more than 200; pack fewer"):
        pack.write(rows, tmp_path / "rows.pack")


def test_the_calibrations_trials_are_fixed_and_each_is_made_once(tmp_path):
    shares = trials.shares()
    assert {share: shares.count(share) for share in set(shares)} == {0.0: 60, 0.03: 30, 0.05: 30}
    assert shares == trials.shares()
    plan, protocol = timing.TimingConfig(), timing.PROTOCOL
    rows = Rows(tmp_path)
    for number, verdict in ((3, "slower"), (7, "no difference seen")):
        rows.add("plant", what="trial", trial=number, share=0.05, plan=vars(plan), device="cpu",
                 reference="timm:vit", batch=2, protocol=protocol, verdict=verdict,
                 forked=worker.forks(torch.device("cpu")), seconds=100.0)  # fmt: skip
    (tmp_path / "committed.jsonl").write_text(rows.path.read_text())
    paths = sorted(tmp_path.glob("*.jsonl"))  # a trial that stands in both counts once
    made = partial(calibration.made, paths, reference="timm:vit", device=torch.device("cpu"))
    found = made(plan, batch=2)
    assert [row["trial"] for row in found] == [3, 7]
    assert made(timing.TimingConfig(processes=9), batch=2) == []
    assert made(plan, batch=8) == []
    (line,) = calibration.table([*found, *rows.kept]).body
    other = rows.kept[0] | {"protocol": 0, "trial": 9}
    assert len(calibration.table([*rows.kept, other]).body) == 2  # never in one rate
    threads = other["environment"] | {"threads": 64}
    assert len(calibration.table([*rows.kept, rows.kept[0] | {"environment": threads}]).body) == 2
    chip = rows.kept[1] | {"environment": rows.kept[1]["environment"] | {"cpu": "another"}}
    lines = calibration.table([rows.kept[0], chip]).body  # each machine's, then all
    assert [line[2] for line in lines] == ["1 of 30", "1 of 30", "2 of 30"]
    assert [line[-1] for line in lines][1:] == [lines[1][-1], "all of these"]
    exact = stats.proportion(1, 2)
    assert line[7] == f"found: 50% ({exact.low:.0%} to {exact.high:.0%})"


def test_a_trials_own_words_find_it_again(tmp_path):
    name, plan, cpu = "vit_tiny_patch16_224", timing.TimingConfig(), torch.device("cpu")
    pair = speed.make_pair(name, batch=2, device=cpu, img_size=32, depth=1)
    rows = Rows(tmp_path)
    rows.add("noise", what="trial", trial=0, plan=vars(plan), protocol=4,
             forked=worker.forks(cpu), **pair.labels)  # fmt: skip
    for batch, found in ((2, 1), (8, 0)):
        made = calibration.made(
            [rows.path], plan, reference=f"timm:{name}", batch=batch, device=cpu
        )
        assert len(made) == found


def test_a_trial_that_was_made_twice_counts_as_it_did_first(tmp_path):
    plan, rows, protocol = timing.TimingConfig(), Rows(tmp_path), timing.PROTOCOL
    for verdict in ("faster", "no difference seen"):
        rows.add("noise", what="trial", trial=3, share=0.0, plan=vars(plan), protocol=protocol,
                 reference="timm:vit", batch=2, device="cpu", verdict=verdict, seconds=100.0,
                 forked=worker.forks(torch.device("cpu")), planted_counted=0.0)  # fmt: skip
    (found,) = calibration.made([rows.path], plan, reference="timm:vit", batch=2,
                                device=torch.device("cpu"))  # fmt: skip
    assert found["verdict"] == "faster"
    (line,) = calibration.table(rows.kept).body
    assert line[:5] == ("nothing", "0.00% to 0.00%", "1 of 60", "0", "1")


def test_the_verdict_table_has_the_rates_of_a_series_that_is_whole(tmp_path):
    rows = Rows(tmp_path)
    for number, share in enumerate(trials.shares()):
        verdict = "slower" if share == 0.05 or number == trials.shares().index(0.0) else "the same"
        rows.add("noise", what="trial", trial=number, share=share, plan={}, protocol=4,
                 reference="timm:vit", batch=2, device="cpu", verdict=verdict)  # fmt: skip
    equal = row() | {"kind": "equality", "verdict": "equal", "device": "cpu",
                     "equality": {"output_error": 0.0, "gradient_error": 0.0}}  # fmt: skip
    assert calibration.whole(rows.kept[1:]) == []
    assert calibration.whole([made | {"share": 0.0} for made in rows.kept]) == []
    (found,) = [line for line in render.headline([equal, *rows.kept]).body
                if line[0] == render.TRIALS]  # fmt: skip
    assert found[1] == (
        f"batch 2, on {pages.machine(rows.kept[0])}: false alarms: 1 of 60 (0% to 9%); "
        "3% more work: 0 of 30 (0% to 12%); 5% more work: 30 of 30 (88% to 100%)"
    )


def test_exact_intervals_of_proportions():
    # Clopper and Pearson: none of n has the upper end 1 - 0.025^(1/n).
    assert stats.proportion(0, 60).high == pytest.approx(1 - 0.025 ** (1 / 60))
    assert stats.proportion(0, 60).low == 0
    half = stats.proportion(15, 30)
    assert half.low + half.high == pytest.approx(1)


def test_the_device_check_passes_on_the_cpu_and_fails_for_a_wrong_device(tmp_path, monkeypatch):
    found = check.run(torch.device("cpu"))
    assert found["verdict"] == "within all bands", found
    assert set(found["kernels"]) == {"float32"}
    assert "band" in check.text(found)
    monkeypatch.setattr(check, "logits_error", lambda device, dtype: math.nan)
    wrong = Rows(tmp_path).add("check", **check.run(torch.device("cpu")))
    assert wrong["verdict"] == "outside a band"
    assert "logits in float32, float64 on the CPU: nan, band 1e-05" in check.text(wrong)
    lines = render.check_table([wrong]).body
    assert [line[-1] for line in lines] == ["no", "yes"]
    assert check.apart([1.0, 1.1], [1.0, 1.0]) == pytest.approx(0.1)


def test_accuracy_of_a_saved_timm_model_in_both(tmp_path):
    import timm
    from PIL import Image
    from timm.models import save_for_hf

    arguments = {"img_size": 32, "num_classes": 3, "embed_dim": 24, "depth": 2, "num_heads": 3}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    nn.init.normal_(model.head.weight)
    save_for_hf(model, tmp_path / "saved", model_args=arguments, safe_serialization=True)
    for number, name in enumerate("abc"):
        (tmp_path / "val" / name).mkdir(parents=True)
        for picture in range(4):
            pixels = torch.randint(0, 255, (40, 50, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "val" / name / f"{number}{picture}.png")
    place = tmp_path / "saved" / "model.safetensors"
    found = pretrained.measure(str(place), tmp_path / "val", batch=5, device=torch.device("cpu"))
    assert found["identical"] == found["images"] == 12
    assert found["reference"] == "timm:vit_tiny_patch16_224"
    assert found["weights"] == "model.safetensors"
    assert found["top1"]["reference"] == found["top1"]["candidate"]
    assert found["top5"]["candidate"] == 1
    assert found["logits_apart"] < 1e-4
    assert "predictions identical: 12 of 12" in pretrained.text(found)
    lines = render.pretrained_table([Rows(tmp_path).add("pretrained", **found)]).body
    assert [line[0] for line in lines] == [found["reference"], found["candidate"]]
    assert [line[6] for line in lines] == ["12 of 12"] * 2
    whole = (tmp_path / "val" / "a" / "01.png").read_bytes()
    (tmp_path / "val" / "a" / "01.png").write_bytes(whole[:2000])
    with pytest.raises(ValueError, match=r"01\.png can't be decoded"):
        pretrained.measure(str(place), tmp_path / "val", batch=5, device=torch.device("cpu"))
    (tmp_path / "val" / "d").mkdir()
    with pytest.raises(ValueError, match="val'"):
        pretrained.measure(str(place), tmp_path / "val", batch=5, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"no config\.json beside the weights"):
        pretrained.load(str(tmp_path / "val" / "a" / "00.png"))
    place.write_bytes(place.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"timm can't read .*model\.safetensors"):
        pretrained.load(str(place))
    for junk in (b"", b"junk"):
        (place.parent / "weights.pth").write_bytes(junk)
        with pytest.raises(ValueError, match=r"timm can't read .*weights\.pth"):
            pretrained.load(str(place.parent / "weights.pth"))
    (place.parent / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"timm can't read .*saved"):
        pretrained.load(str(place.parent))


def test_what_hangs_before_it_is_timed_is_ended_too():
    program = (
        "import time; from benchmarks.throughput import within\nwith within(0.2): time.sleep(9)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGALRM
