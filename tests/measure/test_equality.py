"""The equality check: it sees every planted bug, says what differs, and touches nothing."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import vitx
from benchmarks import mutants
from vitx.measure.compare import equality, randomise
from vitx.measure.equality import timed_error
from vitx.model.config import ModelConfig
from vitx.settings import override

CONFIG = ModelConfig(image=12, patch=3, width=24, depth=2, heads=3, classes=7)


@pytest.fixture(scope="module")
def references():
    return [mutants.reference(options) for options in mutants.SHAPES]


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_caught(mutant, references):
    with mutants.mutated(mutant) as package:
        assert any(mutants._verdicts(package, model)[0] for model in references)


def test_the_unmutated_model_passes_both_checks(references):
    for model in references:
        assert mutants._verdicts(vitx, model) == (False, False)


def test_there_are_thirty_different_mutants():
    assert len({(m.file, m.before, m.after) for m in mutants.MUTANTS}) == 30


def test_the_real_package_is_back_after_a_mutant():
    with mutants.mutated(mutants.MUTANTS[0]) as package:
        assert package.Vit is not vitx.Vit
    import vitx as again

    assert again.Vit is vitx.Vit


def test_a_dropped_key_bias_is_an_equivalent_change():
    """A key bias adds the same to every score of a query, which softmax ignores: no mutant."""
    vit = vitx.build(CONFIG, dtype=torch.float64).eval()
    randomise(vit)
    other = deepcopy(vit)
    with torch.no_grad():
        for block in other.blocks:
            block.attn.qkv.bias[24:48] = 0
    image = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(vit(image), other(image))


def test_the_originals_are_untouched():
    a, b = vitx.build(CONFIG, seed=1), vitx.build(CONFIG, seed=2).train()
    before = [deepcopy(model.state_dict()) for model in (a, b)]
    assert equality(a, b, torch.randn(2, 3, 12, 12)).passed
    for model, state in zip((a, b), before, strict=True):
        assert model.training
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())


def test_a_difference_is_said_with_its_place():
    result = equality(
        vitx.build(CONFIG), vitx.build(override(CONFIG, norm="layernorm(eps=1e-5)")),
        torch.randn(2, 3, 12, 12),
    )  # fmt: skip
    assert not result.passed
    assert "outputs differ by" in result.reason
    assert "NOT EQUAL" in str(result)


def test_a_gradient_that_is_cut_is_named():
    class Cut(vitx.Vit):
        def embed(self, image):
            tokens = super().embed(image)
            return torch.cat([tokens[:, :1].detach(), tokens[:, 1:]], dim=1)

    a = vitx.build(CONFIG)
    b = Cut(CONFIG)
    result = equality(a, b, torch.randn(2, 3, 12, 12))
    assert result.output_error == 0
    assert result.worst_gradient == "cls_token"
    assert not result.passed


def test_nan_is_never_equal():
    class Broken(vitx.Vit):
        def forward(self, image, *, mask=None):
            return super().forward(image) * float("nan")

    assert not equality(vitx.build(CONFIG), Broken(CONFIG), torch.randn(2, 3, 12, 12)).passed


def test_what_leaves_nothing_to_compare_is_refused():
    vit, image = vitx.build(CONFIG), torch.randn(2, 3, 12, 12)
    with pytest.raises(ValueError, match="example holds no image"):
        equality(vit, vit, image[:0])
    with torch.no_grad(), pytest.raises(ValueError, match="gradients can't be compared within"):
        equality(vit, vit, image)
    with pytest.raises(ValueError, match="Flatten has no parameter"):
        equality(nn.Flatten(), nn.Flatten(), image)

    class Pair(nn.Linear):
        def forward(self, image):
            return image, super().forward(image)

    with pytest.raises(ValueError, match="Pair gives no tensor"):
        equality(Pair(12, 3), Pair(12, 3), image)


def test_one_hot_attention_is_refused_as_blind():
    class Sharp(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x):
            q = self.q(x)[None] * 1000
            return nn.functional.scaled_dot_product_attention(q, q, q)[0]

    result = equality(Sharp(), Sharp(), torch.randn(5, 8))
    assert not result.passed
    assert "attention entropy" in result.reason


def test_a_key_map_joins_modules_of_other_names():
    a = nn.Sequential(nn.Linear(3, 5))
    keys = {"0.weight": "map.weight", "0.bias": "map.bias"}
    assert equality(a, _Named(), torch.randn(2, 3), keys=keys).passed


class _Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 5)

    def forward(self, x):
        return self.map(x)


def test_state_dicts_that_dont_match_are_refused_by_name():
    a, b = nn.Linear(3, 5), nn.Linear(3, 5, bias=False)
    with pytest.raises(ValueError, match="the candidate lacks bias"):
        equality(a, b, torch.randn(2, 3))
    with pytest.raises(ValueError, match="the reference lacks bias"):
        equality(b, a, torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"weight is \(5, 3\) in the reference, \(4, 3\)"):
        equality(a, nn.Linear(3, 4), torch.randn(2, 3))
    with pytest.raises(ValueError, match="keys names what the reference has not: wait"):
        equality(a, a, torch.randn(2, 3), keys={"wait": "weight"})


def test_randomise_scales_matrices_by_fan_in_and_spreads_attention():
    vit = vitx.build(override(CONFIG, width=192, layer_scale=0.1))
    randomise(vit)
    state = vit.state_dict()
    assert state["blocks.0.mlp.fc1.weight"].std().item() == pytest.approx(192**-0.5, rel=0.02)
    qkv = state["blocks.0.attn.qkv.weight"]
    assert qkv[:384].std().item() == pytest.approx((2 / 192) ** 0.5, rel=0.02)
    assert qkv[384:].std().item() == pytest.approx(192**-0.5, rel=0.02)
    assert state["norm.weight"].mean().item() == pytest.approx(1, abs=0.1)
    assert state["norm.weight"].std().item() == pytest.approx(0.3, rel=0.2)
    assert state["blocks.0.ls1.gamma"].std().item() == pytest.approx(0.3, rel=0.2)


@pytest.mark.parametrize("training", [False, True])
def test_the_timed_dtype_is_as_exact_as_the_reference(training):
    a, b = vitx.build(CONFIG), vitx.build(override(CONFIG, patchify="unfold", attention="math"))
    image = torch.randn(2, 3, 12, 12)
    errors = [timed_error(a, model, image, training=training, run=model) for model in (a, b)]
    assert 1e-8 < errors[0] < 1e-5
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("training", [False, True])
def test_the_exact_side_takes_a_large_batch_in_parts(training, monkeypatch):
    """Its activations in float64 need not fit where the timed ones do; the error is the same."""
    image, kept = torch.randn(11, 3, 12, 12), []

    def watch(module, args):
        if isinstance(module, vitx.Vit) and torch.is_grad_enabled():
            kept.append((len(args[0]), args[0].dtype))

    def error(most):
        monkeypatch.setattr("vitx.measure.equality.AT_ONCE", most)
        vit = vitx.build(CONFIG)
        return timed_error(vit, vit, image, training=training, run=vit)

    whole = error(11)
    handle = nn.modules.module.register_module_forward_pre_hook(watch)
    assert error(4) == pytest.approx(whole, rel=1e-6)
    handle.remove()
    exact = [(4, torch.float64), (4, torch.float64), (3, torch.float64)]
    assert kept == ([*exact, (11, torch.float32)] if training else [])


def test_a_model_that_draws_in_training_is_refused_there():
    vit = vitx.build(override(CONFIG, drop=0.1))
    with pytest.raises(ValueError, match="draws random numbers in training"):
        timed_error(vit, vit, torch.randn(2, 3, 12, 12), training=True, run=vit)


def test_outputs_and_parameters_must_correspond():
    class Tall(nn.Linear):
        def forward(self, x):
            return super().forward(x)[None]

    with pytest.raises(ValueError, match=r"outputs are \(2, 5\) and \(1, 2, 5\)"):
        equality(nn.Linear(3, 5), Tall(3, 5), torch.randn(2, 3))
    fixed = nn.Linear(3, 5)
    bias = fixed.bias.detach()
    del fixed.bias
    fixed.register_buffer("bias", bias)
    with pytest.raises(ValueError, match="bias is a parameter of one module and a buffer"):
        equality(nn.Linear(3, 5), fixed, torch.randn(2, 3))
    keys = {"weight": "bias"}
    with pytest.raises(ValueError, match="two names of the reference the same name"):
        equality(nn.Linear(3, 5), nn.Linear(3, 5), torch.randn(2, 3), keys=keys)


def test_a_low_precision_candidate_is_seen_in_the_timed_dtype():
    class Rounded(vitx.Vit):
        def forward(self, image, *, mask=None):
            return super().forward(image.to(torch.bfloat16).float())

    a, b = vitx.build(CONFIG), Rounded(CONFIG)
    image = torch.randn(2, 3, 12, 12)
    errors = [timed_error(a, model, image, training=False, run=model) for model in (a, b)]
    assert errors[1] > 100 * errors[0]
