"""timm's models as ours: equality in both directions, refusals by timm's option, no timm inside."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import vitx
from vitx.measure.compare import equality

SMALL = {"img_size": (9, 20), "patch_size": (3, 4), "num_classes": 7, "embed_dim": 24,
         "depth": 3, "num_heads": 3}  # fmt: skip
EXPRESSIBLE = {
    "plain": {},
    "registers": {"reg_tokens": 2},
    "positions on patches": {"reg_tokens": 2, "no_embed_class": True},
    "no position": {"pos_embed": "none"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "mean beside class token": {"global_pool": "avg"},
    "mean of normed tokens": {"global_pool": "avg", "fc_norm": False},
    "token after norm": {"fc_norm": True},
    "no final norm": {"final_norm": False},
    "layer scale": {"init_values": 0.1},
    "no qkv bias": {"qkv_bias": False},
    "one channel": {"in_chans": 1},
    "no head": {"num_classes": 0},
    "narrow MLP": {"mlp_ratio": 1.5},
    "depth one": {"depth": 1},
    "PyTorch's eps": {"norm_layer": "layernorm", "embed_dim": 24},
    "dynamic size": {"dynamic_img_size": True},
    "rates": {"drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1,
              "drop_path_rate": 0.2, "pos_drop_rate": 0.1, "patch_drop_rate": 0.5},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "normalised queries and keys": {"qk_norm": True},
}  # fmt: skip
REFUSED = {
    "pre_norm": {"pre_norm": True},
    "scale_attn_norm": {"scale_attn_norm": True},
    "scale_mlp_norm": {"scale_mlp_norm": True},
    "proj_bias": {"proj_bias": False},
    "global_pool = map": {"global_pool": "map"},
    "global_pool = max": {"global_pool": "max"},
    "pool_include_prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "dynamic_img_pad": {"dynamic_img_pad": True},
    "attn_layer": {"attn_layer": "diff"},
    "act_layer": {"act_layer": "relu"},
    "norm_layer": {"norm_layer": "rmsnorm"},
}


def small(**options):
    torch.manual_seed(0)
    return VisionTransformer(**(SMALL | options))


def images(model, batch=2):
    channels = model.patch_embed.proj.in_channels
    return torch.randn(batch, channels, *model.patch_embed.img_size)


@pytest.mark.parametrize("options", EXPRESSIBLE.values(), ids=EXPRESSIBLE)
def test_a_small_odd_model_is_equal_and_loads_both_ways(options):
    model = small(**options)
    vit = vitx.from_timm(model)
    result = equality(model, vit, images(model))
    assert result.passed, result
    assert result.gradients == len(list(model.parameters()))
    model.load_state_dict(vit.state_dict(), strict=True)
    vit.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch16_224", {"img_size": 64}),
        ("vit_base_patch16_224", {"img_size": 32, "depth": 2}),
        ("vit_small_patch32_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 70}),
        ("deit3_small_patch16_224", {"img_size": 64}),
        ("vit_base_patch16_gap_224", {"img_size": 32, "depth": 2}),
        ("vit_tiny_patch16_224", {"img_size": (32, 80)}),
    ],
)
def test_a_named_model_is_equal(name, options):
    model = timm.create_model(name, **options)
    result = equality(model, vitx.from_timm(model), images(model, 1))
    assert result.passed, result


@pytest.mark.parametrize(("option", "options"), REFUSED.items(), ids=REFUSED)
def test_what_cant_be_expressed_is_refused_by_timms_option(option, options):
    with pytest.raises(ValueError, match=f"timm's {option}.*can't be expressed"):
        vitx.from_timm(small(**options))


def test_other_classes_and_names_are_refused():
    with pytest.raises(ValueError, match="VisionTransformerDistilled is another class"):
        vitx.from_timm("deit_tiny_distilled_patch16_224", img_size=32)
    with pytest.raises(ValueError, match="did you mean 'vit_tiny_patch16_224'"):
        vitx.from_timm("vit_tiny_patch16_225")
    with pytest.raises(ValueError, match=r"timm can't make 'vit_tiny_patch16_224\.nothing'"):
        vitx.from_timm("vit_tiny_patch16_224.nothing", pretrained=True)
    with pytest.raises(ValueError, match=r"timm can't make .*no_such_option"):
        vitx.from_timm("vit_tiny_patch16_224", no_such_option=1)
    with pytest.raises(ValueError, match="go with a name"):
        vitx.from_timm(small(), img_size=32)
    with pytest.raises(ValueError, match="takes a timm model or its name"):
        vitx.from_timm(3)


def test_a_block_with_its_own_depth_of_drop_is_refused():
    model = small()
    model.blocks[1].attn.attn_drop.p = 0.5
    with pytest.raises(ValueError, match="blocks that differ"):
        vitx.from_timm(model)


@pytest.mark.parametrize(
    ("change", "option"),
    [
        (lambda m: setattr(m, "head", torch.nn.Softmax(-1)), "head"),
        (lambda m: [setattr(b.mlp.drop2, "p", 0.5) for b in m.blocks], "proj_drop_rate"),
        (lambda m: m.blocks[0].double(), "dtype"),
        (lambda m: m.set_grad_checkpointing(), "grad_checkpointing"),
        (lambda m: m.blocks[0].register_forward_pre_hook(lambda *a: None), "forward hooks on"),
    ],
    ids=["head", "MLP drop", "mixed dtypes", "checkpointing", "pre-hook"],
)
def test_a_changed_live_model_is_refused(change, option):
    model = small()
    change(model)
    with pytest.raises(ValueError, match=f"timm's {option} = "):
        vitx.from_timm(model)


def test_a_forward_hook_is_refused():
    model = small()
    model.blocks[1].register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ValueError, match=r"forward hooks on = blocks\.1"):
        vitx.from_timm(model)


def test_dtype_frozen_parameters_and_training_state_are_taken_over():
    model = small().to(torch.bfloat16).eval()
    model.blocks[1].train()
    model.pos_embed.requires_grad_(False)
    vit = vitx.from_timm(model)
    assert vit.head.weight.dtype == torch.bfloat16
    assert not vit.pos_embed.requires_grad
    assert vit.cls_token.requires_grad
    assert not vit.training
    assert vit.blocks[1].attn.training
    assert not vit.blocks[0].training


def test_the_weights_are_copies():
    model = small()
    vit = vitx.from_timm(model)
    with torch.no_grad():
        vit.head.weight.add_(1)
    assert not torch.equal(vit.head.weight, model.head.weight)


def test_rates_are_read_off_the_live_model():
    config = vitx.from_timm(small(**EXPRESSIBLE["rates"])).config
    rates = (config.head_drop, config.drop, config.attention_drop, config.drop_path)
    assert (*rates, config.position_drop) == pytest.approx((0.1, 0.1, 0.1, 0.2, 0.1))


def test_no_class_of_timm_is_in_the_result():
    vit = vitx.from_timm(small(**EXPRESSIBLE["rates"]))
    assert not [m for m in vit.modules() if "timm" in type(m).__module__]


def test_a_saved_model_rebuilds_where_timm_cant_be_imported(tmp_path):
    vit = vitx.from_timm(small(init_values=0.1)).eval()
    image = torch.randn(1, 3, 9, 20)
    torch.save({"vit": vit, "state": vit.state_dict(), "image": image, "logits": vit(image)},
               tmp_path / "saved.pt")  # fmt: skip
    program = f"""
import sys; sys.modules["timm"] = None
import torch, vitx
torch.set_num_threads({torch.get_num_threads()})
saved = torch.load({str(tmp_path / "saved.pt")!r}, weights_only=False)
assert torch.equal(saved["vit"](saved["image"]), saved["logits"])
rebuilt = vitx.build(saved["vit"].config).eval()
rebuilt.load_state_dict(saved["state"])
assert torch.equal(rebuilt(saved["image"]), saved["logits"])
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
