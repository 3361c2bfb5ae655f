"""Paired timing: order, rounds, failures as results, and the words of a comparison."""

import itertools
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import vitx
from benchmarks import peers
from vitx.measure import compare as compare_file
from vitx.measure import machine, timing, worker
from vitx.measure.compare import compare, equality, summarise
from vitx.measure.machine import Machine
from vitx.measure.timing import TimingConfig
from vitx.model.config import ModelConfig

PLANTED = Path(__file__).parents[1] / "planted.py"
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


def record(log_ratio, again=0.001):
    times = {"reference": [0.10, 0.11], "again": [0.10, 0.11], "candidate": [0.09, 0.10]}
    faults = {"reference": [9.0, 7.0], "again": [8.0, 8.0], "candidate": [0.0, 1.0]}
    return {
        "page_faults": faults,
        "log_ratio": log_ratio, "log_ratio_again": again, "seconds": times, "rounds": [],
        "rounds_disturbed": 0, "rounds_used": 2, "warm_up": {"ended": "steady"}, "quiet": True,
        "gpu_readings": None, "threads": 1, "images": dict.fromkeys(times, 8),
    }  # fmt: skip


def comparison(records):
    a = vitx.build(CONFIG)
    found = equality(a, a, torch.randn(2, 3, 12, 12))
    return summarise(compare_file.Comparison(QUICK, found, "not timed", batch=8, processes=records))


def test_six_rounds_hold_every_order_once():
    orders = timing.orders(random.Random(0), timing.ARMS)
    first, second = ([next(orders) for _ in range(6)] for _ in range(2))
    assert len(set(first)) == len(set(second)) == 6
    assert first != second


def test_a_pair_finds_planted_times(monkeypatch, unchecked):
    """With blocks of known length, the median log ratios are those lengths' ratios."""
    seconds = {"reference": 0.20, "again": 0.21, "candidate": 0.10}
    monkeypatch.setattr(timing, "make_step", lambda model, run, example, plan: model)
    monkeypatch.setattr(timing, "time_block", lambda step, iterations, device: step * iterations)
    monkeypatch.setattr(machine.Watch, "read", lambda self: Machine(0.0, 0.0, None, 0.0))
    found = timing.pair(seconds, torch.zeros(1), replace(QUICK, block_s=0.3), 0)
    wanted = [math.log(2.0), math.log(2.1)]
    assert found["log_ratio"] == pytest.approx(sum(wanted) / 2)
    assert found["log_ratio_again"] == pytest.approx(math.log(0.20 / 0.21))
    assert found["iterations"] == dict.fromkeys(seconds, 3)
    assert len(found["rounds"]) == 6
    assert found["warm_up"]["ended"] == "steady"


def test_noise_that_only_slows_favours_no_arm():
    noise = random.Random(0)
    times = {arm: [1 + noise.expovariate(10) for _ in range(20_000)] for arm in timing.ARMS}
    found = timing.log_ratios(times, dict.fromkeys(timing.ARMS, 1))
    assert abs(found["log_ratio"]) < 0.002
    assert abs(found["log_ratio_again"]) < 0.002
    logs = ([math.log(seconds) for seconds in times[arm]] for arm in timing.ARMS)
    mean_against_one = [(a + b) / 2 - c for a, b, c in zip(*logs, strict=True)]
    assert statistics.median(mean_against_one) > 0.005  # what the test would find otherwise


def test_arms_of_unlike_speed_have_blocks_of_like_length():
    found = timing.iterations_of({"reference": 0.05, "again": 0.04, "candidate": 0.001}, 0.1)
    assert found == {"reference": 3, "again": 3, "candidate": 100}


def test_disturbed_rounds_are_run_again_and_kept(monkeypatch, unchecked):
    readings = iter([Machine(0.5, 0.0, None, 0.0)] + [Machine(0.0, 0.0, None, 0.0)] * 99)
    monkeypatch.setattr(machine.Watch, "read", lambda self: next(readings))
    monkeypatch.setattr(timing, "make_step", lambda model, run, example, plan: model)
    monkeypatch.setattr(timing, "time_block", lambda step, iterations, device: step * iterations)
    models: dict = dict.fromkeys(timing.ARMS, 0.1)
    found = timing.pair(models, torch.zeros(1), QUICK, 0)
    assert found["rounds_disturbed"] == 1
    assert found["rounds_used"] == 6
    assert len(found["rounds"]) == 7
    assert found["rounds"][0]["disturbed"]


@pytest.mark.parametrize(
    ("state", "highest", "disturbed"),
    [
        (Machine(0.11, 0.0, 3000.0, 1.0), 3000.0, True),
        (Machine(0.09, 0.0, 3000.0, 9.0), 3000.0, False),
        (Machine(0.0, 0.06, 3000.0, 1.0), 3000.0, True),
        (Machine(0.0, 0.0, 2600.0, 1.0), 3000.0, True),
        (Machine(0.0, 0.0, 2800.0, 1.0), 3000.0, False),
        (Machine(None, None, None, None), 0.0, False),
    ],
)
def test_a_block_is_judged_by_the_machine_alone(state, highest, disturbed):
    assert state.disturbed(highest) == disturbed


def test_the_watch_sees_another_process_at_work():
    if machine.cpu_seconds(machine.core_numbers()) is None:
        pytest.skip("the machine's state can't be read here")
    busy = "import time; end = time.time() + 3\nwhile time.time() < end: pass"
    child = subprocess.Popen([sys.executable, "-c", busy])
    time.sleep(1)
    watch = machine.Watch()
    time.sleep(1)
    state = watch.read()
    child.wait()
    assert state.foreign > 0.5 / machine.cores()


def test_cores_that_the_system_does_not_list_are_not_read():
    assert machine.cpu_seconds({100_000}) is None
    assert machine.cpu_seconds({0, 100_000}) is None
    assert machine.cpu_seconds(set()) is None


def test_the_clock_is_that_of_the_cores_in_use(monkeypatch):
    listed = "processor\t: 0\ncpu MHz\t\t: 1000.0\n\nprocessor\t: 7\ncpu MHz\t\t: 3000.5\n"
    monkeypatch.setattr(machine.Path, "exists", lambda path: str(path) == "/proc/cpuinfo")
    monkeypatch.setattr(machine.Path, "read_text", lambda path: listed)
    assert machine.clocks_mhz() == {0: 1000.0, 7: 3000.5}
    monkeypatch.setattr(machine, "core_numbers", lambda: {7})
    assert machine.Watch().read().clock_mhz == 3000.5
    monkeypatch.setattr(machine, "core_numbers", lambda: {0, 7})
    assert machine.Watch().read().clock_mhz == 2000.25


def test_a_gpus_readings_are_those_of_nvidia_smi(tmp_path, monkeypatch):
    asked, program = tmp_path / "asked", tmp_path / "nvidia-smi"
    values = "570.86, 1980, 2619, 412.53, 700.00, 44, 0x0000000000000000"
    program.write_text(f'#!/bin/sh\necho "$@" > {asked}\necho "{values}"\n')
    program.chmod(0o700)
    properties = types.SimpleNamespace(uuid="12ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = machine.gpu(torch.device("cuda"))
    assert (found["driver_version"], found["clocks.sm"], found["power.draw"]) == (
        "570.86", "1980", "412.53",
    )  # fmt: skip
    assert asked.read_text().startswith("--id=GPU-12ab --query-gpu=driver_version,clocks.sm,")
    asked.unlink()
    assert machine.gpu(torch.device("cpu")) is None
    assert not asked.exists()
    for wrong in ("exit 6", "echo 570.86, 1980"):  # an unknown device, a driver of other words
        program.write_text(f"#!/bin/sh\n{wrong}\n")
        assert machine.gpu(torch.device("cuda")) is None
    monkeypatch.setenv("PATH", "")
    assert machine.gpu(torch.device("cuda")) is None


def test_the_watch_does_not_count_this_processs_own_work():
    if machine.cpu_seconds(machine.core_numbers()) is None:
        pytest.skip("the machine's state can't be read here")

    def pair() -> bool:
        watch, end = machine.Watch(), time.perf_counter() + 1
        while time.perf_counter() < end:
            pass
        own = watch.read().foreign
        watch = machine.Watch()
        time.sleep(1)
        return own < watch.read().foreign + 0.5 / machine.cores()

    # Others may leave the machine between the two; its own work would be counted every time.
    assert any(pair() for _ in range(10))


def test_a_comparison_says_faster_only_beyond_the_floor():
    fast = comparison([record(0.050), record(0.052), record(0.051)])
    assert fast.verdict == "faster"
    assert fast.ratio.low > 1.04
    noisy = comparison([record(0.050, 0.05), record(0.052, -0.05), record(0.051, 0.0)])
    assert noisy.verdict == "inconclusive"
    assert fast.images_per_s["reference"]["median"] == pytest.approx(8 / 0.105, rel=0.05)
    assert fast.page_faults == {"reference": 8.0, "candidate": 0.5}


def test_a_machine_that_was_never_quiet_gives_no_verdict():
    found = comparison([record(0.050), record(0.052) | {"quiet": False}, record(0.051)])
    assert found.verdict == "inconclusive"
    assert "the machine was disturbed" in found.reason


def test_one_process_gives_no_verdict():
    found = comparison([record(0.5)])
    assert found.verdict == "one process, no verdict"
    assert found.fields()["ratio"] == pytest.approx(math.exp(0.5))
    assert found.fields()["ratio_low"] is None
    assert "one process, no interval" in str(found)


@pytest.mark.slow
def test_compare_times_two_equal_models_in_fresh_processes():
    a, b = vitx.build(CONFIG), vitx.build(CONFIG)
    said = []
    found = compare(a, b, torch.randn(4, 3, 12, 12), plan=QUICK, say=said.append)
    assert found.equality.passed
    assert len(found.processes) == 2
    assert found.ratio.low <= found.ratio.value <= found.ratio.high
    assert found.macs["reference"] == found.macs["candidate"] > 0
    assert found.resources["reference"]["peak_mib"] > 0
    assert 0 < found.timed_error["candidate"] < 1e-5
    assert sum("process" in line for line in said) == 2
    text = str(found)
    assert "95 %" in text
    assert "floor" in text
    fields = found.fields()
    assert {"ratio", "ratio_low", "ratio_high", "noise_floor", "verdict", "order"} <= set(fields)
    assert fields["keep_memory"]
    assert fields["page_faults"]["candidate"] >= 0
    assert all(order.count("r") == order.count("c") >= 6 for order in fields["order"])


@pytest.mark.slow
def test_compare_times_compiled_modules(compiled, tmp_path):
    a, b = (vitx.build(replace(CONFIG, depth=1)) for _ in range(2))
    plan = replace(QUICK, processes=1, compile="default", limit_s=900.0)
    found = compare(a, b, torch.randn(4, 3, 12, 12), plan=plan)
    assert found.verdict == "one process, no verdict", found.reason
    assert 0 < found.timed_error["candidate"] < 1e-5
    for side in ("reference", "candidate"):
        assert found.resources[side]["compile_s"]["cold"] > 0
    # The second start compiled nothing: what the first left was enough for it.
    worker.write(tmp_path / "job", plan, None, a, torch.randn(4, 3, 12, 12), None)
    codes = []
    with worker.Tasks(tmp_path / "job", plan) as tasks:
        for _ in range(2):
            assert "failure" not in tasks.run("alone", "candidate", cache=tmp_path / "cache")
            codes.append({path.name for path in (tmp_path / "cache").rglob("*.so")})
    assert codes[0] == codes[1] != set()


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_a_timed_process_keeps_the_memory_that_it_frees(tmp_path):
    """Megabytes an iteration cost page faults by default, and none once they are kept."""
    a = vitx.build(CONFIG)
    faults = {}
    for keep in (True, False):
        plan = replace(QUICK, block_s=0.1, pair_s=0.5, warm_up_s=1.0, keep_memory=keep)
        worker.write(tmp_path, plan, a, a, torch.randn(2000, 3, 12, 12), {})
        with worker.Tasks(tmp_path, plan) as tasks:
            found = tasks.run("pair", "0", cache=tmp_path / "cache")
        faults[keep] = statistics.median(found["page_faults"]["reference"])
    assert faults[True] < 1
    assert faults[False] > 100


@pytest.mark.slow
def test_models_in_float64_are_timed():
    a, b = (
        vitx.build(vitx.override(CONFIG, attention=core), dtype=torch.float64)
        for core in ("sdpa", "math")
    )
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    found = compare(a, b, images, plan=replace(QUICK, processes=1))
    assert found.ratio is not None, found.reason


def test_fresh_processes_get_this_processs_settings(tmp_path):
    a = vitx.build(CONFIG)
    torch.set_num_threads(2)
    try:
        worker.write(tmp_path, QUICK, a, a, torch.randn(4, 3, 12, 12), {})
    finally:
        torch.set_num_threads(1)
    with worker.Tasks(tmp_path, QUICK) as tasks:
        found = tasks.run("pair", "0", cache=tmp_path / "cache")
    assert found["threads"] == 2


def test_unequal_models_are_not_timed():
    a, b = vitx.build(CONFIG), vitx.build(vitx.override(CONFIG, norm="layernorm(eps=1e-3)"))
    found = compare(a, b, torch.randn(4, 3, 12, 12), plan=QUICK)
    assert found.verdict == "not timed"
    assert "outputs differ" in found.reason
    assert found.ratio is None


def test_a_crash_in_a_process_that_was_not_forked_has_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    worker.write(tmp_path, QUICK, Crash(), Crash(), torch.randn(4, 3), {})
    path = tmp_path / "job.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    with worker.Tasks(tmp_path, QUICK) as tasks:
        found = tasks.run("pair", "0", cache=tmp_path / "cache")
    assert found == {"failure": "RuntimeError: the kernel is broken", "rebuilt": True}


def test_a_crash_is_a_failure_with_its_last_words(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    found = compare(Crash(), Crash(), torch.randn(4, 3), plan=QUICK)
    assert found.verdict == "failed"
    assert found.reason == "RuntimeError: the kernel is broken"


def test_a_process_over_its_time_is_ended(tmp_path):
    a = vitx.build(CONFIG)
    plan = replace(QUICK, limit_s=0.2)
    worker.write(tmp_path, plan, a, a, torch.randn(4, 3, 12, 12), {})
    with worker.Tasks(tmp_path, plan) as tasks:
        found = tasks.run("alone", "reference", cache=tmp_path / "cache")
    assert found["failure"] == "the process took longer than 0 s and was ended"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked under Linux only")
def test_processes_are_forked_from_one_that_a_crash_does_not_end(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    a, broken = vitx.build(CONFIG), Crash()
    worker.write(tmp_path, QUICK, broken, broken, torch.randn(4, 3), {})
    with worker.Tasks(tmp_path, QUICK) as tasks:
        first = tasks.run("pair", "0", cache=tmp_path / "cache")
        server = tasks._server[0]
        worker.write(tmp_path, QUICK, a, a, torch.randn(4, 3, 12, 12), {})
        second = tasks.run("pair", "1", cache=tmp_path / "cache")
        assert tasks._server[0] is server
        assert server.poll() is None
    assert first == {"failure": "RuntimeError: the kernel is broken", "rebuilt": True}
    assert second["log_ratio"] is not None
    assert second["forked"]
    assert server.poll() is not None


@pytest.mark.slow
def test_what_may_not_be_forked_has_a_process_of_its_own_for_each_task(tmp_path):
    a = vitx.build(CONFIG)
    worker.write(tmp_path, QUICK, a, a, torch.randn(4, 3, 12, 12), {})
    path = tmp_path / "job.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    with worker.Tasks(tmp_path, QUICK) as tasks:
        for number in ("0", "1"):
            found = tasks.run("pair", number, cache=tmp_path / "cache")
            assert found["log_ratio"] is not None
            assert not found["forked"]
            assert tasks._server is None


def test_imports_that_start_threads_are_not_forked(tmp_path, monkeypatch):
    a = vitx.build(CONFIG)
    worker.write(tmp_path, QUICK, a, a, torch.randn(4, 3, 12, 12), {})
    monkeypatch.setattr(worker, "descendants", lambda process: set())
    assert worker._may_fork(tmp_path) == (sys.platform == "linux")
    numbers = itertools.count(3)
    monkeypatch.setattr(worker, "threads", lambda: next(numbers))
    assert not worker._may_fork(tmp_path)


@pytest.mark.slow
def test_limits_end_a_process_that_is_at_work_and_the_next_task_has_another(tmp_path):
    small, hang, hungry = (
        peers.make(f"python:{PLANTED}:{name}").module for name in ("small", "hang", "hungry")
    )
    image, others = torch.randn(1, 3, 16, 16), machine.descendants(os.getpid())
    with worker.Tasks(tmp_path, QUICK) as tasks:
        for module, limit_s, said in ((small, 120.0, ""), (hang, 2.0, "2 s"), (small, 120.0, "")):
            tasks._plan = replace(QUICK, limit_s=limit_s)
            worker.write(tmp_path, QUICK, None, module, image, None)
            found = tasks.run("pair", "0", cache=tmp_path / "cache")
            assert found.get("failure", "") == (said and f"the process took longer than {said} and "
                                                "was ended")  # fmt: skip
    with worker.Tasks(tmp_path, replace(QUICK, limit_gib=1.5)) as tasks:
        worker.write(tmp_path, QUICK, None, hungry, image, None)
        found = tasks.run("pair", "0", cache=tmp_path / "cache")
    assert "GiB of memory, more than 1.5, and was ended" in found["failure"]
    assert machine.descendants(os.getpid()) <= others


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists the threads of a process")
def test_a_process_that_ends_while_others_are_listed_is_left_out():
    """As `tree_mib` meets them, five times a second."""
    program = "import subprocess\nwhile True: subprocess.run(['true'])"
    with subprocess.Popen([sys.executable, "-c", program]) as child:
        start, most = time.monotonic(), 0
        while (passed := time.monotonic() - start) < 2 or (not most and passed < 60):
            most = max(most, len(machine.descendants(child.pid)))
        child.kill()
    assert most == 1


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the parent's end")
def test_all_processes_end_with_the_one_that_started_them(tmp_path):
    hang = peers.make(f"python:{PLANTED}:hang").module
    worker.write(tmp_path, QUICK, None, hang, torch.randn(1, 3, 16, 16), None)
    program = (
        "import sys; from pathlib import Path; from vitx.measure import timing, worker as job\n"
        "folder = Path(sys.argv[1])\n"
        "job.Tasks(folder, timing.TimingConfig()).run('pair', '0', cache=folder / 'cache')\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    # The task's own process, a fork, has its server's words; the server may start others first.
    words: list[str] = []
    end = time.monotonic() + 300
    while words.count("vitx.measure.worker") < 2 and time.monotonic() < end:
        time.sleep(0.1)
        started = machine.descendants(child.pid)
        words = [word for number in started for word in _command(number)]
    assert words.count("vitx.measure.worker") == 2
    child.kill()
    child.wait()
    end = time.monotonic() + 60
    while any(map(_alive, started)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(_alive, started))


def _command(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def _alive(process):
    status = Path(f"/proc/{process}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_without_a_compiler_the_compiled_configuration_fails_by_name(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    a = vitx.build(CONFIG)
    found = compare(a, a, torch.randn(4, 3, 12, 12), plan=replace(QUICK, compile="default"))
    assert found.verdict == "failed"
    assert "needs a C++ compiler" in found.reason


def test_what_no_other_process_can_rebuild_is_timed_in_one_without_verdict():
    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 7)

        def forward(self, x):
            return self.head(x)

    found = compare(Local(), Local(), torch.randn(4, 3), plan=QUICK)
    assert found.verdict == "one process, no verdict"
    assert "no fresh process could rebuild" in found.reason
    assert found.ratio is not None
    assert not found.fields()["keep_memory"]


def test_the_folder_of_pickles_and_compiled_code_is_private(tmp_path):
    worker.private_folder(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_wrong_plans_are_refused():
    with pytest.raises(ValueError, match="mode = 'infer' is not known"):
        TimingConfig(mode="infer")
    with pytest.raises(ValueError, match="compile = 'max' is not known"):
        TimingConfig(compile="max")
    with pytest.raises(ValueError, match="processes = 0 must be at least 1"):
        TimingConfig(processes=0)
    with pytest.raises(ValueError, match=r"warm_up_s = 0\.0 must be positive"):
        TimingConfig(warm_up_s=0.0)
    with pytest.raises(ValueError, match="example holds no image"):
        compare(nn.Linear(3, 5), nn.Linear(3, 5), torch.randn(0, 3))


@pytest.mark.timing
def test_a_model_against_itself_is_no_different():
    a = vitx.build(vitx.size("Ti/16", image=64))
    plan = TimingConfig(processes=5, pair_s=5.0)
    found = compare(a, a, torch.randn(8, 3, 64, 64), plan=plan)
    assert found.verdict in ("no difference seen", "inconclusive")


def test_a_model_by_itself_has_a_rate_and_no_ratio():
    found = timing.pair({"candidate": vitx.build(CONFIG)}, torch.randn(2, 3, 12, 12), QUICK, 0)
    assert found["log_ratio"] is None
    assert found["images"] == {"candidate": 2}
    assert len(found["seconds"]["candidate"]) >= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_inference_in_half_precision_and_training_under_autocast(dtype):
    image = torch.randn(2, 3, 12, 12)
    vit, half = timing.as_timed(vitx.build(CONFIG), image, replace(QUICK, dtype=dtype))
    assert half.dtype == next(vit.parameters()).dtype == getattr(torch, dtype)
    plan = replace(QUICK, dtype=dtype, mode="training")
    vit, given = timing.as_timed(vitx.build(CONFIG), image, plan)
    assert given.dtype == next(vit.parameters()).dtype == torch.float32
    before = vit.head.weight.detach().clone()
    step = timing.make_step(vit, None, given, plan)
    for _ in range(20):  # float16 finds its scale first
        metrics = step()
    assert metrics["loss"].isfinite()
    assert not torch.equal(before, vit.head.weight)


def test_limits_of_time_and_memory_end_a_process_with_its_children(tmp_path):
    mark, begun = tmp_path / "alive", tmp_path / "begun"
    child = f"import time; open({str(begun)!r}, 'w'); time.sleep(6); open({str(mark)!r}, 'w')"
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    slow = [sys.executable, "-c", f"{start}; import time; time.sleep(60)"]
    code, words = worker.run_limited(slow, os.environ, limit_s=3.0, limit_gib=0.0)
    assert (code, words) == (-1, "the process took longer than 3 s and was ended")
    assert begun.exists()
    hungry = [sys.executable, "-c", "x = bytearray(2**29); import time; time.sleep(60)"]
    code, words = worker.run_limited(hungry, os.environ, limit_s=60.0, limit_gib=0.3)
    assert code == -1
    assert "GiB of memory, more than 0.3, and was ended" in words
    wrong = [sys.executable, "-c", "raise RuntimeError('so it goes')"]
    assert worker.run_limited(wrong, os.environ, limit_s=60.0, limit_gib=1.0) == (
        1, "RuntimeError: so it goes",
    )  # fmt: skip
    time.sleep(4)
    assert not mark.exists()


def test_the_step_of_a_module_is_the_trainers(monkeypatch):
    """With clipping and the optimizer: the weights change as by the trainer."""
    vit = vitx.build(CONFIG)
    before = vit.head.weight.detach().clone()
    timing.make_step(vit, None, torch.randn(4, 3, 12, 12), replace(QUICK, mode="training"))()
    assert 0 < (vit.head.weight - before).abs().max() < 1e-4
    assert vit.training
