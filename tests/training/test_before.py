"""Run folders of earlier versions: their weights load, their checkpoint goes on to the same bits.

`before/` was written by version 0.1.0 (commit 04a8099): six steps of a tiny model on digits. Its
checkpoint is that of step 3, its weights are those of step 6.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vitx
from experiments.study.runs import ended, read_config
from vitx.interop import weights
from vitx.training import checkpoint, tracking
from vitx.training.config import identity
from vitx.training.prepare import prepare
from vitx.training.trainer import train

FOLDER = Path(__file__).with_name("before")


def events(folder):
    return [{name: value for name, value in event.items() if name != tracking.IMAGES_PER_S}
            for event in tracking.read_events(folder)]  # fmt: skip


def test_the_weights_load_with_what_is_said_of_them():
    vit = vitx.load(FOLDER)
    stored = load_file(FOLDER / weights.FILE)
    assert vit.state_dict().keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in vit.state_dict().items())
    about = weights.describe(FOLDER)
    assert about.classes == tuple("0123456789")
    assert about.preprocessing.resize == "squash"
    assert vit(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_run_folder_is_read():
    config = read_config(FOLDER)
    assert (config.steps, config.ema, config.model.width, config.model.drop) == (6, 0.5, 4, 0.1)
    summary = json.loads((FOLDER / "summary.json").read_text())
    assert summary["test/images"] == 360
    assert [event["step"] for event in events(FOLDER)] == [2, 3, 4, 6, 6]


def test_the_run_is_known_by_its_identity_but_of_another_version(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "digits" / "base")
    (run,) = ended(tmp_path).values()
    assert list(ended(tmp_path)) == [identity(read_config(FOLDER))] == ["9c96c9bcfca8dcb6"]
    assert run.stale


def test_the_checkpoint_goes_on_as_a_run_that_nothing_disturbed(tmp_path):
    config = read_config(FOLDER)
    whole = prepare(config)
    train(whole)
    cut = tmp_path / "cut"
    shutil.copytree(FOLDER, cut)
    with tracking.Run(tmp_path, "g", "n", {}, mode="disabled", folder=cut) as run:
        resumed = prepare(config, resume=cut)
        assert resumed.state.steps_done == 3
        train(resumed, run, folder=cut)
    theirs, ours = load_file(FOLDER / weights.FILE), whole.state.result.state_dict()
    here = resumed.state.result.state_dict()
    if all(torch.equal(theirs[name], ours[name]) for name in ours):  # a platform with these bits
        assert all(torch.equal(theirs[name], here[name]) for name in here)
        assert events(cut) == events(FOLDER)
    for name, value in here.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)
    for one, two in zip(events(cut), events(FOLDER), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=0.02)
    assert checkpoint.load(cut)["state"]["steps_done"] == 6
