"""Models of other libraries by name, and how the weights of one become those of another."""

import pytest
import torch
from picture_files import picture
from torch import nn

from benchmarks import peers, pretrained
from vitx.measure.equality import equality
from vitx.model.config import ModelConfig


def test_a_folder_of_transformers_and_lucidrains_vit_give_logits(tmp_path):
    small = _shrunk("hf:Ti/32")
    small.module.model.save_pretrained(tmp_path)
    made = peers.make(f"hf:{tmp_path}")
    image = torch.randn(2, *made.image)
    assert (made.image, made.depth) == ((3, 64, 64), 2)
    torch.testing.assert_close(made.module.eval()(image), small.module.eval()(image))
    other = _shrunk("vit_pytorch:Ti/32")
    assert other.module(image).shape == (2, 5)
    assert peers.conversion(other, made) is None
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"model_type": "vit"', '"model_type": "deit"'))
    with pytest.raises(ValueError, match=r"config\.json is of a model 'deit', not 'vit'"):
        peers.check(f"hf:{tmp_path}")
    for text in ("[]", '{"model_type": '):
        config.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json can't be read"):
            peers.check(f"hf:{tmp_path}")


def test_a_folder_of_transformers_need_not_be_square(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=(16, 64),
        patch_size=16,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    assert peers.make(f"hf:{tmp_path}").image == (3, 16, 64)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0", "1", "2", "10"], "its classes are the numbers 0, 1, 2, 10"),
        (["1", "2", "3", "4"], "model's outputs 0 to 3"),
        (["0", "1", "2"], "has 3 class folders, the model 4 outputs"),
        (["0", "1", "2", "3"], ""),
        (["a", "b", "c", "d"], ""),
    ],
)
def test_numbered_classes_are_the_outputs_of_that_number(tmp_path, names, message):
    for name in names:
        (tmp_path / name).mkdir()
        picture().save(tmp_path / name / "0.png")
    settings = {"input_size": (3, 32, 32), "is_training": False}
    if message:
        with pytest.raises(ValueError, match=message):
            pretrained.open_folder(tmp_path, settings, 4)
    else:
        assert len(pretrained.open_folder(tmp_path, settings, 4)) == 4


def test_torchvisions_models_are_known_by_its_names_too():
    made = peers.make("torchvision:vit_b_32")
    assert (made.image, made.depth) == ((3, 224, 224), 12)
    assert made.module.hidden_dim == 768
    with pytest.raises(ValueError, match=r"'torchvision:vit_s_16' is not known; .*vit_b_16"):
        peers.check("torchvision:vit_s_16")


@pytest.mark.parametrize("name", ["torchvision:Ti/32", "hf:Ti/32", "vitx:Ti/32"])
def test_a_peers_weights_are_made_from_timms(name):
    # The names are those of every size.
    reference = peers.Model("timm", _small_timm(), (3, 64, 64), 2, None)
    candidate = _shrunk(name)
    keys = peers.conversion(reference, candidate)
    checked = equality(reference.module, candidate.module, torch.randn(2, 3, 64, 64), keys=keys)
    assert checked.passed, checked.reason
    assert checked.parameters_reference == checked.parameters_candidate


def _small_timm() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=64, patch_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )


def _shrunk(name: str) -> peers.Model:
    """A peer's model in a size for tests."""
    small = ModelConfig(image=64, patch=32, width=24, depth=2, heads=3, classes=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "size", lambda _: small)
        patch.setattr(peers, "check", lambda _: None)
        return peers.make(name)
