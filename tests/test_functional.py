"""Laws and oracles of the tensor functions, on small distinct primes: swapped axes can't pass."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitx.functional import augment, patches, position
from vitx.functional.attention import ATTENTION, weights
from vitx.functional.drop import drop_path
from vitx.functional.init import INIT, keyed_generator
from vitx.functional.loss import cross_entropy
from vitx.functional.mlp import MLP
from vitx.functional.norm import layernorm
from vitx.functional.pool import POOL, READS

B, C, Y, X, P, Q, HEADS, E = 2, 3, 3, 5, 2, 7, 2, 8


def image(device="cpu"):
    return torch.randn(B, C, Y * P, X * Q, dtype=torch.float64, device=device)


def test_unpatchify_inverts_patchify(device):
    picture = image(device)
    rows = patches.patchify(picture, patch=(P, Q))
    assert rows.shape == (B, Y * X, C * P * Q)
    assert torch.equal(patches.unpatchify(rows, grid=(Y, X), patch=(P, Q)), picture)


def test_patchify_orders_patches_as_nn_unfold_does():
    picture = image()
    wanted = nn.Unfold(kernel_size=(P, Q), stride=(P, Q))(picture).mT
    assert torch.equal(patches.patchify(picture, patch=(P, Q)), wanted)


def test_patchify_orders_patches_as_tensor_unfold_does():
    picture = image()
    windows = picture.unfold(2, P, P).unfold(3, Q, Q)
    wanted = windows.permute(0, 2, 3, 1, 4, 5).reshape(B, Y * X, C * P * Q)
    assert torch.equal(patches.patchify(picture, patch=(P, Q)), wanted)


@pytest.mark.parametrize("name", ["conv", "unfold"])
def test_every_patchify_is_a_strided_convolution(name, device):
    kernel = torch.randn(11, C, P, Q, dtype=torch.float64, device=device)
    bias = torch.randn(11, dtype=torch.float64, device=device)
    picture = image(device)
    wanted = torch.stack(
        [
            torch.einsum(
                "bcpq,dcpq->bd", picture[:, :, y * P : (y + 1) * P, x * Q : (x + 1) * Q], kernel
            )
            + bias
            for y in range(Y)
            for x in range(X)
        ],
        dim=1,
    )
    torch.testing.assert_close(patches.PATCHIFY[name](picture, kernel, bias), wanted)


def qkv(n=5, i=None, device="cpu"):
    shapes = [(B, HEADS, i or n, E), (B, HEADS, n, E), (B, HEADS, n, E)]
    return [torch.randn(s, dtype=torch.float64, device=device) for s in shapes]


@pytest.mark.parametrize("name", ["sdpa", "math"])
@pytest.mark.parametrize("n", [1, 5])
def test_every_attention_is_a_softmax_of_scaled_products(name, n, device):
    q, k, v = qkv(n, device=device)
    scores = torch.einsum("bhie,bhje->bhij", q, k) / math.sqrt(E)
    wanted = torch.einsum("bhij,bhje->bhie", scores.softmax(-1), v)
    torch.testing.assert_close(ATTENTION[name](q, k, v), wanted)


@pytest.mark.parametrize("name", ATTENTION)
def test_a_masked_key_is_as_good_as_absent(name, device):
    q, k, v = qkv(5, device=device)
    mask = torch.ones(B, 5, dtype=torch.bool, device=device)
    mask[:, 3] = False
    seen = [0, 1, 2, 4]
    wanted = ATTENTION[name](q, k[:, :, seen], v[:, :, seen])
    torch.testing.assert_close(ATTENTION[name](q, k, v, mask=mask), wanted)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_dropout_keeps_the_mean(name):
    q, k, _ = qkv(5)
    v = torch.ones(B, HEADS, 5, E, dtype=torch.float64)
    draws = torch.stack([ATTENTION[name](q, k, v, drop=0.5) for _ in range(400)])
    assert draws.std() > 0.1
    assert abs(draws.mean().item() - 1) < 0.02


def test_attention_weights_sum_to_one_over_keys():
    q, k, _ = qkv(5, i=1)
    torch.testing.assert_close(weights(q, k).sum(-1), torch.ones(B, HEADS, 1, dtype=torch.float64))


def test_gelu_is_x_times_the_normal_distribution_function():
    x = torch.linspace(-4, 4, 31, dtype=torch.float64)
    torch.testing.assert_close(MLP["gelu"](x), x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))


def test_layernorm_has_mean_zero_and_the_variance_that_eps_leaves():
    x = torch.randn(7, 11, dtype=torch.float64) * 1e-3
    gain, bias = torch.ones(11, dtype=torch.float64), torch.zeros(11, dtype=torch.float64)
    out = layernorm(x, gain, bias, eps=1e-6)
    variance = x.var(-1, unbiased=False)
    torch.testing.assert_close(out.mean(-1), torch.zeros(7, dtype=torch.float64))
    torch.testing.assert_close(out.var(-1, unbiased=False), variance / (variance + 1e-6))


def test_sincos2d_positions_differ_by_row_and_column_only():
    table = position.sincos2d((Y, X), 16, prefix=2)[0]
    assert torch.equal(table[:2], torch.zeros(2, 16, dtype=torch.float64))
    cells = table[2:].unflatten(0, (Y, X))
    assert torch.equal(cells[0, :, :8], cells[2, :, :8])  # the column's half: same in every row
    assert torch.equal(cells[:, 0, 8:], cells[:, 4, 8:])  # the row's half: same in every column
    assert len({tuple(cell.tolist()) for cell in table[2:]}) == Y * X


def test_sincos2d_is_its_formula():
    cells = position.sincos2d((Y, X), 16, prefix=0, temperature=100.0)[0]
    frequency = torch.tensor([1.0, 100 ** (-1 / 3), 100 ** (-2 / 3), 0.01], dtype=torch.float64)
    for row, (y, x) in zip(cells, ((y, x) for y in range(Y) for x in range(X)), strict=True):
        wanted = [f(p * frequency) for p in (x, y) for f in (torch.sin, torch.cos)]
        torch.testing.assert_close(row, torch.cat(wanted))


def test_sincos2d_inner_products_depend_on_distance_only():
    cells = position.sincos2d((1, 7), 16, prefix=0)[0]
    products = cells @ cells.T
    torch.testing.assert_close(products.diagonal(2), products[0, 2].expand(5))


@pytest.mark.parametrize("name", POOL)
def test_every_pool_reads_only_what_it_says(name):
    tokens = torch.randn(B, 7, 5, dtype=torch.float64)
    wanted = POOL[name](tokens, prefix=2)
    read = READS.get(POOL[name], 7)
    assert torch.equal(POOL[name](tokens[:, :read], prefix=2), wanted)


def test_the_mean_pool_leaves_prefix_tokens_out():
    tokens = torch.randn(B, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(POOL["mean"](tokens, prefix=2), tokens[:, 2:].mean(1))


def test_drop_path_drops_at_its_rate_and_keeps_the_mean():
    branch = torch.ones(4, 3, 2, dtype=torch.float64)
    uniform = torch.tensor([0.1, 0.24, 0.25, 0.9], dtype=torch.float64)[:, None, None]
    out = drop_path(branch, uniform, torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([0, 0, 4 / 3, 4 / 3]).double())


def test_affine_without_size_is_the_identity():
    picture = torch.rand(B, C, 9, 11, dtype=torch.float64)
    same = augment.affine(picture, torch.rand(B, 5, dtype=torch.float64))
    torch.testing.assert_close(same, picture)


def test_affine_shifts_by_a_fraction_of_the_image():
    picture = torch.rand(1, 1, 4, 8, dtype=torch.float64)
    uniform = torch.tensor([[0.5, 0.5, 0.5, 1.0, 0.5]], dtype=torch.float64)
    moved = augment.affine(picture, uniform, shift=0.25)
    torch.testing.assert_close(moved[..., :6], picture[..., 2:])
    assert moved[..., 6:].abs().max() == 0


def test_affine_turns_by_degrees():
    picture = torch.rand(1, 1, 5, 5, dtype=torch.float64)
    uniform = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    turned = augment.affine(picture, uniform, rotate=90.0)
    torch.testing.assert_close(turned, picture.rot90(1, (2, 3)))


def test_affine_turns_in_pixels_on_an_image_that_is_not_square():
    picture = torch.zeros(1, 1, 5, 9, dtype=torch.float64)
    picture[..., 2:7] = torch.rand(5, 5, dtype=torch.float64)
    uniform = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    turned = augment.affine(picture, uniform, rotate=90.0)
    torch.testing.assert_close(turned[..., 2:7], picture[..., 2:7].rot90(1, (2, 3)))


def test_label_smoothing_moves_its_share_to_all_classes():
    logits, target = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 2])
    soft = F.one_hot(target, 4) * 0.9 + 0.1 / 4
    wanted = -(soft * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(cross_entropy(logits, target, label_smoothing=0.1), wanted)


@pytest.mark.parametrize("scheme", INIT)
def test_a_draw_depends_on_seed_and_name_only(scheme):
    def draw(seed, name):
        return INIT[scheme](name, (6, 5), 5, keyed_generator(seed, name))

    one = draw(1, "blocks.0.mlp.fc1.weight")
    assert torch.equal(one, draw(1, "blocks.0.mlp.fc1.weight"))
    assert not torch.equal(one, draw(2, "blocks.0.mlp.fc1.weight"))
    assert not torch.equal(one, draw(1, "blocks.1.mlp.fc1.weight"))


@pytest.mark.parametrize("scheme", INIT)
def test_a_scheme_refuses_a_parameter_it_has_no_rule_for(scheme):
    with pytest.raises(ValueError, match="no rule for the parameter 'strange'"):
        INIT[scheme]("strange", (3,), 3, keyed_generator(0, "strange"))
