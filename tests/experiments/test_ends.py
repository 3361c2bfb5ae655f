"""How programs end: errors of workers, signals, closed pipes, too little memory, names and runs."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from picture_files import folders, picture

from experiments import cli, predict, train
from experiments.recipes import DIGITS
from experiments.study.pages import ROOT
from vitx.files import Lock
from vitx.settings import override
from vitx.training import checkpoint

TINY = ["--data.name=imagefolder", "--weights=", "--model.image=32", "--model.patch=8",
        "--model.width=48", "--model.depth=2", "--model.heads=4", "--steps=4", "--batch=4",
        "--eval-every=2", "--device=cpu", "--wandb=disabled"]  # fmt: skip


def call(program, *words):
    """Run a program as its command does; its exit status."""
    try:
        cli.run(program.main, list(map(str, words)))
    except SystemExit as stopped:
        return stopped.code
    return 0


def tiny(root, classes, *more):
    return ["finetune-beans", *TINY, f"--data.root={root}", f"--model.classes={classes}", *more]


@pytest.fixture
def trained(tmp_path, unchecked, capsys):
    root = folders(tmp_path / "data", splits=("train", "val", "test"), classes=["a", "b"])
    assert call(train, *tiny(root, 2, f"--folder={tmp_path}/run")) == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_a_folder_with_odd_files_still_has_its_pictures_classified(trained, tmp_path, capsys):
    for name in ("a.png", "b.jpg", "c.gif"):
        (tmp_path / "mixed").mkdir(exist_ok=True)
        picture().save(tmp_path / "mixed" / name)
    (tmp_path / "mixed" / "._a.png").write_bytes(bytes(64))
    (tmp_path / "mixed" / "notes.pdf").write_bytes(b"%PDF-1.4")
    assert call(predict, trained, tmp_path / "mixed") == 0
    said = capsys.readouterr()
    assert [line.split(": ")[0][-5:] for line in said.out.splitlines()] == [
        "a.png", "b.jpg", "c.gif",
    ]  # fmt: skip
    assert "passed over 2 files: 1 .pdf, 1 hidden" in said.err
    assert "._a.png" in said.err
    (tmp_path / "mixed" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    assert call(predict, trained, tmp_path / "mixed") == 2
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 3
    assert "cut.jpg can't be decoded" in said.err
    assert "1 of 4 pictures are not classified" in said.err


def test_names_that_are_no_utf8_are_shown_escaped(trained, tmp_path, capsys):
    (tmp_path / "p").mkdir()
    picture().save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", os.fsencode(tmp_path / "p") + b"/caf\xe9.png")
    assert call(predict, trained, tmp_path / "p") == 0
    assert r"caf\xe9.png: " in capsys.readouterr().out


def test_weights_that_are_not_finite_classify_nothing(trained, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    path = trained / "model.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    state = load_file(path)
    state["norm.bias"][0] = torch.nan
    save_file(state, path, metadata)
    picture().save(tmp_path / "x.png")
    assert call(predict, trained, tmp_path / "x.png") == 2
    assert "the outputs for 1 of 1 images are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("cut", ["state", "config", "skipped"])
def test_a_checkpoint_without_an_entry_is_one_sentence(trained, tmp_path, capsys, cut):
    content = checkpoint.load(trained)
    del content[cut]
    checkpoint.save(trained, content)
    words = tiny(tmp_path / "data", 2, f"--folder={trained}", "--resume")
    assert call(train, *words) == 2
    assert f"holds no '{cut}': start a new run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["norm.bias", "blocks.0.attn.qkv.weight"])
def test_a_checkpoint_without_a_tensor_is_one_sentence(trained, tmp_path, capsys, name):
    content = checkpoint.load(trained)
    del content["state"]["model"][name]
    checkpoint.save(trained, content)
    words = tiny(tmp_path / "data", 2, f"--folder={trained}", "--resume")
    assert call(train, *words) == 2
    assert "is not of this model: RuntimeError" in capsys.readouterr().err


def test_a_run_is_resumed_by_its_settings_and_not_by_its_name(tmp_path, unchecked, capsys):
    rates = ("0.0010000001", "0.0010000002")
    words = ["digits", "--batch=16", "--device=cpu", "--wandb=disabled", f"--out={tmp_path}"]
    for rate in rates:
        assert call(train, *words, "--steps=2", f"--optim.lr={rate}") == 0
    capsys.readouterr()
    assert call(train, *words, "--steps=2", f"--optim.lr={rates[0]}", "--resume") == 0
    said = capsys.readouterr().out
    (folder,) = {line for line in said.splitlines() if line.startswith("run: ")}
    assert f'"optim.lr": {rates[0]}' in (tmp_path / folder[5:] / "config.json").read_text()
    assert call(train, *words, "--steps=3", f"--optim.lr={rates[0]}", "--resume") == 2
    assert "holds no run of these settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (["digits", "--steps=50"], "100 is not shorter than steps = 50"),
        (["places365", "--steps=1000"], "is not shorter than steps = 1000"),
        (["digits", "--steps=101"], ""),
    ],
)
def test_a_warm_up_as_long_as_the_run_is_said(words, warning, capsys):
    assert call(train, *words, "--dry-run") == 0
    assert (warning in capsys.readouterr().err) if warning else not capsys.readouterr().err


def test_too_little_memory_is_a_sentence_with_its_size(capsys):
    assert call(train, "digits", "--steps=2", "--model.width=48000000", "--wandb=disabled") == 2
    assert "the memory does not suffice for" in capsys.readouterr().err


def test_a_folder_without_locks_is_named(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(OSError, match=r"no locks: Function not implemented.*/run"):
        Lock(tmp_path / "run")


def test_rank_without_torchrun_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert call(train, "digits", "--steps=2") == 2
    assert "WORLD_SIZE = ''; torchrun sets both" in capsys.readouterr().err


@pytest.mark.slow
def test_an_error_with_workers_ends_the_program(tmp_path):
    root = folders(tmp_path / "data", splits=("train", "val"), classes=["a", "b"])
    program = (
        "import vitx.training.trainer as t\n"
        "from experiments import cli, train\n"
        "def step(*_): raise RuntimeError('broken')\n"
        "t.step = step\n"
        f"cli.run(train.main, {tiny(root, 2, '--data.workers=2', f'--folder={tmp_path}/run')!r})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("RuntimeError: broken")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hang up", "closed pipe"])
def test_a_lost_terminal_saves_and_leaves(tmp_path, how):
    command = [sys.executable, "-m", "experiments.train", "digits", "--steps=5000",
               f"--folder={tmp_path}/run", "--log-every=5", "--save-every=5000",
               "--wandb=disabled"]  # fmt: skip
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 300
        while not child.stdout.readline().startswith("step "):
            assert time.monotonic() < deadline
        if how == "hang up":
            child.send_signal(signal.SIGHUP)
            _, errors = child.communicate(timeout=300)
        else:
            child.stdout.close()
            errors = child.stderr.read()
            child.wait(timeout=300)
    finally:
        child.kill()
    assert child.returncode == (129 if how == "hang up" else 141), errors
    assert "the state is saved; go on with: --resume" in errors
    assert (tmp_path / "run" / "last.ckpt").exists()


def test_all_output_is_written_whatever_the_encoding(tmp_path):
    program = "from experiments import cli; cli.run(lambda _: print('犬'), [])"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, b"\\u72ac\n")


def test_settings_that_are_cut_alike_in_names_are_told_apart():
    long = {"model.mlp_ratio": 3.5, "model.layer_scale": 0.25, "data.rotate": 11.0,
            "data.scale": 0.125, "data.shear": 0.25, "optim.beta1": 0.875}  # fmt: skip
    a, b = (override(DIGITS, **long, **{"optim.label_smoothing": v}) for v in (0.1, 0.2))
    assert train.identity(a) != train.identity(b)
