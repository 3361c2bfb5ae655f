"""Weights of other projects: recognised by their names, the same function, written back alike."""

import json
import math

import pytest
import torch
from torch import nn

import vitx
from benchmarks.plain import HEADS, WIDTH, MergedAttention, PlainVit, attend
from experiments.recipes import RECIPES
from vitx.interop import weights
from vitx.measure.equality import randomise
from vitx.model.config import ModelConfig
from vitx.model.preprocessing import CENTRE, Preprocessing
from vitx.settings import override


def randomised(model):
    randomise(model, seed=0)
    return model


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        for name in ("w_q", "w_k", "w_v", "fc"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = (
            f(x).view(b, n, self.heads, d // self.heads).transpose(1, 2)
            for f in (self.w_q, self.w_k, self.w_v)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(d // self.heads)
        return self.fc((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d))


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv1d(width, 4 * width, 1), nn.Conv1d(4 * width, width, 1)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x.transpose(1, 2)))).transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention, self.feed_forward = Attention(width, heads), FeedForward(width)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        x = self.layer_norm1(x + self.attention(x))
        return self.layer_norm2(x + self.feed_forward(x))


class Embedding(nn.Module):
    def __init__(self, width, patch, patches):
        super().__init__()
        self.patch = patch
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.randn(1, patches + 1, width))
        self.projection = nn.Linear(3 * patch**2, width)

    def forward(self, image):
        b, c, p = image.shape[0], image.shape[1], self.patch
        x = image.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5)
        x = self.projection(x.reshape(b, -1, c * p * p))
        return torch.cat([self.cls_token.expand(b, -1, -1), x], dim=1) + self.pos_embedding


class CourseVit(nn.Module):
    """The Places365 notebook's model, small."""

    def __init__(self, width=24, depth=2, heads=3, patch=4, image=12, classes=7):
        super().__init__()
        self.embedding = Embedding(width, patch, (image // patch) ** 2)
        self.encoder_layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.classifier = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, image):
        x = self.embedding(image)
        for layer in self.encoder_layers:
            x = layer(x)
        return self.classifier(x[:, 0])


class Head(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.query, self.key, self.value = (
            nn.Linear(WIDTH, WIDTH // HEADS, bias=bias) for _ in range(3)
        )

    def forward(self, x):
        return attend(self.query(x), self.key(x), self.value(x))


class HeadedAttention(nn.Module):
    """The CIFAR-10 project's other attention, a module a head."""

    def __init__(self, bias=True):
        super().__init__()
        self.heads = nn.ModuleList(Head(bias) for _ in range(HEADS))
        self.output_projection = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.output_projection(torch.cat([head(x) for head in self.heads], dim=-1))


ORIGINALS = {
    "scratch-places365": (CourseVit, {"heads": 3}, 12),
    "scratch-cifar10": (PlainVit, {"heads": 4}, 32),
    "scratch-cifar10-heads": (lambda: PlainVit(HeadedAttention), {}, 32),
}


@pytest.fixture(params=ORIGINALS)
def original(request, tmp_path):
    make, how, size = ORIGINALS[request.param]
    model = randomised(make().double().eval())
    path = tmp_path / "theirs.pt"
    torch.save(model.state_dict(), path)
    image = torch.randn(2, 3, size, size, dtype=torch.float64)
    return request.param, model, path, how, image


def test_a_scratch_projects_weights_are_recognised_and_compute_the_same(original):
    _, model, path, how, image = original
    vit = vitx.load(path, **how).eval()
    assert vit.pos_embed.dtype == torch.float64
    torch.testing.assert_close(vit(image), model(image), rtol=1e-10, atol=1e-10)


def test_weights_are_written_back_bit_for_bit(original, tmp_path):
    name, model, path, how, _ = original
    vitx.export(vitx.load(path, **how), tmp_path / "ours.pt", name)
    again = torch.load(tmp_path / "ours.pt", weights_only=True)
    theirs = model.state_dict()
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[key], theirs[key]) for key in theirs)
    model.load_state_dict(again, strict=True)


def test_a_number_of_heads_that_the_file_does_not_tell_is_asked_for(tmp_path):
    torch.save(PlainVit().state_dict(), tmp_path / "merged.pt")
    with pytest.raises(ValueError, match=r"give it, load\(path, heads=…\); it divides 48"):
        vitx.load(tmp_path / "merged.pt")


def test_a_merged_projection_without_bias_is_read(tmp_path):
    model = randomised(PlainVit(lambda: MergedAttention(bias=False)).double().eval())
    torch.save(model.state_dict(), tmp_path / "merged.pt")
    vit = vitx.load(tmp_path / "merged.pt", heads=4).eval()
    assert vit.config.qkv_bias == "none"
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(vit(image), model(image), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("scratch-cifar10", "scratch-cifar10"), ("scratch-places365", "scratch-places365")],
)
def test_the_recipes_model_is_the_projects(recipe, name, tmp_path):
    config = override(RECIPES[recipe].model, depth=2)
    vitx.export(vitx.build(config), tmp_path / "x.pt", name)
    read = vitx.load(tmp_path / "x.pt", heads=config.heads).config
    free = ("drop", "attention_drop", "position_drop", "patchify")
    same = {name: getattr(config, name) for name in free}
    assert override(read, **same) == config


@pytest.fixture(scope="module")
def hugging_face():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        image_size=12, patch_size=4, layer_norm_eps=1e-12, qkv_bias=True,
        id2label={0: "ant", 1: "bee", 2: "cat"}, label2id={"ant": 0, "bee": 1, "cat": 2},
    )  # fmt: skip
    return transformers, config


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
def test_what_save_pretrained_writes_is_read(hugging_face, tmp_path, kind):
    transformers, config = hugging_face
    theirs = randomised(getattr(transformers, kind)(config).double().eval())
    theirs.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(
        size={"height": 12, "width": 12}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    ).save_pretrained(tmp_path)
    vit = vitx.load(tmp_path).eval()
    image = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        if kind == "ViTModel":
            wanted, found = theirs(image).last_hidden_state, vit.encode(image)
        else:
            wanted, found = theirs(image).logits, vit(image)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    about = weights.describe(tmp_path)
    assert about.preprocessing == Preprocessing("squash", (0.5,) * 3, (0.25,) * 3)
    if kind != "ViTModel":
        assert about.classes == ("ant", "bee", "cat")


def test_a_file_of_hugging_face_has_its_folders_settings(hugging_face, tmp_path):
    transformers, config = hugging_face
    transformers.ViTModel(config).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said |= {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}
    (tmp_path / "config.json").write_text(json.dumps(said))
    read = vitx.load(tmp_path / "model.safetensors").config
    assert read == vitx.load(tmp_path).config
    assert (read.mlp, read.norm, read.heads) == ("gelu_tanh", "layernorm(eps=0.001)", 3)


def test_another_number_of_heads_than_the_files_is_refused(hugging_face, tmp_path):
    transformers, config = hugging_face
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model has 3 attention heads, not 6"):
        vitx.load(tmp_path, heads=6)
    ours = override(weights.describe(tmp_path).config, heads=6)
    with pytest.raises(ValueError, match="the model has 3 attention heads, not 6"):
        weights.start(ours, tmp_path)


@pytest.mark.parametrize(
    ("said", "resize"),
    [
        ({}, "squash"),
        ({"do_center_crop": True, "size": {"shortest_edge": 16}, "crop_size": 12}, "crop"),
        (
            {"do_center_crop": True, "size": {"shortest_edge": 16},
             "crop_size": {"height": 12, "width": 12}},
            "crop",
        ),
        ({"do_center_crop": True, "size": {"shortest_edge": 16}, "crop_size": 14}, None),
        ({"do_center_crop": True, "size": {"shortest_edge": 8}, "crop_size": 12}, None),
        ({"do_center_crop": True, "size": 16, "crop_size": 12}, None),
        ({"size": {"shortest_edge": 12}}, None),
        ({"size": 12, "do_rescale": True, "rescale_factor": 0.00392156862745098}, "squash"),
        ({"size": {"height": 12, "width": 14}}, None),
        ({"size": 12, "resample": 9}, None),
        ({"do_rescale": False}, None),
        ({"do_resize": False}, None),
        ({"rescale_factor": 1 / 127.5}, None),
        (
            {"do_center_crop": True, "size": {"height": 16, "width": 16},
             "crop_size": {"height": 12, "width": 12}},
            None,
        ),
    ],
)  # fmt: skip
def test_a_way_to_crop_that_cannot_be_said_is_not_guessed(hugging_face, tmp_path, said, resize):
    transformers, config = hugging_face
    transformers.ViTModel(config).save_pretrained(tmp_path)
    said |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    centre = 0.75 if resize == "crop" else CENTRE
    wanted = resize and Preprocessing(resize, (0.5,) * 3, (0.25,) * 3, centre=centre)
    assert weights.describe(tmp_path).preprocessing == wanted
    for damaged in ([], {"rescale_factor": None}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"preprocessor_config\.json can't be read"):
            weights.describe(tmp_path)


def test_a_vit_is_written_for_hugging_face(hugging_face, tmp_path):
    transformers, config = hugging_face
    theirs = randomised(transformers.ViTForImageClassification(config).eval())
    theirs.save_pretrained(tmp_path)
    vitx.export(vitx.load(tmp_path), tmp_path / "pytorch_model.bin", "hf-vit")
    (tmp_path / "model.safetensors").unlink()
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    image = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(again(image).logits, theirs(image).logits)


SMALL = ModelConfig(image=8, patch=4, classes=5, width=16, depth=1, heads=2, init="xavier")


def test_a_file_of_this_project_carries_configuration_classes_and_preprocessing(tmp_path):
    vit = randomised(vitx.build(SMALL))
    about = weights.Description(SMALL, tuple("abcde"), Preprocessing("crop", (0.1,), (0.2,)))
    weights.save(vit, tmp_path / "w.safetensors", about)
    assert weights.describe(tmp_path / "w.safetensors") == about
    with pytest.raises(ValueError, match="the model has 2 attention heads, not 4"):
        vitx.load(tmp_path / "w.safetensors", heads=4)
    again = vitx.load(tmp_path / "w.safetensors")
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(again.eval()(image), vit.eval()(image))


def test_a_new_head_is_made_and_said(tmp_path, capsys):
    vit = randomised(vitx.build(SMALL))
    weights.save(vit, tmp_path / "w.safetensors", weights.Description(SMALL))
    new = vitx.load(tmp_path / "w.safetensors", classes=3)
    assert "a new head of 3 classes instead of 5, drawn with seed 0" in capsys.readouterr().err
    assert new.head.weight.shape == (3, 16)
    assert torch.equal(new.pos_embed, vit.pos_embed)
    same = vitx.load(tmp_path / "w.safetensors", classes=5)
    assert torch.equal(same.head.weight, vit.head.weight)


def cosine(q, k, v, *, mask=None, drop=0.0):
    return v


def test_a_model_that_computes_another_function_is_refused(tmp_path):
    weights.save(vitx.build(SMALL), tmp_path / "w.safetensors", weights.Description(SMALL))
    other = override(SMALL, norm="layernorm(eps=1e-3)")
    with pytest.raises(ValueError, match=r"model\.norm is 'layernorm' there and"):
        weights.start(other, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"model\.attention is 'sdpa' there and"):
        weights.start(override(SMALL, attention=cosine), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"model\.patchify is 'conv' there and 'stem' here"):
        weights.start(override(SMALL, patchify="stem"), tmp_path / "w.safetensors")


def test_the_same_function_by_another_name_is_accepted(tmp_path):
    vit = randomised(vitx.build(SMALL))
    weights.save(vit, tmp_path / "w.safetensors", weights.Description(SMALL))
    other = override(SMALL, norm="layernorm(eps=1e-06)", attention="math", patchify="unfold")
    image = torch.randn(2, 3, 8, 8)
    found = weights.start(other, tmp_path / "w.safetensors").eval()(image)
    torch.testing.assert_close(found, vit.eval()(image))


def test_a_folder_of_timms_keeps_timms_norm(tmp_path):
    import timm

    model = randomised(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval())
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    said = {"architecture": "vit_tiny_patch16_224", "num_classes": 1000}
    (tmp_path / "config.json").write_text(json.dumps(said))
    config = weights.describe(tmp_path, heads=3).config
    assert config.norm == "layernorm"


def test_a_timm_file_is_recognised(tmp_path):
    import timm

    model = randomised(
        timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4).eval()
    )
    torch.save(model.state_dict(), tmp_path / "timm.pt")
    vit = vitx.load(tmp_path / "timm.pt", heads=3).eval()
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit(image), model(image))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b"hello"), "is no file of plain tensors"),
        (lambda p: torch.save({"a": torch.zeros(2)}, p), "is of no known format"),
        (lambda p: torch.save([1, 2], p), "holds no state dict"),
        (lambda p: p.with_suffix(".safetensors").write_bytes(b"x" * 20), "is no safetensors file"),
        (lambda p: None, "does not exist"),
    ],
)
def test_files_that_are_none_of_these_are_refused(tmp_path, write, message):
    path = tmp_path / "w.pt"
    write(path)
    if path.with_suffix(".safetensors").exists():
        path = path.with_suffix(".safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        vitx.load(path)


def test_a_file_with_a_tensor_too_few_or_too_many_is_refused(tmp_path):
    state = PlainVit().state_dict()
    cut = {key: value for key, value in state.items() if key != "encoder.blocks.1.mlp.dense_1.bias"}
    torch.save(cut, tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"the file lacks encoder\.blocks\.1\.mlp\.dense_1\.bias"):
        vitx.load(tmp_path / "cut.pt", heads=4)
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match="no place for extra"):
        vitx.load(tmp_path / "more.pt", heads=4)


def test_an_activation_that_cannot_be_expressed_is_refused(hugging_face, tmp_path):
    transformers, config = hugging_face
    transformers.ViTModel(config).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text()) | {"hidden_act": "selu"}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="hidden_act = 'selu' can't be expressed"):
        vitx.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "format", "message"),
    [
        ({"pool": "mean"}, "hf-vit", "means model.pool = 'cls', the model has 'mean'"),
        ({"placement": "post"}, "hf-vit", "means model.placement = 'pre'"),
        ({"mlp": "gelu"}, "scratch-cifar10", "means model.mlp = 'gelu_tanh'"),
        ({"registers": 2}, "hf-vit", "means model.registers = 0"),
        ({}, "hf-vit", r"means model.norm = 'layernorm\(eps=1e-12\)', the model has 'layernorm'"),
    ],
)
def test_a_model_that_means_something_else_there_is_not_written(tmp_path, changes, format, message):
    vit = vitx.build(override(SMALL, **changes))
    with pytest.raises(ValueError, match=message):
        vitx.export(vit, tmp_path / "x.pt", format)
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize(("hidden", "width"), [(120, 88), (960, 704), (3264, 1344), (192, 48)])
def test_the_ratio_of_the_mlp_gives_its_hidden_width(hidden, width):
    ratio = ModelConfig.ratio(hidden, width)
    assert ModelConfig(width=width, heads=1, mlp_ratio=ratio).hidden == hidden
