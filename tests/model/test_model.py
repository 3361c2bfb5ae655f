"""The model: exactness of its savings, contracts of every slot, compile, functional use."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import vitx
from vitx.measure.equality import randomise
from vitx.model.config import SLOTS, ModelConfig
from vitx.model.functional.attention import ATTENTION, WEIGHTS, sdpa
from vitx.settings import override

SMALL = ModelConfig(
    image=(9, 20), patch=(3, 4), channels=3, classes=7, width=24, depth=3, heads=3, registers=2
)
VARIANTS = [(slot, name) for slot, table in SLOTS.items() for name in table]
OPTIONS = {
    "no class token": {"class_token": False, "pool": "mean"},
    "one channel": {"channels": 1},
    "positions on patches": {"position_tokens": "patches"},
    "layer scale": {"layer_scale": 0.1},
    "no qkv bias": {"qkv_bias": "none"},
    "fc norm": {"fc_norm": True, "final_norm": False},
    "no norm": {"final_norm": False},
    "no head": {"classes": 0},
    "depth one": {"depth": 1},
    "one patch": {"patch": (9, 20), "registers": 0},
    "norm after": {"placement": "post"},
    "stem": {"patchify": "stem", "image": (8, 20), "patch": 4},
}


def make(device="cpu", **changes):
    config = override(SMALL, **changes)
    vit = vitx.build(config, dtype=torch.float64, device=device).eval()
    randomise(vit)
    return vit


def images(vit, batch=2):
    config = vit.config
    some = next(vit.parameters())
    return torch.randn(batch, config.channels, *config.size, dtype=some.dtype, device=some.device)


def variant(slot, name):
    """The settings that a variant needs beside its name."""
    needed = {"mean": {"class_token": False}, "stem": {"image": (8, 20), "patch": 4}}
    return {slot: name} | needed.get(name, {})


@pytest.mark.parametrize(("slot", "name"), VARIANTS)
def test_every_variant_keeps_shape_dtype_device_and_its_input(slot, name, device):
    vit = make(device, **variant(slot, name))
    image = images(vit)
    before = image.clone()
    logits = vit(image)
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float64
    assert logits.device.type == device.type
    assert torch.equal(image, before)
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in vit.parameters())


@pytest.mark.parametrize(("slot", "name"), VARIANTS)
def test_items_of_a_batch_are_independent(slot, name):
    vit = make(**variant(slot, name))
    image = images(vit).requires_grad_()
    vit(image)[0].sum().backward()
    assert image.grad[0].abs().max() > 0
    assert image.grad[1].abs().max() == 0


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_reading_fewer_tokens_changes_no_value_and_no_gradient(changes):
    vit = make(**changes)
    image = images(vit)
    everything, first = vit.encode(image), vit.encode(image, read=1)
    assert first.shape[1] == 1
    torch.testing.assert_close(first, everything[:, :1])
    everything[:, 0].square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None}
    vit.zero_grad()
    first.square().sum().backward()
    found = {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_sdpa_and_math_are_the_same_model(changes):
    fused, plain = make(**changes), make(attention="math", **changes)
    image = images(fused)
    torch.testing.assert_close(fused(image), plain(image))


def test_conv_and_unfold_are_the_same_model():
    conv, unfold = make(patchify="conv"), make(patchify="unfold")
    image = images(conv)
    torch.testing.assert_close(conv(image), unfold(image))


@pytest.mark.parametrize("pool", SLOTS["pool"])
@pytest.mark.parametrize("attention", SLOTS["attention"])
def test_a_masked_token_has_no_influence(pool, attention):
    vit = make(pool=pool, attention=attention)
    image, mask = images(vit), torch.ones(2, 3 + 15, dtype=torch.bool)
    mask[:, 3 + 7] = False  # the patch in row 1, column 2
    changed = image.clone()
    changed[:, :, 3:6, 8:12] += 1
    torch.testing.assert_close(vit(image, mask=mask), vit(changed, mask=mask))
    assert (vit(image) - vit(changed)).abs().max() > 1e-3


def test_attention_maps_reproduce_the_fused_output():
    vit = make()
    image = images(vit)
    maps = vit.attention_maps(image)
    assert maps.shape == (3, 2, 3, 18, 18)
    block, tokens = vit.blocks[0], vit.embed(image)
    _, _, v = block.attn.split(block.norm1(tokens), None)
    mixed = torch.einsum("bhij,bhje->bihe", maps[0], v).flatten(2)
    torch.testing.assert_close(block.attn.proj(mixed), block.attn(block.norm1(tokens)))


def test_a_block_that_normalises_after_is_pytorchs_encoder_layer():
    vit = make(placement="post", norm="layernorm(eps=1e-5)", registers=0)
    layer = torch.nn.TransformerEncoderLayer(
        24, 3, 96, dropout=0.0, activation="gelu", batch_first=True, dtype=torch.float64
    )
    names = {
        "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.", "linear2.": "mlp.fc2.", "norm": "norm",
    }  # fmt: skip
    state = vit.blocks[0].state_dict()
    theirs = {
        name: state[next(ours + name[len(part):] for part, ours in names.items()
                         if name.startswith(part))]
        for name in layer.state_dict()
    }  # fmt: skip
    layer.load_state_dict(theirs)
    tokens = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(vit.blocks[0](tokens), layer(tokens))


def test_attention_maps_are_of_the_tokens_that_the_placement_gives():
    vit = make(placement="post")
    tokens = vit.embed(images(vit))
    wanted = vit.blocks[0].attn.weights(tokens)
    torch.testing.assert_close(vit.attention_maps(images(vit))[0].shape, wanted.shape)
    torch.testing.assert_close(vit.blocks[0].attention_map(tokens), wanted)


def test_patch_drop_leaves_patches_out_in_training_only():
    vit = make(patch_drop=0.4)
    image = images(vit)
    assert vit.embed(image).shape[1] == 3 + 15
    vit.train()
    assert vit.embed(image).shape[1] == 3 + 9
    assert (vit(image) - vit(image)).abs().max() > 0
    with pytest.raises(ValueError, match=r"model\.patch_drop leaves some out"):
        vit(image, mask=torch.ones(2, 18, dtype=torch.bool))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": (3, 4)}, "needs a patch of 2, 4, 8, 16, …, not \\(3, 4\\)"),
        ({"patch": 8, "image": 16, "width": 30}, "30 is not a multiple of 4"),
    ],
)
def test_a_stem_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        vitx.build(override(SMALL, patchify="stem", **changes))


def test_attention_maps_of_an_unknown_core_are_refused():
    def mine(q, k, v, *, mask, drop):
        return sdpa(q, k, v, mask=mask, drop=drop)

    vit = make(attention=mine)
    with pytest.raises(ValueError, match=r"mine.*has no attention maps"):
        vit.attention_maps(images(vit))


def test_a_knob_of_a_call_string_reaches_the_function():
    image = images(make())
    base, wide = make(norm="layernorm"), make(norm="layernorm(eps=0.5)")
    assert (base(image) - wide(image)).abs().max() > 1e-3
    torch.testing.assert_close(wide(image), make(norm="layernorm( eps = 5e-1 )")(image))


def test_functionalize_is_pure_and_bit_equal():
    vit = make()
    image = images(vit)
    params, apply = vitx.functionalize(vit)
    assert torch.equal(apply(params, image), vit(image))
    grads = torch.func.grad(lambda p: apply(p, image).square().sum())(params)
    vit(image).square().sum().backward()
    for name, parameter in vit.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)
    zeroed = {name: torch.zeros_like(value) for name, value in params.items()}
    assert apply(zeroed, image).abs().max() == 0
    assert vit(image).abs().max() > 0


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # no batched fused attention
@pytest.mark.parametrize("attention", SLOTS["attention"])
def test_functionalize_takes_vmap_and_jacrev(attention):
    vit = make(attention=attention)
    params, apply = vitx.functionalize(vit)
    image = images(vit, batch=1)
    stacked = {name: torch.stack([value, 2 * value]) for name, value in params.items()}
    both = torch.func.vmap(apply, in_dims=(0, None))(stacked, image)
    torch.testing.assert_close(both[0], vit(image))
    bias = torch.func.jacrev(lambda p: apply(p, image))(params)["head.bias"]
    torch.testing.assert_close(bias[0], torch.eye(7, dtype=torch.float64))


def test_a_model_is_exported_whole(unchecked):
    vit = make(depth=1)
    image = images(vit)
    program = torch.export.export(vit, (image,))
    torch.testing.assert_close(program.module()(image), vit(image))


@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "adapter"])
def test_what_is_put_on_qkv_acts_in_the_last_block_too(how):
    class Adapter(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, x):
            return 2 * self.inner(x)

    vit = make()
    image, attn = images(vit), vit.blocks[-1].attn
    everything = vit.encode(image)
    if how == "hook":
        attn.qkv.register_forward_hook(lambda module, args, out: 2 * out)
    elif how == "pre-hook":
        attn.qkv.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif how == "forward":
        real = attn.qkv.forward
        attn.qkv.forward = lambda x: 2 * real(x)
    else:
        attn.qkv = Adapter(attn.qkv)
    changed = vit.encode(image)
    assert (changed - everything).abs().max() > 1e-3
    torch.testing.assert_close(vit.encode(image, read=1), changed[:, :1])


@pytest.mark.parametrize("patchify", ["conv", "unfold"])
def test_what_is_put_on_the_patch_projection_acts(patchify):
    vit = make(patchify=patchify)
    image = images(vit)
    before = vit.patch_embed(image)
    vit.patch_embed.proj.register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(vit.patch_embed(image), 2 * before)


def test_the_same_seed_draws_the_same_bits_and_another_does_not():
    one, two, three = (vitx.build(SMALL, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["pos_embed"], three["pos_embed"])


@pytest.mark.parametrize("init", SLOTS["init"])
def test_a_new_knob_moves_no_other_draw(init):
    base = vitx.build(override(SMALL, init=init), seed=3).state_dict()
    changed = vitx.build(
        override(SMALL, init=init, layer_scale=0.1, fc_norm=True, depth=4), seed=3
    ).state_dict()
    assert all(torch.equal(value, changed[name]) for name, value in base.items())
    assert set(changed) > set(base)


def test_build_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    vitx.build(SMALL)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("ours", "theirs"), [("timm", ""), ("xavier", "jax")])
def test_an_init_scheme_has_the_distribution_of_timms(ours, theirs):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    reference = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=192, depth=1, num_heads=3, weight_init=theirs,
        num_classes=100, reg_tokens=8,
    )  # fmt: skip
    config = ModelConfig(
        image=32, patch=4, width=192, depth=1, heads=3, classes=100, registers=8, init=ours
    )
    mine = dict(vitx.build(config).named_parameters())
    for name, value in reference.named_parameters():
        a, b = value.detach().double(), mine[name].detach().double()
        count = a.numel()
        if a.std() == 0:
            assert torch.equal(a, b), name
            continue
        assert abs(a.mean() - b.mean()) < 5 * a.std() * (2 / count) ** 0.5, name
        assert abs(a.std() / b.std() - 1) < 5 / count**0.5, name
        assert 0.6 < b.abs().max() / a.abs().max() < 1.7, name
        if count > 10_000:
            assert abs(a.abs().max() / b.abs().max() - 1) < 0.35, name


def test_drop_path_rates_are_tensors_that_grow_linearly():
    vit = vitx.build(override(SMALL, drop_path=0.3))
    rates = [block.drop_path1.rate.item() for block in vit.blocks]
    assert rates == pytest.approx([0, 0.15, 0.3])
    assert not any("rate" in name for name in vit.state_dict())
    image = images(vit)
    assert (vit.train()(image) - vit(image)).abs().max() > 0
    assert torch.equal(vit.eval()(image), vit(image))


def test_every_dropout_acts_in_training_only():
    for field in ("drop", "attention_drop", "position_drop", "head_drop"):
        vit = make(**{field: 0.5})
        image = images(vit)
        assert torch.equal(vit(image), vit(image)), field
        vit.train()
        assert (vit(image) - vit(image)).abs().max() > 0, field


def test_a_wrong_image_size_is_refused():
    vit = make()
    with pytest.raises(ValueError, match=r"the model takes \(batch, 3, 9, 20\)"):
        vit(torch.zeros(2, 3, 20, 9, dtype=torch.float64))


def test_a_model_survives_pickle_and_its_state_dict():
    vit = make(norm="layernorm(eps=1e-5)")
    image = images(vit)
    assert torch.equal(pickle.loads(pickle.dumps(vit))(image), vit(image))
    twin = vitx.build(vit.config, seed=9, dtype=torch.float64).eval()
    twin.load_state_dict(vit.state_dict())
    assert torch.equal(twin(image), vit(image))


def test_fixed_positions_follow_the_dtype_of_the_model():
    single = vitx.build(override(SMALL, position="sincos2d"))
    assert single.pos_embed.dtype == single(images(single)).dtype == torch.float32
    vit = vitx.build(override(SMALL, position="sincos2d"), dtype=torch.float64)
    assert torch.equal(vit.pos_embed, vit.positions())
    assert "pos_embed" not in vit.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(("slot", "name"), [pair for pair in VARIANTS if pair[0] != "init"])
def test_every_variant_compiles_without_a_graph_break(slot, name, compiled):
    vit = vitx.build(override(SMALL, depth=2, **variant(slot, name)))
    randomise(vit)
    image = images(vit)
    run = torch.compile(vit, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(image), vit(image))
    torch.compiler.set_stance("fail_on_recompile")
    run(image + 1)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_inductor_agrees_with_eager(training, compiled):
    vit = vitx.build(override(SMALL, depth=1)).train(training)
    randomise(vit)
    image = images(vit)
    run = torch.compile(vit, fullgraph=True)
    torch.testing.assert_close(run(image), vit(image), rtol=1e-4, atol=1e-4)
    if training:
        found = torch.autograd.grad(run(image).square().sum(), list(vit.parameters()))
        wanted = torch.autograd.grad(vit(image).square().sum(), list(vit.parameters()))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_one_compiled_block_serves_every_depth(compiled):
    vit = vitx.build(override(SMALL, drop_path=0.2, depth=5)).train()
    tokens = torch.randn(2, 18, 24)
    counter = CompileCounterWithBackend("aot_eager")
    for block in vit.blocks:
        torch.compile(block, fullgraph=True, backend=counter)(tokens)
    assert counter.frame_count == 1


def test_import_adds_less_than_0_3_s_to_torchs():
    program = (
        "import torch, time; start = time.process_time(); import vitx; "
        "print(time.process_time() - start)"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", program], capture_output=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 0.3


def test_import_loads_no_heavy_library():
    heavy = ["timm", "wandb", "sklearn", "scipy", "matplotlib", "torchvision", "tyro", "optuna"]
    program = f"import vitx, sys; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


def _warm(q, k, v, *, mask=None, drop=0.0, heat=1.0):
    return _warm_weights(q, k, heat=heat) @ v


def _warm_weights(q, k, *, mask=None, heat=1.0):
    return (q @ k.mT / heat).softmax(dim=-1)


def test_attention_maps_have_the_knobs_of_their_core(monkeypatch):
    monkeypatch.setitem(ATTENTION, "_warm", _warm)
    monkeypatch.setitem(WEIGHTS, _warm, _warm_weights)
    image = torch.randn(2, 3, 12, 12)
    config = ModelConfig(image=12, patch=3, width=24, depth=1, heads=3, classes=7)
    for heat in (0.5, 3.0):
        vit = vitx.build(override(config, attention=f"_warm(heat={heat})")).eval()
        tokens = vit.blocks[0].norm1(vit.embed(image))
        q, k, v = vit.blocks[0].attn.split(tokens, None)
        maps = vit.attention_maps(image)[0]
        torch.testing.assert_close(maps @ v, _warm(q, k, v, heat=heat))
