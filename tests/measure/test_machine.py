"""The machine's state: what disturbs a round, and what processes use."""

import os
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import torch

from vitx.measure import machine
from vitx.measure.machine import Machine

BUSY = "import time; end = time.time() + 3\nwhile time.time() < end: pass"


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
    assert state.is_disturbed(highest) == disturbed


def test_the_watch_sees_another_process_at_work():
    if machine.cpu_seconds(machine.core_numbers()) is None:
        pytest.skip("the machine's state can't be read here")
    child = subprocess.Popen([sys.executable, "-c", BUSY])
    time.sleep(1)
    watch = machine.Watch()
    time.sleep(1)
    state = watch.read()
    child.wait()
    assert state.foreign > 0.5 / machine.cores()


@pytest.mark.parametrize("then", ["", "time.sleep(60)"])
def test_the_work_of_children_counts_as_own_where_it_should(then):
    """Of one that has ended, and of one that lives on."""
    start, start_of_tree = (machine._own_seconds(tree=tree) for tree in (False, True))
    work = f"import time\nwhile time.process_time() < 0.5: pass\n{then}"
    end = time.monotonic() + 60
    with subprocess.Popen([sys.executable, "-c", work]) as child:
        while machine._own_seconds(tree=True) < start_of_tree + 0.45 and time.monotonic() < end:
            if child.poll() is None:
                time.sleep(0.1)
        together = machine._own_seconds(tree=True) - start_of_tree
        child.kill()
    alone = machine._own_seconds(tree=False) - start
    assert together - alone > 0.3


def test_cores_that_the_system_does_not_list_are_not_read():
    assert machine.cpu_seconds({100_000}) is None
    assert machine.cpu_seconds({0, 100_000}) is None
    assert machine.cpu_seconds(set()) is None


def test_the_clock_is_that_of_the_cores_in_use(monkeypatch):
    listed = [types.SimpleNamespace(current=clock) for clock in (1000.0, 2000.0, 3000.5)]
    monkeypatch.setattr(psutil, "cpu_freq", lambda percpu: listed)
    monkeypatch.setattr(machine, "_configured_cores", lambda: 3)
    assert machine.clocks_mhz() == [1000.0, 2000.0, 3000.5]
    for cores, clock in (({2}, 3000.5), ({0, 2}, 2000.25)):
        monkeypatch.setattr(machine, "core_numbers", lambda cores=cores: cores)
        monkeypatch.setattr(machine, "cpu_seconds", lambda numbers: None)
        assert machine.Watch().read().clock_mhz == clock
    monkeypatch.setattr(machine, "_configured_cores", lambda: 6)  # a clock for two cores each
    assert machine.Watch().read().clock_mhz == pytest.approx(2000, abs=1)


def test_a_gpus_readings_are_those_of_nvidia_smi(tmp_path, monkeypatch):
    words, program = tmp_path / "words", tmp_path / "nvidia-smi"
    values = "570.86, 1980, 2619, 412.53, 700.00, 44, 0x0000000000000000"
    program.write_text(f'#!/bin/sh\necho "$@" > {words}\necho "{values}"\n')
    program.chmod(0o700)
    properties = types.SimpleNamespace(uuid="12ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    readings = machine.gpu(torch.device("cuda"))
    assert (readings["driver_version"], readings["clocks.sm"], readings["power.draw"]) == (
        "570.86", "1980", "412.53",
    )  # fmt: skip
    assert words.read_text().startswith("--id=GPU-12ab --query-gpu=driver_version,clocks.sm,")
    words.unlink()
    assert machine.gpu(torch.device("cpu")) is None
    assert not words.exists()
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


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.parametrize(
    ("listed", "limit"),
    [
        ("0::/job/step", "job/memory.max"),  # version 2, of the group around
        ("0::/outside/of/the/container", "memory.max"),  # as a container sees its own
        ("4:memory:/job\n0::/", "memory/job/memory.limit_in_bytes"),  # version 1
        ("4:cpu,memory:/outside\n0::/", "memory/memory.limit_in_bytes"),
    ],
)
def test_memory_is_what_the_control_groups_leave(tmp_path, monkeypatch, listed, limit):
    real = Path.read_text

    def read(path, *given, **how):
        return listed if path == Path("/proc/self/cgroup") else real(path, *given, **how)

    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine.Path, "read_text", read)
    path = tmp_path / limit
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("max\n")
    assert machine.memory_gib() > 1
    path.write_text(f"{2**30}\n")
    assert machine.memory_gib() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists the threads of a process")
def test_a_process_that_ends_while_others_are_listed_is_left_out():
    """As `tree_mib` meets them, five times a second."""
    program = "import subprocess\nwhile True: subprocess.run(['true'])"
    with subprocess.Popen([sys.executable, "-c", program]) as child:
        try:
            start, most = time.monotonic(), 0
            while (passed := time.monotonic() - start) < 2 or (not most and passed < 60):
                most = max(most, len(machine.descendants(child.pid)))
        finally:
            child.kill()
    assert most == 1
