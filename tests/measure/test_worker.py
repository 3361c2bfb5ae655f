"""Worker processes: forked or not, their limits, their last words, and their end."""

import itertools
import os
import pickle
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_compare import CONFIG, QUICK, Crash

import vitx
from benchmarks import peers
from vitx.measure import jobs, machine, tasks, worker
from vitx.measure.worker import TaskFailed, Workers

PLANTED = Path(__file__).parents[1] / "planted.py"
IMAGE = torch.randn(4, 3, 12, 12)
BROKEN = "RuntimeError: the kernel is broken"


@pytest.fixture
def importable(monkeypatch):
    """Worker processes find this folder's modules."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_a_timed_process_keeps_the_memory_that_it_frees(tmp_path):
    """Megabytes per iteration cost page faults by default, and none once they are kept."""
    a = vitx.build(CONFIG)
    faults = {}
    for keep in (True, False):
        config = replace(QUICK, block_s=0.1, pair_s=0.5, warm_up_s=1.0, keep_memory=keep)
        job = jobs.write(tmp_path, config, a, a, torch.randn(2000, 3, 12, 12), {})
        with Workers() as workers:
            times = workers.run(job, tmp_path / "cache", tasks.pair, 0)
        blocks = times.blocks(["reference"])
        faults[keep] = statistics.median(block.page_faults for block in blocks)
    assert faults[True] < 1
    assert faults[False] > 100


def test_fresh_processes_get_this_processs_settings(tmp_path):
    a = vitx.build(CONFIG)
    torch.set_num_threads(2)
    try:
        job = jobs.write(tmp_path, QUICK, a, a, IMAGE, {})
    finally:
        torch.set_num_threads(1)
    with Workers() as workers:
        assert workers.run(job, tmp_path / "cache", tasks.pair, 0).threads == 2


def test_a_crash_in_a_process_that_was_not_forked_has_its_last_words(tmp_path, importable):
    job = jobs.write(tmp_path, QUICK, Crash(), Crash(), torch.randn(4, 3), {})
    with Workers() as workers, pytest.raises(TaskFailed, match=BROKEN):
        workers.run(replace(job, device="cuda"), tmp_path / "cache", tasks.pair, 0)


def test_a_process_over_its_time_is_ended(tmp_path):
    a = vitx.build(CONFIG)
    job = jobs.write(tmp_path, replace(QUICK, limit_s=0.2), a, a, IMAGE, {})
    with Workers() as workers, pytest.raises(TaskFailed) as failed:
        workers.run(job, tmp_path / "cache", tasks.alone, "reference")
    assert str(failed.value) == "the process took longer than 0 s and was ended"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked under Linux only")
def test_processes_are_forked_from_one_that_a_crash_does_not_end(tmp_path, importable):
    a, broken = vitx.build(CONFIG), Crash()
    job = jobs.write(tmp_path, QUICK, broken, broken, torch.randn(4, 3), {})
    with Workers() as workers:
        with pytest.raises(TaskFailed) as failed:
            workers.run(job, tmp_path / "cache", tasks.pair, 0)
        server, _ = workers._server
        job = jobs.write(tmp_path, QUICK, a, a, IMAGE, {})
        times = workers.run(job, tmp_path / "cache", tasks.pair, 1)
        assert workers._server[0] is server
        assert server.poll() is None
    assert type(failed.value) is TaskFailed
    assert str(failed.value) == BROKEN
    assert times.paired
    assert times.forked
    assert server.poll() is not None


@pytest.mark.slow
def test_what_may_not_be_forked_has_a_process_of_its_own_for_each_task(tmp_path):
    a = vitx.build(CONFIG)
    job = replace(jobs.write(tmp_path, QUICK, a, a, IMAGE, {}), device="cuda")
    with Workers() as workers:
        for number in (0, 1):
            times = workers.run(job, tmp_path / "cache", tasks.pair, number)
            assert times.paired
            assert not times.forked
            assert workers._server is None


def test_imports_that_start_threads_are_not_forked(tmp_path, monkeypatch):
    a = vitx.build(CONFIG)
    job = jobs.write(tmp_path, QUICK, a, a, IMAGE, {})
    monkeypatch.setattr(worker, "descendants", lambda process: set())
    monkeypatch.setattr(worker, "threads", lambda: 3)
    assert worker._may_fork(job) == (sys.platform == "linux")
    numbers = itertools.count(3)
    monkeypatch.setattr(worker, "threads", lambda: next(numbers))
    assert not worker._may_fork(job)


@pytest.mark.slow
def test_limits_end_a_process_that_is_at_work_and_the_next_task_has_another(tmp_path):
    small, hang, hungry = (
        peers.make(f"python:{PLANTED}:{name}").module for name in ("small", "hang", "hungry")
    )
    image, others = torch.randn(1, 3, 16, 16), machine.descendants(os.getpid())

    def run(workers, module, **limits):
        job = jobs.write(tmp_path, replace(QUICK, **limits), None, module, image, None)
        return workers.run(job, tmp_path / "cache", tasks.pair, 0)

    with Workers() as workers:
        run(workers, small)
        with pytest.raises(TaskFailed, match="the process took longer than 2 s and was ended"):
            run(workers, hang, limit_s=2.0)
        run(workers, small)
        with pytest.raises(TaskFailed, match=r"GiB of memory, more than 1\.5, and was ended"):
            run(workers, hungry, limit_gib=1.5)
    assert machine.descendants(os.getpid()) <= others


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the parent's end")
def test_all_processes_end_with_the_one_that_started_them(tmp_path):
    hang = peers.make(f"python:{PLANTED}:hang").module
    job = jobs.write(tmp_path, QUICK, None, hang, torch.randn(1, 3, 16, 16), None)
    (tmp_path / "job.pkl").write_bytes(pickle.dumps(job))
    program = (
        "import pickle, sys; from pathlib import Path; from vitx.measure import tasks, worker\n"
        "folder = Path(sys.argv[1])\n"
        "job = pickle.loads((folder / 'job.pkl').read_bytes())\n"
        "worker.Workers().run(job, folder / 'cache', tasks.pair, 0)\n"
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


def test_the_folder_of_pickles_and_compiled_code_is_private(tmp_path):
    jobs.private_folder(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_limits_of_time_and_memory_end_a_process_with_its_children(tmp_path):
    mark, begun = tmp_path / "alive", tmp_path / "begun"
    child = f"import time; open({str(begun)!r}, 'w'); time.sleep(12); open({str(mark)!r}, 'w')"
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    slow = [sys.executable, "-c", f"{start}; import time; time.sleep(60)"]
    code, words = worker.run_limited(slow, os.environ, limit_s=8.0, limit_gib=0.0)
    assert (code, words) == (-1, "the process took longer than 8 s and was ended")
    assert begun.exists()
    hungry = [sys.executable, "-c", "x = bytearray(2**29); import time; time.sleep(60)"]
    code, words = worker.run_limited(hungry, os.environ, limit_s=60.0, limit_gib=0.3)
    assert code == -1
    assert "GiB of memory, more than 0.3, and was ended" in words
    wrong = [sys.executable, "-c", "raise RuntimeError('so it goes')"]
    assert worker.run_limited(wrong, os.environ, limit_s=60.0, limit_gib=1.0) == (
        1, "RuntimeError: so it goes",
    )  # fmt: skip
    time.sleep(6)
    assert not mark.exists()
