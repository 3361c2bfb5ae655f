"""The throughput program: what is refused, what fails without stopping the rest, what is kept."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import configuration, peers, throughput
from benchmarks.configuration import Configuration
from benchmarks.kinds import Throughput
from benchmarks.report.throughput import verdict
from experiments.study.pages import ROOT
from experiments.study.results import of_kind, read
from vitx.measure import breakdown, machine, peak, timing, worker
from vitx.measure.subjects import step_config

PLANTED = ROOT / "tests" / "planted.py"
SHORT = timing.TimingConfig(dtype="float32", processes=1, pair_s=0.1, block_s=0.01)


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
    assert not list(tmp_path.rglob("results.jsonl"))


def run(out: Path, models: list[str], *more: str) -> list[Throughput]:
    names = [f"python:{PLANTED}:{name}" for name in models]
    throughput.main(
        ["--models", *names, "--processes", "2", "--seconds", "0.1", "--batch", "1",
         "--wandb", "disabled", "--out", str(out), *more]
    )  # fmt: skip
    (path,) = out.glob("throughput/*/results.jsonl")
    return of_kind(read(path), Throughput)


@pytest.mark.slow
def test_a_model_is_timed_beside_a_reference_and_a_wrong_one_is_not(tmp_path, capsys):
    reference = f"python:{PLANTED}:small"
    models = ["wrong", "others_names"]
    results = run(tmp_path, models, "--reference", reference)
    wrong, other = results
    assert (wrong.untimed, wrong.comparison.verdict) == (True, "not equal")
    assert "outputs differ by 1.0e-03" in wrong.comparison.reason
    assert not other.untimed
    assert other.checked.startswith("not checked: the state dicts do not match")
    sides = other.comparison.sides
    assert sides["candidate"].latency.p50.value > 0
    assert sides["reference"].stages["attention"] > 0
    assert sides["candidate"].stages is None
    assert sides["reference"].utilisation.flops > 0
    assert sides["candidate"].parameters == 3 * 16 * 16 * 5 + 5
    mean = sides["candidate"].rate.mean
    assert mean.low < mean.value < mean.high
    # Meant to be another function, it is timed and not judged.
    (other,) = run(tmp_path / "meant", ["wrong"], "--reference", reference, "--unchecked")
    assert other.checked == "not checked: it is meant to compute something else"
    assert (other.untimed, verdict(other)[:11]) == (False, "not checked")
    # Going on makes nothing again.
    before = list(tmp_path.glob("throughput/*"))
    assert run(tmp_path, models, "--reference", reference, "--resume") == results
    assert list(tmp_path.glob("throughput/*")) == before
    assert capsys.readouterr().out.count("[1 of 2]") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_what_pytorch_tunes_is_timed(tmp_path):
    """Compile mode max-autotune, whose choices are made in the processes that time it."""
    (result,) = run(tmp_path, ["small"], "--compile", "max-autotune")
    comparison = result.comparison
    assert not result.untimed, comparison.reason
    assert comparison.config.compile == "max-autotune"
    assert comparison.candidate.compile_s.cold > 0
    assert comparison.candidate.saved.pairs >= breakdown.LEAST_PAIRS


@pytest.mark.slow
def test_more_work_than_the_machine_can_do_is_a_failure_with_its_times(tmp_path, monkeypatch):
    slow = peak.Peak(1e3, (1, 1, 1), 1e3)
    monkeypatch.setattr(configuration.peak, "peak", lambda *_: slow)
    one = Configuration(f"python:{PLANTED}:small", "", 1, SHORT, "cpu")
    *_, measured = configuration.measure(one, tmp_path)
    comparison = measured.comparison
    assert comparison.verdict == "failed"
    assert comparison.reason.startswith("candidate: more work a second than the machine can do")
    assert comparison.raw[0]["rounds"]


@pytest.mark.parametrize("reference", ["", f"python:{PLANTED}:small"])
def test_a_model_whose_outputs_are_not_finite_is_not_timed(tmp_path, reference):
    one = Configuration(f"python:{PLANTED}:undefined", reference, 1, SHORT, "cpu")
    with pytest.raises(ValueError, match="undefined gives outputs that are not finite"):
        next(configuration.measure(one, tmp_path))


@pytest.mark.slow
def test_times_are_kept_where_the_last_peak_cant_be_measured(tmp_path, monkeypatch):
    real, calls = peak.peak, []

    def fails(*given):
        calls.append(given)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return real(*given)

    def here(command, *_, **__):
        try:
            configuration.child(Path(command[-1]))
        except RuntimeError as error:
            return 1, str(error)
        return 0, ""

    monkeypatch.setattr(configuration.peak, "peak", fails)
    monkeypatch.setattr(worker, "run_limited", here)
    one = Configuration(f"python:{PLANTED}:small", "", 1, SHORT, "cpu")
    comparison = configuration.timed(one, tmp_path / "work")["comparison"]
    assert comparison.reason.endswith("no utilisation: out of memory")  # after what others did
    assert comparison.candidate.rate.median > 0
    assert comparison.candidate.utilisation is None


@pytest.mark.campaign
def test_four_that_fail_do_not_stop_the_others(tmp_path, record):
    reference = f"python:{PLANTED}:small"
    models = ["crash", "others_names", "hang", "same", "hungry", "deep", "wrong", "wide"]
    results = run(tmp_path, models, "--reference", reference, "--limit-s", "90",
                  "--limit-gib", "3")  # fmt: skip
    by_name = {result.candidate.rpartition(":")[2]: result for result in results}
    assert list(by_name) == models
    reasons = {name: result.comparison.reason for name, result in by_name.items()}
    assert "the kernel is broken" in reasons["crash"]
    assert "took longer than 90 s" in reasons["hang"]
    assert "GiB of memory, more than 3" in reasons["hungry"]
    assert by_name["wrong"].comparison.verdict == "not equal"
    assert by_name["wrong"].comparison.candidate.rate is None
    good = [name for name, result in by_name.items() if not result.untimed]
    record("a matrix with a crash, a hang, too much memory, a wrong output", trials=8,
           passed=4 + len(good))  # fmt: skip
    assert good == ["others_names", "same", "deep", "wide"]
    assert not machine.descendants(os.getpid())  # nothing is left running


def test_the_best_batch_is_found_up_to_what_fits(tmp_path, monkeypatch):
    rates = {1: 10.0, 2: 30.0, 4: 20.0}

    def task(workers, job, cache, function, number):
        assert (tmp_path / "probe" / "reference.pt").exists()
        images = len(torch.load(tmp_path / "probe" / "example.pt"))
        if images not in rates:
            raise worker.TaskFailed("out of memory")
        return rates[images]

    def crash(*_):
        raise worker.TaskFailed("a crash")

    monkeypatch.setattr(worker.Workers, "run", task)
    model, config, cpu = peers.make(f"python:{PLANTED}:small"), SHORT, torch.device("cpu")
    best = configuration.best_batch(model, model, config, tmp_path, cpu)
    assert best == (2, {"1": 10.0, "2": 30.0, "4": 20.0, "8": "out of memory"})
    monkeypatch.setattr(worker.Workers, "run", crash)
    with pytest.raises(ValueError, match="not one image can be timed: a crash"):
        configuration.best_batch(None, model, config, tmp_path, cpu)


def test_the_best_batch_of_what_cant_be_pickled_is_refused(tmp_path):
    model = peers.make(f"python:{PLANTED}:small")
    model.module.anything = lambda: None
    with pytest.raises(ValueError, match="batch = 'auto' needs models that can be pickled"):
        configuration.best_batch(None, model, SHORT, tmp_path, torch.device("cpu"))


@pytest.mark.slow
def test_a_training_step_of_the_best_batch_is_timed_beside_a_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(configuration, "AUTO_MOST", 2)
    config = replace(SHORT, mode="training", warm_up_s=0.1, details=True, limit_gib=20.0)
    names = (f"python:{PLANTED}:{name}" for name in ("same", "small"))
    *_, measured = configuration.measure(Configuration(*names, 0, config, "cpu"), tmp_path)
    comparison, tried = measured.comparison, measured.batches_tried
    assert comparison.verdict == "one process, no verdict"
    assert set(tried) == {"1", "2"}
    assert tried[str(comparison.batch)] == max(tried.values())
    assert 15 < comparison.config.limit_gib < 20
    assert all(side.phases["backward"] > 0 for side in comparison.sides.values())


def test_what_looks_for_a_batch_has_what_is_left_of_the_limit(monkeypatch):
    monkeypatch.setattr(machine, "tree_mib", lambda _: 3 * 2**10)
    assert configuration.room_gib(timing.TimingConfig(limit_gib=10.0)) == 7
    with pytest.raises(ValueError, match=r"limit_gib = 2 is less than the 3\.0 before"):
        configuration.room_gib(timing.TimingConfig(limit_gib=2.0))


def test_most_of_the_machines_memory_is_the_limit_if_none_is_given(monkeypatch):
    monkeypatch.setattr(machine, "memory_gib", lambda: 10.0)
    for given, limit in ((0.0, 8.0), (3.0, 3.0)):
        settings = throughput.Settings(models=("vitx:Ti/16",), dtype=("float32",), limit_gib=given)
        (one,) = throughput.configurations(settings)
        assert one.config.limit_gib == limit


def test_a_model_with_batch_norm_is_counted_and_its_step_has_phases():
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8))
    model = peers.Model("python:x:f", module, (3, 4, 4), 1, None)
    config = replace(SHORT, mode="training")
    image = torch.randn(4, 3, 4, 4)
    assert configuration._work(model, image, config).flops == 2 * 2 * 48 * 8
    phases = breakdown.phases(module, image, step_config(4, config))
    assert set(phases) == {"forward", "backward", "optimizer"}


def test_a_gpu_without_bfloat16_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old GPU")
    throughput._check_dtype("float16", torch.device("cuda"))
    throughput._check_dtype("bfloat16", torch.device("cpu"))
    with pytest.raises(ValueError, match="dtype = 'bfloat16': an old GPU has no bfloat16"):
        throughput._check_dtype("bfloat16", torch.device("cuda"))


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with_by_the_same_code_alone(tmp_path, monkeypatch):
    """Killed within its first configuration, and while a result was written."""
    real = throughput.timed

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(throughput, "timed", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ["small"])
    monkeypatch.setattr(throughput, "timed", real)
    (folder,) = tmp_path.glob("throughput/*")
    path = folder / "results.jsonl"
    assert not path.exists()
    (result,) = run(tmp_path, ["small"], "--resume")
    path.write_text(path.read_text() + '{"schema": 2, "ki')
    assert run(tmp_path, ["small"], "--resume") == [result]
    assert list(tmp_path.glob("throughput/*")) == [folder]
    monkeypatch.setattr(timing, "PROTOCOL", 0)
    with pytest.raises(ValueError, match="holds no run of these settings and versions to resume"):
        run(tmp_path, ["small"], "--resume")


def test_what_stands_beside_a_persons_model_is_its_code_too(tmp_path):
    model, beside = tmp_path / "mine.py", tmp_path / "layers.py"
    model.write_text("import layers\n")
    versions = []
    for text in ("print 'of another time'", "print 'of today'"):
        beside.write_text(text)
        versions.append(throughput.versions([f"python:{model}:make", "vitx:Ti/16"]))
    assert versions[0] != versions[1]
    assert throughput.versions([f"python:{model}:make"]) == versions[1]


def test_what_hangs_before_it_is_timed_is_ended_too():
    program = (
        "import time; from benchmarks.configuration import within\nwith within(0.2): time.sleep(9)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGALRM
