"""Every recipe is complete; the founding systems run end to end on small data in true formats."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import cli, evaluate, predict, train
from experiments.recipes import RECIPES
from vitx import build
from vitx.data import images
from vitx.interop import weights
from vitx.model.cost import cost
from vitx.settings import flat, override


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_prints_its_settings_without_data(name, capsys):
    cli.run(train.main, [name, "--dry-run"])
    assert f"{name}: {cost(RECIPES[name].model).parameters:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # 48·(3·16 + 1) + 66·48 + 4·(4·48² + 4·48 + 2·48·192 + 192 + 48 + 4·48) + 49·10
        ("scratch-cifar10", 119_098),
        # ViT-B/16 with a head of 3 classes
        ("finetune-beans", 85_800_963),
    ],
)
def test_a_founding_model_has_its_parameters(name, parameters):
    assert cost(RECIPES[name].model).parameters == parameters


def pictures(folder, count, size, *, name="{}.jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    paths = []
    for k in range(count):
        # A brightness a class, so that a short training sees something.
        pixels = generator.integers(0, 120, (*size, 3)) + 60 * (k % 3)
        path = folder / name.format(k)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        paths.append(path)
    return paths


def read(folder):
    (run,) = folder.iterdir()
    return run, json.loads((run / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif("VITX_DATA" not in os.environ, reason="VITX_DATA names no folder of data sets")
def test_a_tenth_of_the_small_recipe_learns_from_the_real_cifar10(tmp_path, unchecked):
    root = Path(os.environ["VITX_DATA"], "cifar10")
    words = ["--data.root", str(root), "--data.val=2000", "--steps=120", "--eval-every=120"]
    words += ["--out", str(tmp_path), "--wandb", "disabled"]
    cli.run(train.main, ["cifar10-small", *words])
    _, summary = read(tmp_path / "cifar10-small")
    assert 0.25 < summary["val/accuracy"] < 0.5  # chance is 0.1
    assert summary["test/images"] == 10_000
    assert summary["test/accuracy"] == pytest.approx(summary["val/accuracy"], abs=0.04)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_beans_are_fine_tuned_from_hugging_faces_weights_and_data(tmp_path, capsys, unchecked):
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    names = ["angular_leaf_spot", "bean_rust", "healthy"]
    features = datasets.Features(
        {"image_file_path": datasets.Value("string"), "image": datasets.Image(),
         "labels": datasets.ClassLabel(names=names)}
    )  # fmt: skip
    parts = {}
    for split, count in (("train", 36), ("validation", 9), ("test", 9)):
        paths = [str(path) for path in pictures(tmp_path / split, count, (50, 50))]
        columns = {
            "image_file_path": paths,
            "image": paths,
            "labels": [k % 3 for k in range(count)],
        }
        parts[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "beans"))
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        image_size=32, patch_size=16,
    )  # fmt: skip
    start = transformers.ViTModel(config)
    start.save_pretrained(tmp_path / "in21k")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "in21k"
    )
    size = ["image=32", "width=24", "depth=2", "heads=3"]
    small = [f"--model.{word}" for word in size]
    data, start_from = tmp_path / "beans", tmp_path / "in21k"
    words = ["finetune-beans", f"--data.root={data}", f"--weights={start_from}", "--steps=12",
             "--eval-every=6", "--batch=6", "--optim.lr=3e-3", "--out", str(tmp_path / "runs"),
             "--wandb=disabled"]  # fmt: skip
    cli.run(train.main, words + small)
    folder, summary = read(tmp_path / "runs" / "finetune-beans")
    assert (summary["val/images"], summary["test/images"]) == (9, 9)
    assert summary["val/accuracy"] > 0.5
    about = weights.describe(folder)
    assert about.classes == tuple(names)
    assert about.preprocessing.resize == "squash"
    assert about.preprocessing.mean == pytest.approx((0.5,) * 3)
    cli.run(evaluate.main, [str(folder), "--split=val"])
    assert json.loads((folder / evaluate.RESULT).read_text())["top1"] == summary["val/accuracy"]
    capsys.readouterr()
    cli.run(predict.main, [str(folder), str(tmp_path / "test" / "0.jpg")])
    assert "angular_leaf_spot" in capsys.readouterr().out
    steps_at_0 = override(RECIPES["finetune-beans"].model, image=32, width=24, depth=2, heads=3)
    vit = weights.start(steps_at_0, tmp_path / "in21k")
    theirs = start.state_dict()["embeddings.position_embeddings"]
    assert torch.equal(vit.pos_embed, theirs)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Places365's validation part as torchvision reads it: two lists with checksums, one folder."""
    from torchvision.datasets import Places365

    pictures(tmp_path / "places" / "val_256", 60, (64, 64), name="p{}.jpg")
    lists = {
        "categories_places365.txt": "".join(f"/{c}/scene {k}\n" for k, c in enumerate("abc")),
        "places365_val.txt": "".join(f"p{k}.jpg {k % 3}\n" for k in range(60)),
    }
    sums = {}
    for name, text in lists.items():
        (tmp_path / "places" / name).write_text(text)
        sums[name] = hashlib.md5(text.encode()).hexdigest()
    categories, files = sums.items()
    monkeypatch.setattr(Places365, "_CATEGORIES_META", categories)
    monkeypatch.setattr(Places365, "_FILE_LIST_META", {"val": files})
    return tmp_path / "places"


def test_scratch_places365_runs_end_to_end_and_gives_its_weights_back(places, tmp_path, unchecked):
    words = ["scratch-places365", f"--data.root={places}", "--steps=6", "--batch=4",
             "--eval-every=3", "--data.train=30", "--data.val=10", "--data.test=20",
             "--model.image=32", "--model.classes=3", "--model.width=24", "--model.depth=2",
             "--model.heads=3", "--out", str(tmp_path / "runs"), "--wandb=disabled"]  # fmt: skip
    cli.run(train.main, words)
    folder, summary = read(tmp_path / "runs" / "scratch-places365")
    assert (summary["val/images"], summary["test/images"]) == (10, 20)
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {"train/loss", "train/accuracy", "val/loss", "val/accuracy"}
    assert names <= {key for event in events for key in event}
    vit = weights.load(folder)
    weights.export(vit, tmp_path / "theirs.pt", "scratch-places365")
    again = weights.load(tmp_path / "theirs.pt", heads=3)
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again.eval()(image), vit.eval()(image))


def test_a_changed_list_file_of_places365_is_refused(places, capsys, unchecked):
    (places / "places365_val.txt").write_text("p0.jpg 0\n")
    with pytest.raises(SystemExit) as stopped:
        cli.run(train.main, ["scratch-places365", f"--data.root={places}", "--wandb=disabled"])
    assert stopped.value.code == 2
    assert "holds no Places365" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        (
            "scratch-places365",
            {
                "model.image": [224, 224], "model.patch": [16, 16], "model.classes": 365,
                "model.width": 768, "model.depth": 12, "model.heads": 8, "model.hidden": 3072,
                "model.drop": 0.1, "model.attention_drop": 0.1, "model.position_drop": 0.1,
                "model.placement": "post", "model.norm": "layernorm(eps=1e-5)",
                "model.final_norm": False, "model.fc_norm": True, "model.mlp": "gelu",
                "data.train": 3650, "data.val": 1825, "data.test": 31_025,
                "data.resize": "squash", "data.normalise": "imagenet", "data.flip": 0.0,
                "data.crop": 1.0, "optim.name": "adam", "optim.lr": 1e-3,
                "optim.weight_decay": 0.0, "optim.schedule": "constant", "optim.clip": 1.0,
                "batch": 16, "steps": 5 * 229,
            },
        ),
        (
            "scratch-cifar10",
            {
                "model.image": [32, 32], "model.patch": [4, 4], "model.width": 48,
                "model.depth": 4, "model.heads": 4, "model.hidden": 192, "model.mlp": "gelu_tanh",
                "model.norm": "layernorm(eps=1e-5)", "model.final_norm": False, "model.drop": 0.0,
                "model.init": "normal", "data.flip": 0.5, "data.crop": 0.8,
                "data.normalise": "half", "data.val": 0, "optim.name": "adamw", "optim.lr": 1e-2,
                "optim.weight_decay": 1e-2, "optim.decay": "all", "optim.schedule": "constant",
                "batch": 256, "steps": 19_600, "curve": "test",
            },
        ),
        (
            "finetune-beans",
            {
                "model.width": 768, "model.depth": 12, "model.heads": 12, "model.classes": 3,
                "model.norm": "layernorm(eps=1e-12)", "model.mlp": "gelu",
                "data.resize": "squash", "data.normalise": "half", "optim.name": "adamw",
                "optim.lr": 5e-5, "optim.schedule": "linear", "optim.clip": 1.0, "batch": 16,
                "steps": 30 * 65,
            },
        ),
    ],
)  # fmt: skip
def test_a_founding_recipe_has_its_projects_numbers(name, numbers):
    recipe = RECIPES[name]
    values = flat(recipe) | {"model.hidden": recipe.model.hidden}
    assert {key: values[key] for key in numbers} == numbers


def test_a_bad_picture_of_a_recipe_is_one_plain_sentence(tmp_path, monkeypatch, capsys):
    for split, count in (("train", 30), ("test", 4)):
        for k in range(10):
            pictures(tmp_path / split / f"class {k}", count, (32, 32))
    bad = tmp_path / "train" / "class 7" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    monkeypatch.setattr(images, "PORTION", 50)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SystemExit) as stopped:
        cli.run(train.main, ["scratch-cifar10", f"--data.root={tmp_path}", "--wandb=disabled"])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {bad} can't be decoded")


def test_the_scratch_recipe_follows_its_project():
    recipe = RECIPES["scratch-cifar10"]
    assert recipe.steps == 100 * -(-50_000 // 256)
    assert recipe.data.train_images == 50_000
    assert recipe.curve == "test"
    vit = build(recipe.model)
    assert vit.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert vit.patch_embed.proj.bias.abs().max() == 0
