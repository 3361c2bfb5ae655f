"""What is said of a finished run: numbers against hand counts and scikit-learn, pictures, pages."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.plain import PlainVit
from experiments import cli, predict, train
from experiments import evaluate as program
from vitx import data, pictures
from vitx.data.config import DataConfig
from vitx.interop import weights
from vitx.training import evaluate

LOGITS = torch.tensor([[2.0, 1, 0], [0, 3, 1], [1, 0, 2], [5, 0, 1], [0, 2, 1]])
TARGET = torch.tensor([1, 1, 0, 0, 2])


def test_top_k_counts_the_k_largest():
    assert evaluate.top(LOGITS, TARGET, 1) == pytest.approx(2 / 5)
    assert evaluate.top(LOGITS, TARGET, 2) == pytest.approx(1.0)
    assert evaluate.top(LOGITS, TARGET, 7) == 1.0


def test_calibration_is_its_sum():
    found = evaluate.calibration(LOGITS, TARGET, bins=10)
    sure, guess = LOGITS.double().softmax(1).max(1)
    total = 0.0
    for k in range(10):
        inside = [i for i in range(5) if k / 10 < sure[i] <= (k + 1) / 10]
        if inside:
            right = np.mean([guess[i] == TARGET[i] for i in inside])
            total += len(inside) / 5 * abs(right - np.mean([sure[i] for i in inside]))
    assert found.error == pytest.approx(total)
    assert found.images.sum() == 5


def test_pictures_are_those_of_the_classes_that_have_some():
    config = DataConfig(name="fake(images=400, size=8, classes=50)", val=50, test=200)
    dataset = data.load(config)
    late = dataset.test.take((dataset.test.target >= 45).nonzero().flatten().tolist())
    found = program.samples(dataset, late)
    assert set(found) == {dataset.classes[int(label)] for label in late.target}
    assert all(0 < len(pictures) <= program.SHOWN for pictures in found.values())


def test_a_calibrated_model_has_a_small_error_and_a_sure_one_a_large():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 4, generator=generator)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert evaluate.calibration(logits, target).error < 0.02
    assert evaluate.calibration(5 * logits, target).error > 0.2


def test_each_class_has_its_precision_and_recall():
    found = evaluate.by_class(LOGITS, TARGET, ("a", "b", "c"))
    assert found["a"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "images": 2.0}
    assert found["c"]["recall"] == 0.0


def test_frozen_features_of_separate_classes_are_told_apart():
    generator = np.random.default_rng(0)
    labels = np.arange(90) % 3
    values = np.eye(8)[labels] * 3 + generator.normal(size=(90, 8))
    train_part, test_part = (values[:60], labels[:60]), (values[60:], labels[60:])
    assert evaluate.nearest_neighbours(train_part, test_part, k=5) > 0.9
    assert evaluate.linear_probe(train_part, test_part) > 0.9
    shuffled = (values[60:], generator.permutation(labels[60:]))
    assert evaluate.linear_probe(train_part, shuffled) < 0.7


def test_rollout_is_the_product_of_half_residual_blocks():
    n = 1 + 6
    maps = torch.rand(3, 1, 2, n, n, dtype=torch.float64).softmax(-1)
    one, two, three = (0.5 * maps[k, 0].mean(0) + 0.5 * torch.eye(n) for k in range(3))
    row = (three @ two @ one)[0, 1:]
    wanted = ((row - row.min()) / (row.max() - row.min())).reshape(1, 2, 3)
    found = pictures.rollout(maps, grid=(2, 3), prefix=1, size=(2, 3))
    torch.testing.assert_close(found, wanted)


def test_class_attention_is_scaled_and_placed():
    maps = torch.zeros(1, 1, 1, 7, 7)
    maps[..., 0, 5] = 0.5
    found = pictures.class_attention(maps, grid=(2, 3), prefix=1, size=(2, 3))
    assert found[0, 1, 1] == 1
    assert found.sum() == 1


def test_registers_are_not_read_in_the_class_tokens_place():
    maps = torch.zeros(1, 1, 1, 8, 8)
    maps[..., 0, 3] = 1.0  # the first register
    maps[..., 2:, 6] = 0.5  # all patches
    how = {"grid": (2, 3), "prefix": 2, "size": (2, 3)}
    assert pictures.class_attention(maps, **how)[0, 0, 1] == 1
    assert pictures.class_attention(maps, **how, class_token=False)[0, 1, 1] == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of a few steps, of digits."""
    out = tmp_path_factory.mktemp("runs")
    words = ["digits", "--steps=30", "--batch=64", "--out", str(out), "--wandb=disabled"]
    cli.run(train.main, words)
    (folder,) = (out / "digits").iterdir()
    return folder


@pytest.mark.slow
def test_a_run_is_evaluated_from_its_folder(finished, capsys):
    cli.run(program.main, [str(finished), "--probe-images=300"])
    said = capsys.readouterr().out
    found = json.loads((finished / program.RESULT).read_text())
    lines = list(csv.reader((finished / program.CONFUSION).open()))
    assert sum(int(word) for line in lines[1:] for word in line[1:]) == found["images"]
    assert lines[0][1:] == [line[0] for line in lines[1:]] == list(found["classes"])
    summary = json.loads((finished / "summary.json").read_text())
    assert found["top1"] == pytest.approx(summary["test/accuracy"])
    assert found["loss"] == pytest.approx(summary["test/loss"], rel=1e-5)
    assert found["top1"] <= found["top5"] <= 1
    assert sum(each["images"] for each in found["classes"].values()) == 360
    assert 0.3 < found["linear_probe"] <= 1
    assert found["probe_images"] <= 300
    assert f"top-1 accuracy      {found['top1']:.2%}" in said
    names = {path.stem for path in (finished / "figures").glob("*.png")}
    assert names == {"curves", "confusion", "calibration", "samples", "attention", "heads",
                     "positions", "filters"}  # fmt: skip


def test_other_data_than_the_runs_are_refused(finished, capsys):
    path = finished / "summary.json"
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | {"fingerprint": "0" * 32}))
    with pytest.raises(SystemExit) as stopped:
        cli.run(program.main, [str(finished)])
    path.write_text(kept)
    assert stopped.value.code == 2
    assert "the data are not those that" in capsys.readouterr().err


def test_a_picture_is_prepared_for_prediction_as_for_evaluation(finished, tmp_path, capsys):
    from vitx import data, load

    config = program.read_config(finished)
    dataset = data.load(config.data)
    image, _ = next(data.evaluation_batches(dataset, dataset.test.take([3])))
    scan = dataset.test.image[3, 0].numpy()
    Image.fromarray((scan.astype(float) * 255 / 16).round().astype(np.uint8)).save(
        tmp_path / "a.png"
    )
    vit, how = load(finished).eval(), weights.describe(finished).preprocessing
    found = predict.prepare(tmp_path / "a.png", how, vit, 10**6)
    torch.testing.assert_close(found[None], image, atol=0.02, rtol=0)
    Image.fromarray(scan).save(tmp_path / "b.png")
    cli.run(predict.main, [str(finished), str(tmp_path), "--top=2"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path / 'a.png'}: ")
    assert first.count("%") == 2
    chance = vit(found[None]).softmax(dim=1)
    assert f"{chance.argmax().item()} {chance.max().item():.1%}" in first
    assert second.startswith(f"{tmp_path / 'b.png'}: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([program, "nowhere"], "nowhere is no folder of a finished run"),
        ([program, "RUN", "--split=train"], "split = 'train' is not known; choices: val, test"),
        ([predict, "RUN", "nothing.png"], "nothing.png can't be decoded"),
        ([predict, "RUN", "EMPTY"], "holds no picture"),
        ([predict, "FOREIGN", "x.png"], "does not tell the number of attention heads"),
    ],
    ids=lambda value: " ".join(map(str, value[1:])) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(finished, tmp_path, words, message, capsys, unchecked):
    (tmp_path / "empty").mkdir()
    torch.save(PlainVit().state_dict(), tmp_path / "foreign.pt")
    places = {
        "RUN": str(finished),
        "EMPTY": str(tmp_path / "empty"),
        "FOREIGN": str(tmp_path / "foreign.pt"),
    }
    module, *rest = words
    with pytest.raises(SystemExit) as stopped:
        cli.run(module.main, [places.get(word, word) for word in rest])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_the_history_has_a_line_a_split():
    events = [{"step": 10, "train/loss": 2.0, "train/accuracy": 0.1},
              {"step": 20, "val/loss": 1.0, "val/accuracy": 0.5}]  # fmt: skip
    figure = pictures.history(events, steps_per_epoch=10)
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["train", "val"]
    assert lines[1].get_xdata()[0] == 2
    assert figure.axes[0].get_xlabel() == "epoch"


def test_filters_are_principal_components():
    kernel = torch.zeros(16, 3, 4, 4)
    pattern = torch.randn(3, 4, 4)
    kernel[:] = torch.randn(16, 1, 1, 1) * pattern
    shown = pictures.filters(kernel).axes[0].images[0].get_array()
    found = torch.tensor(np.asarray(shown)).permute(2, 0, 1).flatten()
    wanted = pattern.flatten()
    assert abs(torch.corrcoef(torch.stack([found, wanted]))[0, 1].item()) > 0.99
    assert math.isclose(found.min().item(), 0, abs_tol=1e-6)


@pytest.mark.parametrize("images", [1, 6, 50, 100, 200])
def test_a_probes_images_are_drawn_at_random_and_balanced(images):
    target = torch.arange(4).repeat(100)  # every fourth is of one class
    target[:380] = 0
    chosen = evaluate.balanced(target, images)
    assert len(set(chosen)) == len(chosen) == images
    counts = torch.bincount(target[chosen], minlength=4)
    rare = torch.bincount(target, minlength=4)[1:]
    share = (
        (images - int(torch.minimum(rare, torch.tensor(images // 4)).sum())) if images > 4 else 1
    )
    assert counts[0] <= share + 1
    assert (counts[1:] >= torch.minimum(rare, torch.tensor(images // 4))).all()
    assert chosen != list(range(0, len(target), len(target) // images))[:images]


def test_all_images_are_probed_where_fewer_are_not_asked_for():
    assert evaluate.balanced(torch.zeros(5, dtype=torch.long), 0) == list(range(5))
    assert evaluate.balanced(torch.zeros(5, dtype=torch.long), 9) == list(range(5))


def test_a_probe_of_one_class_is_not_fitted():
    values, labels = np.eye(4), np.zeros(4, dtype=int)
    assert evaluate.linear_probe((values, labels), (values, labels)) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_outputs_that_are_not_finite_are_never_scored(value):
    logits = torch.zeros(4, 3)
    logits[2, 1] = value
    with pytest.raises(evaluate.NotFinite, match="the outputs for 1 of 4 images are not finite"):
        evaluate.score(logits, torch.zeros(4, dtype=torch.long))
