"""Muon against PyTorch's, its orthogonal matrices, and kernels and parts as matrices."""

import pytest
import torch

from vitx.training.muon import Muon, orthogonal


def stepped(make, value, gradients):
    parameter = torch.nn.Parameter(value.clone())
    optimizer = make([parameter])
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach()


def draws(*shape, count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_singular_values_come_out_near_one_in_the_same_basis(shape):
    (matrix,) = draws(1, *shape, count=1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert s.max() / s.min() > 2
    inner = u.mT @ orthogonal(matrix) @ vh.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6
    assert values.max() < 1.25
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_it_is_pytorchs_muon_but_for_bfloat16(shape):
    value, *gradients = draws(*shape, count=6)
    ours = stepped(lambda p: Muon(p, 0.1, momentum=0.9, weight_decay=0.2), value, gradients)

    def pytorchs(p):
        return torch.optim.Muon(
            p, lr=0.1, momentum=0.9, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"
        )

    theirs = stepped(pytorchs, value, gradients)
    moved = (theirs - value).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    far = stepped(lambda p: Muon(p, 0.1, momentum=0.5, weight_decay=0.2), value, gradients)
    assert (far - theirs).norm() > 0.1 * moved


def test_parts_are_matrices_of_their_own():
    value, *gradients = draws(24, 8)
    whole = stepped(lambda p: Muon(p, parts=3), value, gradients)
    parts = [
        stepped(Muon, part, [g.chunk(3)[k] for g in gradients])
        for k, part in enumerate(value.chunk(3))
    ]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-6)
    assert not torch.allclose(whole, stepped(Muon, value, gradients), atol=1e-4)


def test_a_kernel_is_a_matrix():
    value, *gradients = draws(6, 4, 3, 3)
    kernel = stepped(Muon, value, gradients)
    matrix = stepped(Muon, value.flatten(1), [g.flatten(1) for g in gradients])
    assert torch.equal(kernel.flatten(1), matrix)


def test_parameters_of_one_shape_are_changed_as_if_alone():
    values, gradients = draws(8, 8, count=3), draws(8, 8, count=3)
    together = [torch.nn.Parameter(value.clone()) for value in values]
    for parameter, gradient in zip(together, gradients, strict=True):
        parameter.grad = gradient
    Muon(together).step()
    for parameter, value, gradient in zip(together, values, gradients, strict=True):
        alone = stepped(Muon, value, [gradient])
        torch.testing.assert_close(parameter.detach(), alone, rtol=0, atol=1e-6)
