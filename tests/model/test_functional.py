"""Laws and oracles of the tensor functions, on small distinct primes: swapped axes can't pass."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitx.data import augment
from vitx.model.functional import patches, position
from vitx.model.functional.attention import ATTENTION, weights
from vitx.model.functional.drop import drop_patches, drop_path
from vitx.model.functional.init import INIT, keyed_generator
from vitx.model.functional.mlp import MLP
from vitx.model.functional.norm import layernorm
from vitx.model.functional.pool import POOL, READS
from vitx.model.layers import PATCHIFY
from vitx.training.loss import cross_entropy

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
    torch.testing.assert_close(PATCHIFY[name](picture, kernel, bias), wanted)


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
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_image_whose_keys_are_all_hidden_gives_zeros(name, dtype, device):
    q, k, v = (tensor.to(dtype) for tensor in qkv(5, device=device))
    mask = torch.ones(B, 5, dtype=torch.bool, device=device)
    mask[1] = False
    mixed = ATTENTION[name](q, k, v, mask=mask)
    assert torch.equal(mixed[1], torch.zeros_like(mixed[1]))
    torch.testing.assert_close(mixed[0], ATTENTION[name](q, k, v)[0])


@pytest.mark.parametrize("name", POOL)
def test_a_pool_of_hidden_patches_is_finite(name, device):
    tokens = torch.randn(B, 6, 3, device=device)
    mask = torch.zeros(B, 6, dtype=torch.bool, device=device)
    pooled = POOL[name](tokens, prefix=1, mask=mask)
    expected = tokens[:, 0] if READS.get(POOL[name]) else torch.zeros(B, 3, device=device)
    assert torch.equal(pooled, expected)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_dropout_keeps_the_mean(name):
    q, k, _ = qkv(5)
    v = torch.ones(B, HEADS, 5, E, dtype=torch.float64)
    draws = torch.stack([ATTENTION[name](q, k, v, drop=0.5) for _ in range(400)])
    assert draws.std() > 0.1
    assert abs((draws.mean() / ATTENTION[name](q, k, v).mean()).item() - 1) < 0.02


def test_sigmoid_attention_weighs_each_key_by_itself():
    q, k, v = qkv(5)
    scores = torch.einsum("bhie,bhje->bhij", q, k) / math.sqrt(E)
    wanted = torch.einsum("bhij,bhje->bhie", 1 / (1 + 5 * torch.exp(-scores)), v)
    torch.testing.assert_close(ATTENTION["sigmoid"](q, k, v), wanted)


def test_attention_weights_sum_to_one_over_keys():
    q, k, _ = qkv(5, i=1)
    torch.testing.assert_close(weights(q, k).sum(-1), torch.ones(B, HEADS, 1, dtype=torch.float64))


def test_gelu_is_x_times_the_normal_distribution_function():
    x = torch.linspace(-4, 4, 31, dtype=torch.float64)
    torch.testing.assert_close(MLP["gelu"](x), x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))


def test_gelu_tanh_is_its_formula():
    x = torch.linspace(-4, 4, 31, dtype=torch.float64)
    wanted = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(MLP["gelu_tanh"](x), wanted)
    assert (MLP["gelu"](x) - wanted).abs().max() > 1e-4


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


def test_dropped_patches_leave_the_prefix_and_a_random_rest_in_order():
    tokens = torch.arange(2 * 13, dtype=torch.float64).reshape(2, 13, 1)
    uniform = torch.rand(2, 11)
    out = drop_patches(tokens, uniform, rate=0.5, prefix=2)
    assert out.shape == (2, 7, 1)
    assert torch.equal(out[:, :2], tokens[:, :2])
    for kept, draws, whole in zip(out[:, 2:, 0], uniform, tokens[:, 2:, 0], strict=True):
        assert torch.equal(kept, whole[draws.argsort()[:5].sort().values])


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


def test_flip_mirrors_at_its_rate():
    picture = torch.rand(4, C, 5, 7)
    uniform = torch.tensor([[0.1], [0.49], [0.5], [0.9]])
    out = augment.flip(picture, uniform, rate=0.5)
    assert torch.equal(out[:2], picture[:2].flip(-1))
    assert torch.equal(out[2:], picture[2:])


def boxes(uniform, smallest, h, w):
    """RandomResizedCrop's draw, one image at a time."""
    for row in uniform.tolist():
        for share, slant in zip(row[:10], row[10:20], strict=True):
            area = h * w * (smallest + (1 - smallest) * share)
            aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * slant)
            height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < height <= h and 0 < width <= w:
                break
        else:
            height, width = min(h, round(w / (3 / 4))), min(w, round(h * 4 / 3))
        yield int(row[20] * (h - height + 1)), int(row[21] * (w - width + 1)), height, width


@pytest.mark.parametrize("smallest", [0.08, 0.8])
def test_a_resized_crop_is_a_crop_stretched_by_pytorch(smallest, device):
    picture = torch.rand(64, C, 13, 11, dtype=torch.float64, device=device)
    uniform = torch.rand(64, augment.CROP_DRAWS, dtype=torch.float64, device=device)
    out = augment.resized_crop(picture, uniform, smallest=smallest)
    for k, (top, left, height, width) in enumerate(boxes(uniform, smallest, 13, 11)):
        crop = picture[k : k + 1, :, top : top + height, left : left + width]
        wanted = F.interpolate(crop, (13, 11), mode="bilinear", align_corners=False)
        torch.testing.assert_close(out[k : k + 1], wanted)


def test_a_crop_that_never_fits_takes_the_largest_box():
    picture = torch.rand(1, 1, 4, 12, dtype=torch.float64)
    uniform = torch.full((1, augment.CROP_DRAWS), 0.999, dtype=torch.float64)
    out = augment.resized_crop(picture, uniform, smallest=0.99)
    crop = picture[:, :, :, 7:]  # 4 rows, 5 columns: the widest within 4/3, at the right end
    wanted = F.interpolate(crop, (4, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(out, wanted)


def test_erase_sets_one_box_to_zero_at_its_rate():
    picture = torch.ones(500, 1, 16, 16)
    uniform = torch.rand(500, augment.ERASE_DRAWS)
    out = augment.erase(picture, uniform, rate=0.25)
    erased = (out == 0).flatten(1).sum(dim=1)
    assert torch.equal(erased > 0, uniform[:, 0] < 0.25)
    assert (erased[erased > 0] / 256).mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.03)
    for hole in (out[erased > 0] == 0)[:, 0]:
        rows, columns = hole.any(dim=1), hole.any(dim=0)
        assert hole.sum() == rows.sum() * columns.sum()
        assert rows.nonzero().diff(dim=0).le(1).all()


@pytest.mark.parametrize("how", ["mixup", "cutmix"])
def test_mixed_targets_sum_to_one_and_weigh_the_pixels(how):
    picture = torch.arange(4.0)[:, None, None, None].expand(4, C, 9, 7)
    target, share = F.one_hot(torch.arange(4), 5).float(), torch.tensor(0.6)
    where = (torch.tensor([0.9, 0.2]),) if how == "cutmix" else ()
    mixed, soft = getattr(augment, how)(picture, target, share, *where)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(4))
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), soft @ torch.arange(5.0))
    assert soft[0, 0] < 1


def test_cutmix_pastes_a_box_of_the_stated_area():
    picture = torch.stack([torch.zeros(1, 20, 30), torch.ones(1, 20, 30)])
    target = torch.eye(2)
    mixed, soft = augment.cutmix(picture, target, torch.tensor(0.75), torch.tensor([0.5, 0.5]))
    assert mixed[0].sum() == 10 * 15
    assert torch.equal(mixed[0], 1 - mixed[1])
    torch.testing.assert_close(soft[0], torch.tensor([0.75, 0.25]))


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


def test_the_torch_scheme_has_the_distribution_of_pytorchs_layers():
    layer = nn.Linear(300, 500)
    for leaf, theirs in (("weight", layer.weight), ("bias", layer.bias)):
        name = f"blocks.0.mlp.fc1.{leaf}"
        ours = INIT["torch"](name, tuple(theirs.shape), 300, keyed_generator(0, name))
        assert ours.abs().max() <= 300**-0.5
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1)
    tokens = INIT["torch"]("cls_token", (1, 1, 4000), 4000, keyed_generator(0, "cls_token"))
    assert tokens.std().item() == pytest.approx(1, rel=0.05)
    gain = INIT["torch"]("blocks.0.norm1.weight", (7,), 1, keyed_generator(0, "gain"))
    assert torch.equal(gain, torch.ones(7))


def test_the_normal_scheme_has_its_deviation_and_zero_biases():
    def draw(name, *shape):
        return INIT["normal"](name, shape, shape[-1], keyed_generator(0, name), std=0.1)

    assert draw("blocks.0.mlp.fc1.weight", 300, 200).std().item() == pytest.approx(0.1, rel=0.02)
    assert draw("patch_embed.proj.weight", 300, 3, 8, 8).abs().max() > 0.3
    assert torch.equal(draw("blocks.0.mlp.fc1.bias", 300), torch.zeros(300))
