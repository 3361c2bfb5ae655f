"""Images to patches and back, and the two exact evaluations of a linear patch embedding."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from vitx.model.axes import Image, Kernel, Tokens


def patchify(image: Image, *, patch: tuple[int, int]) -> Float[Tensor, "b n cpq"]:
    """Non-overlapping patches in row-major order, each flattened channel first."""
    p, q = patch
    return rearrange(image, "b c (y p) (x q) -> b (y x) (c p q)", p=p, q=q)


def unpatchify(
    patches: Float[Tensor, "b n cpq"], *, grid: tuple[int, int], patch: tuple[int, int]
) -> Image:
    """The inverse of `patchify` for a grid of (rows, columns) patches."""
    (y, x), (p, q) = grid, patch
    return rearrange(patches, "b (y x) (c p q) -> b c (y p) (x q)", y=y, x=x, p=p, q=q)


def conv(image: Image, kernel: Kernel, bias: Float[Tensor, " d"]) -> Tokens:
    """Patch embedding as a convolution whose stride is its kernel size.

    Dosovitskiy et al. 2021, arXiv:2010.11929, eq. 1.
    """
    stride = (kernel.shape[-2], kernel.shape[-1])
    return rearrange(F.conv2d(image, kernel, bias, stride), "b d y x -> b (y x) d")


def unfold(image: Image, kernel: Kernel, bias: Float[Tensor, " d"]) -> Tokens:
    """The same function as `conv`: patches first, then one matrix product with the flat kernel."""
    patches = patchify(image, patch=(kernel.shape[-2], kernel.shape[-1]))
    return F.linear(patches, rearrange(kernel, "d c p q -> d (c p q)"), bias)
