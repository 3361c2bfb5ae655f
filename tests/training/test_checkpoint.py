"""Checkpoints: whole or refused, the one before as fallback, one trainer a folder, nothing run."""

import os
import pickle
import random

import pytest
import torch

from vitx import files
from vitx.files import Damaged, Lock
from vitx.training import checkpoint


def state(number):
    return {"steps_done": number, "weights": torch.full((1000,), float(number))}


def test_a_saved_state_is_read_back(tmp_path):
    checkpoint.save(tmp_path, state(1))
    path = checkpoint.save(tmp_path, state(2))
    assert torch.equal(checkpoint.load(tmp_path)["weights"], state(2)["weights"])
    assert checkpoint.read(tmp_path / checkpoint.BEFORE)["steps_done"] == 1
    assert {saved.name for saved in tmp_path.iterdir()} == {path.name, checkpoint.BEFORE}


def test_a_damaged_file_never_takes_the_good_ones_place(tmp_path):
    checkpoint.save(tmp_path, state(1))
    path = checkpoint.save(tmp_path, state(2))
    path.write_bytes(path.read_bytes()[:-1])
    assert checkpoint.load(tmp_path)["steps_done"] == 1
    assert path.exists()  # reading moves nothing: another trainer may hold the folder
    checkpoint.set_aside(tmp_path)
    checkpoint.save(tmp_path, state(3))
    assert checkpoint.read(tmp_path / checkpoint.BEFORE)["steps_done"] == 1
    assert checkpoint.load(tmp_path)["steps_done"] == 3
    checkpoint.set_aside(tmp_path)
    assert checkpoint.load(tmp_path)["steps_done"] == 3


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_file_is_refused_and_the_one_before_is_taken(tmp_path, damage, capsys):
    checkpoint.save(tmp_path, state(1))
    path = checkpoint.save(tmp_path, state(2))
    whole = bytearray(path.read_bytes())
    generator = random.Random(0)
    for _ in range(20):
        place = generator.randrange(len(whole))
        changed = bytearray(whole)
        changed[place] ^= 1 << generator.randrange(8)
        path.write_bytes(
            {"cut": whole[:place], "flip": changed, "empty": b"", "text": b"hello\n"}[damage]
        )
        with pytest.raises(Damaged, match=str(path)):
            checkpoint.read(path)
        assert checkpoint.load(tmp_path)["steps_done"] == 1
        assert "going on from before.ckpt" in capsys.readouterr().err


def test_without_any_checkpoint_the_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoint.load(tmp_path)


def test_what_would_run_code_is_refused(tmp_path):
    import hashlib

    canary = tmp_path / "canary"

    class Bad:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    for body in (pickle.dumps(Bad()), _torch_file(Bad())):
        header = f"{checkpoint.FORMAT} {len(body)} {hashlib.sha256(body).hexdigest()}\n"
        path = tmp_path / checkpoint.LAST
        path.write_bytes(header.encode() + body)
        with pytest.raises(Damaged, match="is no file of plain tensors"):
            checkpoint.read(path)
        assert not canary.exists()


def _torch_file(value):
    import io

    buffer = io.BytesIO()
    torch.save({"weights": value}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_a_full_disk_keeps_the_last_good_file_and_names_the_path(tmp_path, monkeypatch, moment):
    checkpoint.save(tmp_path, state(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        *{"write": (files, "write_through"), "replace": (os, "replace")}[moment], full
    )
    with pytest.raises(
        OSError, match="No space left on device; what was saved before is whole"
    ) as found:
        checkpoint.save(tmp_path, state(2))
    assert found.value.filename == str(tmp_path / checkpoint.LAST)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path)["steps_done"] == 1
    assert not list(tmp_path.glob("*.new"))


def test_a_second_trainer_in_the_folder_is_refused(tmp_path):
    lock = Lock(tmp_path)
    with pytest.raises(ValueError, match=f"is in use by another trainer .process {os.getpid()}"):
        Lock(tmp_path)
    lock.close()
    Lock(tmp_path).close()
