"""The benchmark's matrix: what is refused, what fails without stopping the rest, what rows say."""

import gzip
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import (
    calibration,
    check,
    gate,
    matrix,
    pack,
    peers,
    pretrained,
    render,
    speed,
    throughput,
)
from experiments.pages import ROOT
from experiments.rows import Rows, read
from vitx import breakdown, job, machine, peak, stats, timing, tracking
from vitx.compare import equality
from vitx.config import ModelConfig, override, size
from vitx.cost import forward_macs, step_macs
from vitx.model import build

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
        (["--seconds", "0"], "^seconds = 0.0 must be positive"),
        (["--limit-gib", "-1"], "limit_gib = -1.0 must be 0 or positive"),
        (["--resume"], "holds no run of these settings, by this code, to resume"),
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
    # Going on makes nothing again.
    before = list(tmp_path.glob("throughput/*"))
    assert run(tmp_path, models, "--reference", reference, "--resume") == rows
    assert list(tmp_path.glob("throughput/*")) == before
    said = capsys.readouterr().out
    assert said.count("[1 of 2]") == 1


def test_more_work_than_the_machine_can_do_is_a_failure_with_its_times(tmp_path, monkeypatch):
    slow = peak.Peak(1e3, (1, 1, 1), 1e3)
    monkeypatch.setattr(throughput.peak, "peak", lambda *_: slow)
    plan = timing.Plan(dtype="float32", processes=1, pair_s=0.1, block_s=0.01)
    configuration = throughput.Configuration(f"python:{PLANTED}:small", "", 1, plan, "cpu")
    found = throughput.measure(configuration, tmp_path)
    assert (found["kind"], found["verdict"]) == ("failure", "failed")
    assert found["reason"].startswith("candidate: more work a second than the machine can do")
    assert found["raw"][0]["rounds"]


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

    monkeypatch.setattr(job.Tasks, "run", task)
    model = peers.make(f"python:{PLANTED}:small")
    found = throughput.best_batch(model, model, timing.Plan(), tmp_path, torch.device("cpu"))
    assert found == (2, {"1": 10.0, "2": 30.0, "4": 20.0, "8": "out of memory"})
    monkeypatch.setattr(job.Tasks, "run", lambda *_, **__: {"failure": "a crash"})
    with pytest.raises(ValueError, match="not one image can be timed: a crash"):
        throughput.best_batch(None, model, timing.Plan(), tmp_path, torch.device("cpu"))


def test_a_probe_runs_all_that_a_pair_does_and_tells_the_candidates_rate(monkeypatch):
    calls = []
    blocks = iter([9.0, 9.0, 0.5, 0.1, 0.1, 0.4, 0.1, 0.1, 0.3, 0.1, 0.1, 0.2])

    def block(step, iterations, device):
        step()
        return next(blocks)

    monkeypatch.setattr(timing, "make_steps", lambda arms, *_: {
        arm: partial(calls.append, arm) for arm in arms
    })  # fmt: skip
    monkeypatch.setattr(timing, "time_block", block)
    plan = timing.Plan()
    found = timing.probe(dict.fromkeys(timing.ARMS, nn.Identity()), torch.zeros(8, 3), plan)
    assert calls == [*timing.ARMS] * 4
    assert found == {"images_per_s": 8 / 0.2}


def test_a_probe_keeps_memory_as_a_pair_does(tmp_path, monkeypatch):
    kept: list[bool] = []
    monkeypatch.setattr(job, "keep_memory", lambda: kept.append(True))
    small = peers.make(f"python:{PLANTED}:small").module
    plan = timing.Plan(processes=1, pair_s=0.01, block_s=0.001, warm_up_s=0.01)
    job.write(tmp_path, plan, small, small, torch.randn(1, 3, 16, 16), {})
    for task, argument in (("pair", "0"), ("probe", "0"), ("alone", "candidate")):
        job._do(tmp_path, task, argument)
    assert len(kept) == 2


def test_the_best_batch_of_what_cant_be_pickled_is_refused(tmp_path):
    model = peers.make(f"python:{PLANTED}:small")
    model.module.anything = lambda: None
    with pytest.raises(ValueError, match="batch = 'auto' needs models that can be pickled"):
        throughput.best_batch(None, model, timing.Plan(), tmp_path, torch.device("cpu"))


def test_a_training_step_of_the_best_batch_is_timed_beside_a_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "AUTO_MOST", 2)
    plan = timing.Plan(mode="training", dtype="float32", processes=1, pair_s=0.1, block_s=0.01,
                       warm_up_s=0.1, details=True)  # fmt: skip
    names = (f"python:{PLANTED}:{name}" for name in ("same", "small"))
    found = throughput.measure(throughput.Configuration(*names, 0, plan, "cpu"), tmp_path)
    assert found["kind"] == "speed"
    assert set(found["batches_tried"]) == {"1", "2"}
    tried = found["batches_tried"]
    assert tried[str(found["batch"])] == max(tried.values())
    assert found["plan"]["limit_gib"] == pytest.approx(0.8 * machine.memory_gib())
    assert all(found["phases"][side]["backward"] > 0 for side in ("reference", "candidate"))


def test_what_looks_for_a_batch_has_what_is_left_of_the_limit(monkeypatch):
    monkeypatch.setattr(machine, "tree_mib", lambda _: 3 * 2**10)
    plan, cpu = timing.Plan(limit_gib=10.0), torch.device("cpu")
    assert throughput.room_gib(plan, cpu) == 7
    assert throughput.room_gib(timing.Plan(), torch.device("cuda")) == 0
    with pytest.raises(ValueError, match=r"limit_gib = 2 is less than the 3\.0 before"):
        throughput.room_gib(timing.Plan(limit_gib=2.0), cpu)


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


def test_every_stage_of_a_call_is_seen_and_the_model_stays_as_it_is():
    vit = build(override(CONFIG, width=96, depth=4)).eval()
    image = torch.randn(8, 3, 16, 16)
    before = forward_macs(vit, image)
    found = breakdown.stages(vit, image)
    assert set(found) == set(breakdown.STAGES)
    assert all(seconds > 0 for stage, seconds in found.items() if stage != "remainder")
    assert found["mlp"] > found["head"]
    assert not any(module._forward_hooks for module in vit.modules())
    assert forward_macs(vit, image) == before
    with pytest.raises(ValueError, match="has no module patch_embed"):
        breakdown.stages(nn.Linear(3, 3), image)


@pytest.mark.timing
def test_little_of_a_call_belongs_to_no_stage():
    found = breakdown.stages(build(size("Ti/16")), torch.randn(1, 3, 224, 224))
    assert abs(found["remainder"]) <= 0.05 * sum(found.values())


def test_phases_of_a_step_are_all_there():
    config = timing.step_config(4, timing.Plan(mode="training"))
    found = breakdown.phases(build(CONFIG), torch.randn(4, 3, 16, 16), config)
    assert set(found) == {"forward", "backward", "optimizer"}
    assert all(seconds > 0 for seconds in found.values())


@pytest.mark.parametrize("share", breakdown.QUANTILES)
def test_intervals_of_quantiles_hold_them_95_times_in_100(share):
    draws, held = random.Random(0), 0
    for _ in range(1000):
        times = sorted(draws.random() for _ in range(breakdown.LEAST_CALLS))
        _, low, high = breakdown._quantile(times, share)
        held += low <= share <= high
    assert 0.93 < held / 1000 < 0.99


def test_latency_waits_for_every_call(monkeypatch):
    """Of a device that works on by itself, as a GPU does."""
    slow, given = itertools.cycle([0.001] * 19 + [0.02]), []  # every twentieth call

    def synchronise(device):
        while given:
            time.sleep(given.pop())

    monkeypatch.setattr(machine, "synchronise", synchronise)
    found = breakdown.latency(lambda: given.append(next(slow)), torch.device("cuda"), 0.01)
    assert found["calls"] == breakdown.LEAST_CALLS
    assert 0.001 <= found["p50"]["low"] <= found["p50"]["value"] <= found["p50"]["high"] < 0.02
    assert found["p99"]["value"] >= 0.02
    assert found["p90"]["value"] < 0.02


class SlowAtFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, image):
        self.calls += 1
        time.sleep(0.3 if self.calls == 1 else 0.001)
        return image


def test_what_a_first_call_does_once_is_no_latency():
    plan = timing.Plan(pair_s=0.01, warm_up_s=0.1, block_s=0.01, details=True)
    found = job._details(SlowAtFirst(), torch.zeros(1, 3), plan)
    assert found["latency"]["p99"]["high"] < 0.3


def test_fused_attention_reads_and_writes_what_a_kernel_does():
    class Mixing(nn.Module):
        def forward(self, q):
            return nn.functional.scaled_dot_product_attention(q, q, q)

    found = peak.work(Mixing(), torch.randn(2, 3, 50, 8), torch.float32)
    assert found.bytes == 4 * 4 * 2 * 3 * 50 * 8


def test_a_models_products_and_bytes_are_counted():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    assert peak.work(model, torch.randn(10, 8), torch.bfloat16).bytes == 2 * 652
    found = peak.work(model, torch.randn(10, 8), torch.float32)
    assert found.products == [(10, 8, 16), (10, 16, 4)]
    values = [10 * 8, 8 * 16, 16, 10 * 16, 10 * 16, 16 * 4, 4, 10 * 4]
    assert found.bytes == 4 * sum(values)
    assert step_macs(model, torch.randn(10, 8)) == 10 * (8 * 16 * 2 + 16 * 4 * 3)


def test_utilisation_is_quoted_only_where_it_can_be():
    low, high = peak.Peak(1e9, (1, 1, 1), 1e9), peak.Peak(1.1e9, (1, 1, 1), 2e9)
    found = peak.utilisation(0.55e9, low, high)
    assert found["mfu"] == pytest.approx(0.5)
    assert found["bandwidth"] == 2e9
    far = peak.Peak(2e9, (1, 1, 1), 1e9)
    assert peak.utilisation(0.5e9, low, far)["why"] == "unsteady"
    above = peak.utilisation(1.2e9, low, high)
    assert (above["mfu"], above["why"]) == (None, "above the peak")


@pytest.fixture
def tf32():
    """Off at first, and afterwards as it was before the test."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    "name",
    ["NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "GRID A100-10C", "NVIDIA L40S",
     "NVIDIA GeForce RTX 4090 Laptop GPU"],
)  # fmt: skip
def test_a_part_or_a_relative_of_a_gpu_has_no_data_sheet(name):
    assert peak.data_sheet(name, torch.float16) is None


def test_a_data_sheets_peak_is_that_of_the_dtype_and_gpu(tf32):
    assert peak.data_sheet("NVIDIA H200", torch.bfloat16) == 989e12
    assert peak.data_sheet("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    torch.backends.cuda.matmul.allow_tf32 = True
    assert peak.data_sheet("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
    assert peak.data_sheet("Tesla T4", torch.bfloat16) is None
    assert peak.data_sheet(None, torch.float32) is None
    used = row()["utilisation"]["candidate"]
    assert matrix._utilisation(used) == "45% (2 to 2.1 TFLOP/s)"
    said = matrix._utilisation(used | {"mfu": None, "why": "unsteady", "data_sheet": 989e12})
    assert said == "unsteady (2 to 2.1, data sheet 989 TFLOP/s)"


def test_peaks_are_those_of_this_machine():
    found = peak.peak(torch.float32, torch.device("cpu"), [(64, 32, 64)])
    left, right = torch.randn(512, 512), torch.randn(512, 512)
    once = timing.time_block(lambda: left @ right, 20, torch.device("cpu")) / 20
    assert found.flops > 0.3 * 2 * 512**3 / once  # on a machine that others use too
    assert found.bytes > 1e8
    assert found.shape in {(side,) * 3 for side in peak.SQUARES["cpu"]} | {(64, 32, 64)}


def row(model="vitx:S/16", batch=8, rate=100.0, threads=2, **more) -> dict:
    side = {"median": rate, "low": rate * 0.9, "high": rate * 1.1, "mean": rate,
            "mean_low": rate * 0.95, "mean_high": rate * 1.05}  # fmt: skip
    quantile = {"value": 0.01, "low": 0.009, "high": 0.011}
    logs, again = ([middle - 0.01, middle, middle + 0.01] for middle in (math.log(1.1), 0.0))
    ratio, floor = stats.paired_ratio(logs), stats.noise_floor(again)
    return {
        "schema": 1, "kind": "speed", "id": f"2026-11-22T00:00:00Z-{batch}", "what": "throughput",
        "candidate": model, "reference": "timm:vit_small_patch16_224", "mode": "inference",
        "batch": batch, "dtype": "float32", "compile": "none", "device": "cpu",
        "images_per_s": {"reference": side, "candidate": side}, "checked": "checked",
        "ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high,
        "log_ratios": logs, "log_ratios_again": again, "noise_floor": floor, "verdict": "faster",
        "macs": {"candidate": 4.6e9}, "parameters": {"candidate": 22_000_000},
        "peak_mib": {"candidate": 300.0}, "compile_s": {"candidate": None}, "reason": "",
        "utilisation": {"candidate": {"flops": 9.2e9 * rate, "peak_low": 2e12, "peak_high": 2.1e12,
                                      "bandwidth": 2e10, "bytes": 3e7 * rate, "mfu": 0.45,
                                      "why": ""}},
        "stages": {"candidate": dict.fromkeys(breakdown.STAGES, 0.01)},
        "latency": {"candidate": {"calls": 300, "p50": quantile, "p90": quantile, "p99": quantile}},
        "phases": {}, "raw": [[1, 2, 3]],
        "environment": tracking.environment() | {"threads": threads, "dirty": False},
    } | more  # fmt: skip


def test_tables_and_figures_come_from_rows(tmp_path):
    compiled = row(rate=150.0, compile="default",
                   compile_s={"candidate": {"cold": 60.0, "warm": 20.0}})  # fmt: skip
    failed = row(batch=64) | {"kind": "failure", "verdict": "failed", "reason": "no memory"}
    paths = matrix.write([row(), row(batch=1), compiled, failed], tmp_path)
    names = {path.name for path in paths}
    assert {"throughput.md", "throughput.csv", "latency.md", "stages.csv"} <= names
    assert {f"{name}-inference-float32.svg" for name in
            ("throughput", "ratios", "roofline", "latency", "memory")} <= names  # fmt: skip
    table = (tmp_path / "throughput.md").read_text()
    assert "100.0 (95.0 to 105.0)" in table
    assert "failed: no memory" in table
    (line,) = matrix.break_even_table([row(), compiled]).body
    saved = 1 / 100 - 1 / 150
    assert line[5:8] == (f"{1e3 * saved:+.2f}", f"{60 / saved:,.0f}", f"{20 / saved:,.0f}")
    near = row(rate=104.0, compile="default", compile_s={"candidate": {"cold": 60.0, "warm": 1}})
    (line,) = matrix.break_even_table([row(), near]).body
    assert line[6:8] == ("not told apart", "not told apart")


def test_a_reference_that_was_timed_with_every_model_is_one_point():
    """At the geometric mean of its rates, between the ends of all intervals."""
    rows = [row("vitx:S/16", rate=100.0), row("hf:S/16", rate=121.0)]
    points = matrix._by_batch(rows)
    assert points["timm:vit_small_patch16_224, compile none"] == [
        (8, pytest.approx(110), pytest.approx(95), pytest.approx(127.05))
    ]
    assert points["vitx:S/16, compile none"] == [(8, *map(pytest.approx, (100, 95, 105)))]


def test_rows_of_other_settings_are_never_ranked_together():
    bound = row()
    bound["environment"] |= {"affinity": 1}
    newer = row()
    newer["environment"] |= {"versions": newer["environment"]["versions"] | {"timm": "9.0"}}
    assert len(matrix.cells([row(), row(), bound, newer, row(origin="a"), row(origin="b")])) == 5
    rows = [row(), row(threads=1, rate=60.0)]
    table = matrix.throughput_table(rows)
    assert len(table.body) == 2
    assert len({line[-1] for line in table.body}) == 2
    figures = matrix.figures(rows)
    wanted = {f"throughput-inference-float32-{number}" for number in (1, 2)}
    assert wanted <= set(figures)


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
    assert matrix.throughput_table([found]).body[0][5] == "100.0 (95.0 to 105.0)"


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
    monkeypatch.setattr(tracking, "code_of", lambda *_: "other")
    with pytest.raises(ValueError, match="holds no run of these settings, by this code, to resume"):
        run(tmp_path, ["small"], "--resume")


def test_undefined_numbers_pass_nowhere():
    nan = math.nan
    assert not check.apart([1.0, nan, 1.0], [1.0, 1.0, 1.0]) <= check.BAND
    assert gate.largest_error([1.0, 2.0, 3.0], [1.0, nan, 3.0]) == math.inf


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
        ({"images_per_s": None}, "no whole row of kind speed"),
        ({"candidate": 5}, "no whole row of kind speed"),
        ({"compile_s": {"candidate": 5.0}}, "no whole row of kind speed"),
        ({"latency": {"candidate": {"calls": 3}}}, "no whole row of kind speed"),
        ({"stages": {"candidate": {"attention": 1.0}}}, "no whole row of kind speed"),
        ({"kind": "failure", "reason": None, "verdict": "failed"}, None),
        ({"verdict": "slower"}, "ratio, floor and verdict are not those of its processes"),
        ({"ratio_low": 1.09}, "ratio, floor and verdict are not those of its processes"),
        ({"log_ratios": [1000.0, 1001.0]}, "no whole throughput row"),
        ({"noise_floor": 0.0}, "ratio, floor and verdict are not those of its processes"),
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


def test_two_packs_of_one_name_never_rank_together(tmp_path):
    paths = [tmp_path / name / "rows.pack" for name in "ab"]
    for path, rate in zip(paths, (100.0, 50.0), strict=True):
        path.parent.mkdir()
        pack.write([row(rate=rate)], path)
    given = [one for path in paths for one in pack.read(path)]
    table = matrix.throughput_table([*given, row()])
    assert len({line[-1] for line in table.body}) == 3
    figures = matrix.figures([*given, row()])
    assert {f"throughput-inference-float32-{number}" for number in (1, 2, 3)} <= set(figures)


def test_a_packed_file_adds_a_column_to_the_verdicts(tmp_path, capsys):
    """Also where it is of the same kind of machine, with rows of the main job."""
    both = {"reference": 1.0, "candidate": 1.0}
    kept = {"candidate": "vitx:from_timm(a)", "reference": "timm:vit_tiny_patch16_224",
            "keep_memory": True, "page_faults": both, "macs": both, "peak_mib": both}  # fmt: skip
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
    wrong = row(verdict="not equal", equality=equal) | {"kind": "equality"}
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
    path.write_text(json.dumps(row() | {"kind": "equality"}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl row 1 is no whole row of kind equality"):
        render.main([str(path), "--out", str(tmp_path / "shown")])


def test_too_many_rows_make_no_pack(tmp_path):
    noise = random.Random(0)
    rows = [row(reason=noise.randbytes(2000).hex()) for _ in range(300)]
    with pytest.raises(ValueError, match="more than 200; pack fewer"):
        pack.write(rows, tmp_path / "rows.pack")


def test_the_calibrations_trials_are_fixed_and_each_is_made_once(tmp_path):
    shares = calibration.trials()
    assert {share: shares.count(share) for share in set(shares)} == {0.0: 60, 0.03: 30, 0.05: 30}
    assert shares == calibration.trials()
    plan, protocol = timing.Plan(), calibration.protocol()
    rows = Rows(tmp_path)
    for number, verdict in ((3, "slower"), (7, "no difference seen")):
        rows.add("plant", what="trial", trial=number, share=0.05, plan=vars(plan), device="cpu",
                 reference="timm:vit", batch=2, protocol=protocol, verdict=verdict,
                 forked=job.forks(torch.device("cpu")), seconds=100.0)  # fmt: skip
    (tmp_path / "committed.jsonl").write_text(rows.path.read_text())
    paths = sorted(tmp_path.glob("*.jsonl"))  # a trial that stands in both counts once
    made = partial(calibration.made, paths, reference="timm:vit", device=torch.device("cpu"))
    found = made(plan, batch=2)
    assert [row["trial"] for row in found] == [3, 7]
    assert made(timing.Plan(processes=9), batch=2) == []
    assert made(plan, batch=8) == []
    (line,) = calibration.table([*found, *rows.kept]).body
    other = rows.kept[0] | {"protocol": "other", "trial": 9}
    assert len(calibration.table([*rows.kept, other]).body) == 2  # never in one rate
    threads = other["environment"] | {"threads": 64}
    assert len(calibration.table([*rows.kept, rows.kept[0] | {"environment": threads}]).body) == 2
    exact = stats.proportion(1, 2)
    assert line[7] == f"found: 50% ({exact.low:.0%} to {exact.high:.0%})"


def test_a_trials_own_words_find_it_again(tmp_path):
    name, plan, cpu = "vit_tiny_patch16_224", timing.Plan(), torch.device("cpu")
    pair = speed.make_pair(name, batch=2, device=cpu, img_size=32, depth=1)
    rows = Rows(tmp_path)
    rows.add("noise", what="trial", trial=0, plan=vars(plan), protocol=calibration.protocol(),
             forked=job.forks(cpu), **pair.labels)  # fmt: skip
    for batch, found in ((2, 1), (8, 0)):
        made = calibration.made(
            [rows.path], plan, reference=f"timm:{name}", batch=batch, device=cpu
        )
        assert len(made) == found


def test_a_trial_that_was_made_twice_counts_as_it_did_first(tmp_path):
    plan, rows, protocol = timing.Plan(), Rows(tmp_path), calibration.protocol()
    for verdict in ("faster", "no difference seen"):
        rows.add("noise", what="trial", trial=3, share=0.0, plan=vars(plan), protocol=protocol,
                 reference="timm:vit", batch=2, device="cpu", verdict=verdict, seconds=100.0,
                 forked=job.forks(torch.device("cpu")), planted_counted=0.0)  # fmt: skip
    (found,) = calibration.made([rows.path], plan, reference="timm:vit", batch=2,
                                device=torch.device("cpu"))  # fmt: skip
    assert found["verdict"] == "faster"
    (line,) = calibration.table(rows.kept).body
    assert line[:5] == ("nothing", "0.00% to 0.00%", "1", "0", "1")


def test_exact_intervals_of_proportions():
    # Clopper and Pearson: none of n has the upper end 1 - 0.025^(1/n).
    assert stats.proportion(0, 60).high == pytest.approx(1 - 0.025 ** (1 / 60))
    assert stats.proportion(0, 60).low == 0
    half = stats.proportion(15, 30)
    assert half.low + half.high == pytest.approx(1)


def test_the_device_check_passes_on_the_cpu_and_fails_for_a_wrong_device(monkeypatch):
    found = check.run(torch.device("cpu"))
    assert found["verdict"] == "within all bands", found
    assert set(found["kernels"]) == {"float32"}
    assert "band" in check.text(found)
    monkeypatch.setattr(check, "logits_error", lambda device, dtype: 1e-3)
    wrong = check.run(torch.device("cpu"))
    assert wrong["verdict"] == "outside a band"
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
    (tmp_path / "val" / "d").mkdir()
    with pytest.raises(ValueError, match="val'"):
        pretrained.measure(str(place), tmp_path / "val", batch=5, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"no config\.json beside the weights"):
        pretrained.load(str(tmp_path / "val" / "a" / "00.png"))
    place.write_bytes(place.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"timm can't read .*model\.safetensors"):
        pretrained.load(str(place))
    (place.parent / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"timm can't read .*saved"):
        pretrained.load(str(place.parent))


def test_a_gate_passes_the_same_commit_and_names_what_it_cant_read(tmp_path):
    words = ["--against", "HEAD", "--model", "Pico/16", "--mode", "inference", "--processes", "2",
             "--seconds", "0.1", "--block-s", "0.01", "--threshold", "0.9", "--out",
             str(tmp_path)]  # fmt: skip
    gate.main(words)
    (path,) = tmp_path.glob("gate/*/rows.jsonl")
    (found,) = read(path)
    assert found["outputs_apart"] == 0
    assert not found["failed"]
    assert found["reference"] == found["candidate"]
    assert 0.3 < found["ratio"] < 3
    with pytest.raises(ValueError, match="against = 'nowhere' is no commit"):
        gate.main(["--against", "nowhere"])


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
    path = tmp_path / "vitx" / "layers.py"
    text, line = path.read_text(), "        q, k, v = self.split(tokens, queries)\n"
    assert text.count(line) == 1
    path.write_text("import time\n" + text.replace(line, f"        time.sleep(0.02)\n{line}"))
    git("commit", "-am", "after")
    words = ["--against", "HEAD~1", "--model", "Pico/16", "--mode", "inference", "--processes",
             "4", "--seconds", "0.2", "--block-s", "0.01", "--threshold", "0.5"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gate", *words], cwd=tmp_path, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (rows,) = tmp_path.glob("runs/gate/*/rows.jsonl")
    (found,) = read(rows)
    assert found["failed"]
    assert found["outputs_apart"] == 0
    assert found["reference"] != found["candidate"]
    assert found["ratio_high"] < 0.5


def test_a_side_of_the_gate_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "side.py").write_text("import time; time.sleep(100)")
    monkeypatch.setattr(gate, "SIDE", tmp_path / "side.py")
    with pytest.raises(ValueError, match=r"killed, at the latest after 0\.5 s without an answer"):
        gate.Side({}, tmp_path, 0.5)


def test_what_hangs_before_it_is_timed_is_ended_too():
    program = (
        "import time; from benchmarks.throughput import within\nwith within(0.2): time.sleep(9)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGALRM


def test_a_gate_fails_only_with_the_whole_interval(monkeypatch):
    settings = gate.Settings(against="HEAD")
    logs = [math.log(0.94), math.log(0.95), math.log(0.96), math.log(0.95), math.log(0.95)]

    def found(values, apart=0.0):
        records = iter(
            {"apart": apart, "log_ratio": v, "log_ratio_again": 0.001 * k, "rounds": []}
            for k, v in enumerate(values)
        )
        monkeypatch.setattr(gate, "process", lambda *_: next(records))
        return gate.compare(settings, "inference", {}, Path())

    assert found(logs)["failed"]
    wide = [math.log(0.90), math.log(0.99), *logs[2:]]
    assert not found(wide)["failed"]
    other = found(logs, apart=1e-3)
    assert other["failed"]
    assert other["verdict"] == "not equal"
    assert "outputs differ by 1.0e-03: FAILED" in gate.line({"mode": "inference"} | other, 0.03)


def test_the_reference_in_many_rows_is_one_line():
    rows = [row(stages={"reference": dict.fromkeys(breakdown.STAGES, 0.02)}, model=name)
            for name in ("vitx:S/16", "hf:S/16")]  # fmt: skip
    assert len(matrix.stage_table(deepcopy(rows)).body) == 1
