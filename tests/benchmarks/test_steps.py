"""Whole steps in pairs: both sides train, the plain rendering is the recipe, rows are a table."""

import dataclasses
import json

import pytest
import torch

from benchmarks import plain, render, steps
from experiments import cli
from experiments.recipes import RECIPES
from vitx import data
from vitx.data.config import DataConfig
from vitx.interop import weights
from vitx.training.state import init, step

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def dataset():
    return data.load(DataConfig(name="fake(images=900, size=32, classes=10)", val=40, test=200))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in steps.COMPARISONS if n not in ("timm-compiled", "wandb")]
)
def test_both_sides_of_a_comparison_run(name, dataset):
    made = {side: steps.COMPARISONS[name].make(side, dataset) for side in render.SIDES}
    assert all(0 < block(1) < 1 for block in made.values())


@pytest.mark.slow
def test_a_process_of_a_comparison_ends_well_though_wandb_stood_still(tmp_path, dataset):
    torch.save(dataset, tmp_path / steps.DATA)
    record, words = steps._child("wandb", 0, 1, tmp_path)
    assert not words
    assert len(record["rounds"]) == 6
    assert all(s > 0 for each in record["rounds"] for s in each["seconds"].values())


def test_plain_pytorch_takes_the_recipes_steps(tmp_path, dataset):
    """The same weights and batches give the same losses and weights, in float64."""
    torch.manual_seed(0)
    model = plain.PlainVit().double()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    config = RECIPES["scratch-cifar10"]
    state = init(config, model=weights.load(tmp_path / "w.pt", heads=plain.HEADS))
    theirs = plain.make_step(model)
    stream = data.batches(dataset, batch=32, seed=0)
    for _ in range(5):
        image, target = next(stream)
        loss = step(state, (image.double(), target), config)["loss"].item()
        assert theirs(image.double(), target) == pytest.approx(loss, rel=1e-10)
    weights.export(state.model, tmp_path / "ours.pt", "scratch-cifar10")  # type: ignore[arg-type]
    for name, value in torch.load(tmp_path / "ours.pt").items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-8, atol=1e-10)


def test_plain_initial_values_are_the_recipes():
    model, ours = plain.PlainVit(), init(RECIPES["scratch-cifar10"]).model
    for theirs, name in (
        ("encoder.blocks.0.mlp.dense_1.weight", "blocks.0.mlp.fc1.weight"),
        ("embedding.patch_embeddings.projection.weight", "patch_embed.proj.weight"),
        ("embedding.position_embeddings", "pos_embed"),
    ):
        found, wanted = model.state_dict()[theirs].std(), ours.state_dict()[name].std()
        assert found.item() == pytest.approx(wanted.item(), rel=0.1)
    assert model.classifier.bias.abs().max() == 0


def test_rows_of_a_run_become_tables(tmp_path, dataset, monkeypatch, capsys):
    monkeypatch.setattr(steps.data, "load", lambda *_, **__: dataset)
    monkeypatch.setattr(steps, "first_step", lambda root: 12.0)

    def child(name, number, count, folder):
        seconds = {"reference": 0.02, "again": 0.02, "candidate": 0.01}
        rounds = [{"order": steps.ARMS, "seconds": seconds, "foreign": 0.0}]
        share = {"data_share": 0.03} if name == "timm" else {}
        values = {"log_ratio": 0.6931 + 0.001 * number, "log_ratio_again": 0.001, "threads": 2}
        if name == "timm-compiled":
            return {}, "no C++ compiler"
        return {"rounds": rounds, **values, **share}, ""

    monkeypatch.setattr(steps, "_child", child)
    cli.run(steps.main, ["--root=x", "--processes=3", f"--out={tmp_path}"])
    path = capsys.readouterr().out.splitlines()[-1]
    with open(path, encoding="utf8") as file:
        found = [json.loads(line) for line in file]
    table, whole = render.step_table(found), render.whole_table(found)
    assert len(table.body) == len(steps.COMPARISONS)
    failed = next(line for line in table.body if line[2] == "default")
    assert failed[3:8] == ("–", "–", "failed: no C++ compiler", "–", "failed")
    assert table.body[0][3:6] == ("50", "100", "2.002 (1.997 to 2.007)")
    assert [line[1] for line in whole.body] == [
        "12.0 s (12.0 to 12.0)", "3.0%", "-50.0% (-50.2% to -49.9%)", "100,000 s"
    ]  # fmt: skip
    errors = {row["comparison"]: row["equality"] for row in found if row["what"] == "step"}
    assert errors["plain"]["logits_error"] < 1e-10
    assert errors["timm"]["logits_error"] < 1e-10
    assert errors["wandb"] is errors["epoch"] is None


def test_models_that_differ_are_not_timed(tmp_path, monkeypatch):
    wrong = dataclasses.replace(steps.COMPARISONS["timm"], error=lambda: 2e-3)
    monkeypatch.setitem(steps.COMPARISONS, "timm", wrong)
    monkeypatch.setattr(steps, "_child", None)
    kind, fields = steps.compared("timm", 2, 1, tmp_path)
    assert (kind, fields["verdict"]) == ("failure", "not equal")
    assert fields["reason"] == "logits differ by 2.0e-03 in float64"


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--processes=1"], "at least 2"), (["--only=plane"], "only = 'plane' is not known")],
)
def test_a_wrong_flag_is_refused_before_the_data_are_read(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run(steps.main, ["--root=nowhere", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
