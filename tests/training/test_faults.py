"""Kills, signals, full disks, damaged and malicious files: `pytest -m campaign` runs all of them.

A plain `pytest` runs one of each kind of kill. The campaign leaves its counts in runs/campaign as
rows, from which tests/README is rendered.
"""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dying import POINTS

import vitx
from vitx.files import Damaged
from vitx.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 240, 12
WORDS = ["digits", f"--steps={STEPS}", f"--save-every={EVERY}", "--log-every=5", "--batch=64",
         "--eval-every=60", "--ema=0.9", "--model.drop=0.1", "--optim.warmup-steps=10",
         "--wandb=disabled", "--device=cpu"]  # fmt: skip


def start(*words: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def program(folder: Path, *more: str) -> list[str]:
    return ["-m", "experiments.train", *WORDS, f"--folder={folder}", *more]


def finish(child: subprocess.Popen) -> str:
    """Wait for success; its errors."""
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors[-2000:]
    return errors


def result(folder: Path) -> tuple[dict, list[dict]]:
    """The last state, and the events without the times in them."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    for event in events:
        event.pop("images_per_s", None)
    return checkpoint.read(folder / checkpoint.LAST)["state"], events


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing disturbed, and the seconds from its first save to its end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    child = start(*program(folder))
    wait_for_a_save(child, folder)
    saved = time.monotonic()
    finish(child)
    return result(folder), time.monotonic() - saved


def wait_for_a_save(child: subprocess.Popen, folder: Path) -> None:
    while not (folder / checkpoint.LAST).exists():
        assert child.poll() is None, child.communicate()[1][-2000:]
        time.sleep(0.002)


def steps_done(folder: Path) -> int:
    return checkpoint.load(folder)["state"]["steps_done"]


def killed_at_a_time(folder: Path, delays: Iterator[float], number: int) -> int:
    """Send a signal so many seconds after the first save; the exit status.

    On a machine that others use a training may be over before: then the next delay is tried.
    """
    while True:
        child = start(*program(folder))
        wait_for_a_save(child, folder)
        time.sleep(next(delays))
        child.send_signal(number)
        child.communicate(timeout=60)
        if steps_done(folder) < STEPS:
            return child.returncode
        shutil.rmtree(folder)


def drawn(seed: int, most: float) -> Iterator[float]:
    """Numbers up to `most`, at most 100 of them."""
    generator = random.Random(seed)
    return iter([generator.uniform(0, most) for _ in range(100)])


def resumed(folder: Path) -> tuple[dict, list[dict]]:
    finish(start(*program(folder, "--resume")))
    return result(folder)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["half written", "between renames"])
def test_a_kill_inside_a_save_loses_nothing(whole, tmp_path, point):
    child = start("tests/dying.py", point, "3", *WORDS, f"--folder={tmp_path / 'run'}")
    child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert steps_done(tmp_path / "run") in (2 * EVERY, 3 * EVERY)
    assert same(resumed(tmp_path / "run"), whole[0])


@pytest.mark.campaign
def test_kills_at_drawn_moments_are_resumed_to_the_same_bits(whole, tmp_path, record):
    generator, identical, at = random.Random(0), 0, []
    delays = drawn(0, 0.9 * whole[1])
    for trial in range(30):
        folder = tmp_path / f"{trial}"
        assert killed_at_a_time(folder, delays, signal.SIGKILL) == -signal.SIGKILL
        at.append(steps_done(folder))
        identical += same(resumed(folder), whole[0])
    for trial in range(15):
        folder, point = tmp_path / f"inside-{trial}", POINTS[trial % len(POINTS)]
        number = generator.randrange(2, STEPS // EVERY)
        child = start("tests/dying.py", point, str(number), *WORDS, f"--folder={folder}")
        child.communicate(timeout=120)
        assert child.returncode == -signal.SIGKILL
        identical += same(resumed(folder), whole[0])
    record("kill -9", trials=45, passed=identical, inside_a_save=15, different_steps=len(set(at)))
    assert identical == 45


@pytest.mark.campaign
def test_sigterm_saves_and_is_resumed_to_the_same_bits(whole, tmp_path, record):
    delays, passed = drawn(1, 0.8 * whole[1]), 0
    for trial in range(20):
        folder = tmp_path / f"{trial}"
        status = killed_at_a_time(folder, delays, signal.SIGTERM)
        passed += status == 143 and same(resumed(folder), whole[0])
    record("SIGTERM", trials=20, passed=passed)
    assert passed == 20


@pytest.fixture(scope="module")
def state():
    """A state of the size of a small run's."""
    generator = torch.Generator().manual_seed(0)
    values = {f"{k}": torch.randn(64, 64, generator=generator) for k in range(12)}
    return {"state": values, "config": {"seed": 0}, "seconds": [0.0, 0.0]}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB in memory; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a full disk needs the right to mount a small one")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.campaign
def test_a_full_disk_keeps_the_last_good_file_and_names_the_path(small_disk, state, record):
    passed = 0
    size = checkpoint.save(small_disk, state).stat().st_size
    for trial in range(10):
        room = trial * size // 10
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        (small_disk / "filler").write_bytes(b"x" * max(free - room, 0))
        with pytest.raises(OSError, match="No space left on device") as found:
            checkpoint.save(small_disk, state)
        whole = same(checkpoint.load(small_disk), state)
        named = found.value.filename == str(small_disk / checkpoint.LAST)
        passed += whole and named and not (small_disk / f"{checkpoint.LAST}.new").exists()
        (small_disk / "filler").unlink()
    record("disk full", trials=10, passed=passed)
    assert passed == 10


@pytest.mark.campaign
def test_a_run_on_a_full_disk_says_where(small_disk):
    (small_disk / "filler").write_bytes(b"x" * 850_000)
    child = start(*program(small_disk / "run"))
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 2
    assert "No space left on device" in errors
    assert str(small_disk / "run") in errors
    assert "Traceback" not in errors


@pytest.mark.campaign
@pytest.mark.parametrize("damage", ["truncation", "flipped bit"])
def test_damaged_checkpoints_are_refused_and_the_one_before_is_taken(
    tmp_path, state, record, damage, capsys
):
    before = state | {"seconds": [1.0, 1.0]}
    checkpoint.save(tmp_path, before)
    path = checkpoint.save(tmp_path, state)
    whole, generator, passed = path.read_bytes(), random.Random(2), 0
    for _ in range(100):
        place = generator.randrange(len(whole))
        changed = bytearray(whole)
        changed[place] ^= 1 << generator.randrange(8)
        path.write_bytes(whole[:place] if damage == "truncation" else changed)
        with pytest.raises(Damaged, match=str(path)):
            checkpoint.read(path)
        passed += same(checkpoint.load(tmp_path), before)
        assert "going on from before.ckpt" in capsys.readouterr().err
    record(damage, trials=100, passed=passed)
    assert passed == 100


class Runs:
    """A value whose pickle runs a command."""

    def __init__(self, function, *arguments):
        self.what = (function, arguments)

    def __reduce__(self):
        return self.what


def malicious(canary: Path) -> dict[str, bytes]:
    """Pickles that would make the canary, by the ways that pickles have."""
    command = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w')"

    def zipped(value: object) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    def legacy(value: object) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=False)
        return buffer.getvalue()

    tensor = torch.zeros(3)
    return {
        "os.system": pickle.dumps(Runs(os.system, command)),
        "eval": pickle.dumps(Runs(eval, code)),
        "exec": pickle.dumps(Runs(exec, code)),
        "open": pickle.dumps(Runs(open, str(canary), "w")),
        "subprocess": pickle.dumps(Runs(subprocess.Popen, ["touch", str(canary)])),
        "global opcode": b"cos\nsystem\n(V" + command.encode() + b"\ntR.",
        "inst opcode": b"(V" + command.encode() + b"\nios\nsystem\n.",
        "obj opcode": b"(cos\nsystem\nV" + command.encode() + b"\no.",
        "build opcode": b"ccollections\nOrderedDict\n)R}(V__setstate__\ncos\nsystem\nubV"
        + command.encode()
        + b"\nb.",
        "in a zip": zipped({"state": Runs(os.system, command)}),
        "beside tensors": zipped({"w": tensor, "more": [Runs(eval, code)]}),
        "in the old format": legacy({"w": tensor, "more": Runs(os.system, command)}),
        "a module": zipped(torch.nn.Linear(2, 2)),
    }


@pytest.mark.campaign
def test_malicious_files_are_refused_and_nothing_runs(tmp_path, record):
    canary, passed = tmp_path / "canary", 0
    files = malicious(canary)
    for body in files.values():
        header = f"{checkpoint.FORMAT} {len(body)} {hashlib.sha256(body).hexdigest()}\n"
        (tmp_path / checkpoint.LAST).write_bytes(header.encode() + body)
        (tmp_path / "weights.pt").write_bytes(body)
        with pytest.raises(Damaged, match="is no file of plain tensors"):
            checkpoint.load(tmp_path)
        with pytest.raises(ValueError, match="is no file of plain tensors"):
            vitx.load(tmp_path / "weights.pt")
        time.sleep(0.05)
        passed += not canary.exists()
    record("malicious pickle", trials=len(files), passed=passed)
    assert passed == len(files)


KINDS = ("os.system", "eval", "exec", "open", "subprocess", "global opcode", "inst opcode",
         "obj opcode", "build opcode")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_canary_would_be_made_by_a_reader_that_trusts(tmp_path, kind):
    canary = tmp_path / "canary"
    loaded = pickle.loads(malicious(canary)[kind])
    if isinstance(loaded, subprocess.Popen):
        loaded.wait()
    assert canary.exists()
