"""Files of weights as people have them: wrappers, shards, trainers' checkpoints, settings."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import vitx
from experiments.predict import prepare
from vitx.interop import weights
from vitx.measure.equality import randomise
from vitx.model.config import ModelConfig
from vitx.settings import override

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}


def model(**options):
    live = timm.create_model("vit_tiny_patch16_224", **SMALL | options).eval()
    randomise(live, seed=0)
    return live


def image(*size, dtype=torch.float32):
    return torch.randn(2, 3, *(size or (32, 32)), dtype=dtype)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."]
)
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    live = model()
    torch.save({prefix + k: v for k, v in live.state_dict().items()}, tmp_path / "w.pt")
    vit = vitx.load(tmp_path / "w.pt", heads=3).eval()
    torch.testing.assert_close(vit(image_ := image()), live(image_))


@pytest.mark.parametrize("entry", ["net", "teacher", "state_dict_ema", "model_ema", "state_dict"])
def test_the_weights_in_a_trainers_checkpoint_are_found(tmp_path, entry):
    torch.save({entry: model().state_dict(), "epoch": 3}, tmp_path / "w.pt")
    assert vitx.load(tmp_path / "w.pt", heads=3).config.depth == 1


def test_what_else_a_checkpoint_holds_is_said(tmp_path, capsys):
    live, average = model(), model().state_dict()
    average["head.bias"] = average["head.bias"] + 1
    torch.save({"state_dict_ema": average, "state_dict": live.state_dict()}, tmp_path / "w.pt")
    vit = vitx.load(tmp_path / "w.pt", heads=3)
    assert torch.equal(vit.head.bias, live.head.bias)
    assert "state_dict is read; it also holds state_dict_ema" in capsys.readouterr().err


def test_a_checkpoint_with_arguments_of_a_program_is_read(tmp_path):
    """timm's training script keeps its argparse.Namespace beside the weights."""
    content = {"state_dict": model().state_dict(), "args": argparse.Namespace(lr=1, out=Path("x")),
               "metric": np.float64(0.5), "arch": "vit_tiny_patch16_224"}  # fmt: skip
    torch.save(content, tmp_path / "w.pt")
    assert vitx.load(tmp_path / "w.pt", heads=3).config.width == 48


class Trainer:
    """What only its own program can unpickle."""


def test_what_would_run_code_is_refused_with_the_remedy(tmp_path):
    torch.save({"model": model().state_dict(), "trainer": Trainer()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"holds a test_tensors\.Trainer beside") as caught:
        vitx.load(tmp_path / "w.pt", heads=3)
    assert "\x1b" not in str(caught.value)
    assert "torch.save" in str(caught.value)


def test_shards_are_read_and_one_alone_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        image_size=32, patch_size=8,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    vit = vitx.load(tmp_path).eval()
    torch.testing.assert_close(vit(image_ := image()), theirs(image_).logits)
    shard = min(tmp_path.glob("model-*.safetensors"))
    with pytest.raises(ValueError, match="is one of several shards: give its folder"):
        vitx.load(shard)
    shard.unlink()
    with pytest.raises(ValueError, match="which is no file beside it"):
        vitx.load(tmp_path)


@pytest.mark.parametrize("size", [(16, 64), (32, 64), (16, 32)])
def test_images_that_are_not_square_are_read_as_they_are(tmp_path, size):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96,
        image_size=size, patch_size=16,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    vit = vitx.load(tmp_path).eval()
    assert vit.config.size == size
    torch.testing.assert_close(vit(image_ := image(*size)), theirs(image_).logits)


def test_a_size_that_a_file_does_not_tell_is_given_or_said(tmp_path, capsys):
    torch.save(model(img_size=(16, 64), patch_size=16).state_dict(), tmp_path / "w.pt")
    assert vitx.load(tmp_path / "w.pt", heads=3, image=(16, 64)).config.size == (16, 64)
    assert not capsys.readouterr().err
    assert vitx.load(tmp_path / "w.pt", heads=3).config.size == (32, 32)
    assert "does not tell the image's size; it is read as (32, 32)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="another number of patches than 4"):
        vitx.load(tmp_path / "w.pt", heads=3, image=(16, 32))


FOLDERS = {
    "cls": {},
    "mean": {"global_pool": "avg", "fc_norm": False},
    "mean, its norm after": {"global_pool": "avg"},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "layer scale": {"init_values": 0.1},
    "not square": {"img_size": (16, 64)},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_timms_is_the_model_that_it_names(tmp_path, name):
    live = model(**FOLDERS[name], num_classes=2)
    write_timm(tmp_path, live, SMALL | FOLDERS[name])
    vit = vitx.load(tmp_path).eval()
    image_ = image(*live.patch_embed.img_size)
    torch.testing.assert_close(vit(image_), live(image_))


def write_timm(folder, live, model_args, **more):
    from timm.models import save_for_hf

    folder.mkdir(exist_ok=True)
    config = {"architecture": "vit_tiny_patch16_224", "global_pool": live.global_pool, **more}
    save_for_hf(live, str(folder), safe_serialization=True, model_config=config)
    beside = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(beside | {"model_args": model_args}))


def test_a_pool_that_timm_names_is_heeded_without_its_arguments(tmp_path):
    live = model(global_pool="avg", fc_norm=False, num_classes=2)
    write_timm(tmp_path, live, {})
    vit = vitx.load(tmp_path, heads=3).eval()
    assert vit.config.pool == "mean"
    torch.testing.assert_close(vit(image_ := image()), live(image_))


def test_what_timm_names_and_cant_be_expressed_is_refused(tmp_path):
    live = model(num_classes=2)
    write_timm(tmp_path / "a", live, SMALL | {"act_layer": "quick_gelu"})
    with pytest.raises(ValueError, match="act_layer"):
        vitx.load(tmp_path / "a")
    write_timm(tmp_path / "b", live, SMALL | {"depth": 2})
    with pytest.raises(ValueError, match=r"blocks\.1\.\S+ is none, and \[48\] in timm's vit_tiny"):
        vitx.load(tmp_path / "b")


def test_a_folder_of_timms_says_how_pictures_are_prepared(tmp_path):
    live = model(num_classes=2)
    cfg = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6),
           "interpolation": "bicubic", "crop_pct": 0.9}  # fmt: skip
    write_timm(tmp_path, live, SMALL, pretrained_cfg=cfg)
    beside = json.loads((tmp_path / "config.json").read_text())
    beside["pretrained_cfg"] |= cfg
    (tmp_path / "config.json").write_text(json.dumps(beside))
    how = weights.describe(tmp_path).preprocessing
    assert (how.resize, how.filter, how.centre, how.mean) == ("crop", "bicubic", 0.9, cfg["mean"])
    from PIL import Image
    from timm.data import create_transform

    shown = Image.effect_noise((71, 50), 80).convert("RGB")
    shown.save(tmp_path / "x.png")
    theirs = create_transform((3, 32, 32), mean=cfg["mean"], std=cfg["std"], crop_pct=0.9,
                              interpolation="bicubic")(shown)  # fmt: skip
    ours = prepare(tmp_path / "x.png", how, vitx.load(tmp_path), 10**6)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
def test_the_filter_of_a_processor_is_heeded(tmp_path, resample):
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=64, patch_size=16
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({
        "size": {"height": 64, "width": 64}, "resample": resample, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }))  # fmt: skip
    shown = Image.effect_noise((500, 300), 80).convert("RGB")
    shown.save(tmp_path / "x.png")
    theirs = torch.from_numpy(np.asarray(shown.resize((64, 64), resample)).copy()).permute(2, 0, 1)
    how = weights.describe(tmp_path).preprocessing
    ours = prepare(tmp_path / "x.png", how, vitx.load(tmp_path), 10**8)
    torch.testing.assert_close(ours, (theirs / 255 - 0.5) / 0.5)


def test_the_widest_float_of_a_file_is_the_models(tmp_path, capsys):
    state = model().state_dict()
    mixed = {k: v.half() if k == "cls_token" else v for k, v in state.items()}
    torch.save(mixed, tmp_path / "mixed.pt")
    assert vitx.load(tmp_path / "mixed.pt", heads=3).cls_token.dtype == torch.float32
    torch.save({k: v.bfloat16() for k, v in state.items()}, tmp_path / "half.pt")
    vit = vitx.load(tmp_path / "half.pt", heads=3)
    assert vit.cls_token.dtype == torch.bfloat16
    assert vit(image()).dtype == torch.bfloat16
    save_file({k: v.to(torch.int8) for k, v in state.items()}, tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match=r"holds torch\.int8; weights are floats"):
        vitx.load(tmp_path / "whole.safetensors", heads=3)
    capsys.readouterr()
    state["norm.bias"][3] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    vitx.load(tmp_path / "nan.pt", heads=3)
    assert "1 of 20 tensors hold values that are not finite, the first is norm.bias" in (
        capsys.readouterr().err
    )


def test_an_output_without_a_name_has_its_number(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=16,
        num_labels=4,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    beside = json.loads((tmp_path / "config.json").read_text())
    for id2label, expected in (
        ({"0": "ant", "2": "cat"}, ("ant", "1", "cat", "3")),
        ({"7": "ant"}, "id2label names the output '7', there are 4"),
        ({"ant": "0"}, "id2label names the output 'ant'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(beside | {"id2label": id2label}))
        if isinstance(expected, tuple):
            assert weights.describe(tmp_path).classes == expected
        else:
            with pytest.raises(ValueError, match=expected):
                weights.describe(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "can't be read"),
        ({"model_type": "dinov2"}, "model_type = 'dinov2' is not known"),
        ({"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu' can't be expressed"),
        ({"image_size": [16, 32]}, "another number of patches"),
        ({"id2label": 3}, "can't be read"),
    ],
)
def test_a_config_json_that_says_something_else_is_refused(tmp_path, change, message):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    beside = json.loads((tmp_path / "config.json").read_text())
    new = beside | change if isinstance(change, dict) else change
    (tmp_path / "config.json").write_text(json.dumps(new))
    with pytest.raises(ValueError, match=message):
        vitx.load(tmp_path)


HEAD = ModelConfig(image=8, patch=4, classes=3, width=16, depth=1, heads=2, init="normal(std=1.0)")


@pytest.mark.parametrize(
    ("theirs", "ours", "rows"),
    [
        (("ant", "bee", "cat"), ("cat", "ant", "bee"), [2, 0, 1]),
        (("ant", "bee", "cat"), ("ant", "bee", "cow"), None),
        ((), ("ant", "bee", "cat"), [0, 1, 2]),
        ((), ("0", "1", "2"), [0, 1, 2]),
    ],
)
def test_a_head_is_matched_with_the_classes_by_name(tmp_path, theirs, ours, rows, capsys):
    vit = vitx.build(HEAD, seed=1)
    weights.save(vit, tmp_path / "w.safetensors", weights.Description(HEAD, theirs))
    started = weights.start(override(HEAD, drop=0.1), tmp_path / "w.safetensors", classes=ours)
    said = capsys.readouterr().err
    if rows is None:
        assert "a new head of 3 classes with other names" in said
        assert not torch.equal(started.head.weight, vit.head.weight)
    else:
        assert torch.equal(started.head.weight, vit.head.weight[rows])


def test_numbers_that_are_no_outputs_are_refused(tmp_path):
    weights.save(vitx.build(HEAD), tmp_path / "w.safetensors", weights.Description(HEAD))
    with pytest.raises(
        ValueError, match=r"outputs are the numbers 0 to 2, the classes are 0, 1, 7"
    ):
        weights.start(HEAD, tmp_path / "w.safetensors", classes=("0", "1", "7"))
