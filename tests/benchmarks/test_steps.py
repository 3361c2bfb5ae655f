"""Whole steps in pairs: both sides train, plain PyTorch is the recipe, results are a table."""

import dataclasses
import math

import pytest
import torch

from benchmarks import plain, step_pairs, steps
from benchmarks.report import tables
from benchmarks.step_pairs import PAIRS, TrainingSide
from experiments import cli
from experiments.recipes import RECIPES
from experiments.study.results import of_kind, read
from vitx import data
from vitx.data.config import DataConfig
from vitx.interop import weights
from vitx.measure import subjects
from vitx.measure.compare import summarise
from vitx.measure.comparison import Comparison, Side
from vitx.measure.timing import ARMS, Arm, TimingConfig, time_rounds
from vitx.training.state import init, step

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def dataset():
    return data.load(DataConfig(name="fake(images=900, size=32, classes=10)", val=40, test=200))


@pytest.fixture
def file(tmp_path, dataset):
    """The file that the sides of a pair read their data from."""
    torch.save(dataset, tmp_path / "data.pt")
    step_pairs._dataset.cache_clear()
    return tmp_path / "data.pt"


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PAIRS if n not in ("timm-compiled", "wandb")])
def test_both_sides_of_a_comparison_run(name, file):
    for side in tables.SIDES:
        subject = TrainingSide(name, side, 1, file)
        assert isinstance(subject, subjects.Blocks)
        assert 0 < subject.make_block()(1) < 60
        assert subject.images == PAIRS[name].config.batch * PAIRS[name].seeds


@pytest.mark.slow
def test_a_process_of_a_comparison_ends_well_though_wandb_stood_still(tmp_path, dataset):
    torch.save(dataset, tmp_path / "data.pt")
    settings = steps.Settings(root="", processes=1, steps=1)
    comparison = steps.compared("wandb", settings, tmp_path)["comparison"]
    assert comparison.verdict == "one process, no verdict", comparison.reason
    (process,) = comparison.raw
    assert len(process["rounds"]) >= 6
    blocks = [block for each in process["rounds"] for block in each["blocks"].values()]
    assert all(block["seconds"] > 0 for block in blocks)


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
        spread = ours.state_dict()[name].std().item()
        assert model.state_dict()[theirs].std().item() == pytest.approx(spread, rel=0.1)
    assert model.classifier.bias.abs().max() == 0


def planted(reference, candidate, example, *, config):
    """A comparison in which the candidate takes half as long; or one that failed."""
    base = Comparison(config=config, verdict="failed", reason="no C++ compiler", batch=32)
    if config.compile != "none":
        return base
    pairs = []
    for number in range(config.processes):
        seconds = {"reference": 0.02, "again": 0.02, "candidate": 0.01 * math.exp(-0.001 * number)}
        arms = {arm: Arm(lambda count, each=seconds[arm]: each * count, images=1) for arm in ARMS}
        quick = TimingConfig(pair_s=0.001, block_s=0.001, warm_up_s=0.1)
        pair = time_rounds(arms, quick, number, torch.device("cuda"))  # which is not judged
        pairs.append(pair)
    return summarise(dataclasses.replace(base, reason="", reference=Side()), pairs)


def test_results_of_a_run_become_tables(tmp_path, dataset, monkeypatch, capsys):
    monkeypatch.setattr(steps.data, "load", lambda *_, **__: dataset)
    monkeypatch.setattr(steps, "first_step", lambda root: 12.0)
    monkeypatch.setattr(steps, "data_share", lambda *_: 0.03)
    monkeypatch.setattr(steps, "speed", planted)
    monkeypatch.setattr("vitx.measure.timing.gpu", lambda device: None)
    monkeypatch.setattr("vitx.measure.timing.synchronise", lambda device: None)
    cli.run(steps.main, ["--root=x", "--processes=3", f"--out={tmp_path}"])
    path = capsys.readouterr().out.splitlines()[-1]
    results = read(type(tmp_path)(path))
    table, whole = tables.step_table(results), tables.whole_table(results)
    assert len(table.body) == len(PAIRS)
    failed = next(line for line in table.body if line[2] == "default")
    assert "failed: no C++ compiler" in failed
    assert table.body[0][3:6] == ("50", "100", "2.002 (1.997 to 2.007)")
    assert [line[1] for line in whole.body] == [
        "12.0 s (12.0 to 12.0)", "3.0%", "-50.0% (-50.2% to -49.9%)", "100,000 s"
    ]  # fmt: skip
    errors = {result.name: result.logits_error for result in of_kind(results, steps.Step)}
    assert errors["plain"] < 1e-10
    assert errors["timm"] < 1e-10
    assert errors["wandb"] is errors["epoch"] is None


def test_models_that_differ_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setitem(PAIRS, "plain", dataclasses.replace(PAIRS["plain"], error=lambda: 2e-3))
    monkeypatch.setattr(steps, "speed", None)
    comparison = steps.compared("plain", steps.Settings(root=""), tmp_path)["comparison"]
    assert comparison.verdict == "not equal"
    assert comparison.reason == "logits differ by 2.0e-03 in float64"


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--processes=1"], "at least 2"), (["--only=plane"], "only = 'plane' is not known")],
)
def test_a_wrong_flag_is_refused_before_the_data_are_read(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run(steps.main, ["--root=nowhere", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
