"""Initial values by scheme: (name, shape, fan-in, generator) to a float32 CPU tensor.

The generator is keyed by (seed, name), so a new parameter moves no other draw. The fan-in of a bias
is that of the weight beside it. Layer scale starts at its configured value and is in no scheme.
"""

import hashlib
import math

from torch import Generator, Tensor, empty, nn

from vitx.registry import Registry, UserError
from vitx.settings import NotNegative

Shape = tuple[int, ...]


def keyed_generator(seed: int, name: str) -> Generator:
    """A CPU generator whose state depends on nothing but (seed, name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def timm(name: str, shape: Shape, fan_in: int, generator: Generator) -> Tensor:
    """timm's default: linear maps truncated normal(0.02), the patch kernel PyTorch's default."""
    value = empty(shape, device="cpu")
    if name.startswith("patch_embed.") and ".norm" not in name:
        return _uniform(value, fan_in, generator)
    if len(shape) == 2 and name.endswith("weight"):
        return nn.init.trunc_normal_(value, std=0.02, generator=generator)
    return _others(name, value, generator)


def xavier(name: str, shape: Shape, fan_in: int, generator: Generator) -> Tensor:
    """The original ViT's: Xavier uniform, MLP biases normal(1e-6), LeCun patch kernel, zero head.

    As timm's `weight_init='jax'` renders Google's JAX code: query, key and value are drawn as one
    matrix, whose bound is √2 smaller than that of three.
    """
    value = empty(shape, device="cpu")
    if name.startswith("head."):
        return value.zero_()
    if len(shape) == 2 and name.endswith("weight"):
        return nn.init.xavier_uniform_(value, generator=generator)
    if name.startswith("patch_embed.") and name.endswith("weight") and ".norm" not in name:
        # 0.8796 is the standard deviation of a standard normal truncated at ±2.
        std = math.sqrt(1 / fan_in) / 0.87962566103423978
        return nn.init.trunc_normal_(value, 0.0, std, -2 * std, 2 * std, generator=generator)
    if ".mlp." in name and name.endswith("bias"):
        return nn.init.normal_(value, std=1e-6, generator=generator)
    return _others(name, value, generator)


def torch(name: str, shape: Shape, fan_in: int, generator: Generator) -> Tensor:
    """PyTorch's default of linear maps and convolutions, U(±1/√fan-in); tokens, positions N(0, 1).

    What a model gets that says nothing of its initial values but `torch.randn` for its own tokens.
    """
    value = empty(shape, device="cpu")
    if name in ("pos_embed", "cls_token", "reg_token"):
        return nn.init.normal_(value, generator=generator)
    if "norm" not in name and name.endswith(("weight", "bias")):
        return _uniform(value, fan_in, generator)
    return _others(name, value, generator)


def normal(
    name: str, shape: Shape, fan_in: int, generator: Generator, *, std: NotNegative = 0.02
) -> Tensor:
    """N(0, std²) for linear maps and kernels, tokens and positions truncated at ±2, biases zero.

    The scheme of BERT (Devlin et al. 2019, arXiv:1810.04805) and of Hugging Face's ViT.
    """
    value = empty(shape, device="cpu")
    if name in ("pos_embed", "cls_token", "reg_token"):
        return nn.init.trunc_normal_(value, std=std, generator=generator)
    if len(shape) >= 2:
        return nn.init.normal_(value, std=std, generator=generator)
    return _others(name, value, generator)


def _uniform(value: Tensor, fan_in: int, generator: Generator) -> Tensor:
    bound = 1 / math.sqrt(fan_in)
    return nn.init.uniform_(value, -bound, bound, generator=generator)


def _others(name: str, value: Tensor, generator: Generator) -> Tensor:
    """What the schemes share: positions, tokens, norms, biases."""
    if name == "pos_embed":
        return nn.init.trunc_normal_(value, std=0.02, generator=generator)
    if name in ("cls_token", "reg_token"):
        return nn.init.normal_(value, std=1e-6, generator=generator)
    if name.endswith("bias"):
        return value.zero_()
    if name.endswith("weight") and value.ndim == 1:
        return value.fill_(1.0)
    raise UserError(f"this init scheme has no rule for the parameter {name!r} {tuple(value.shape)}")


INIT = Registry("model.init", timm, xavier, torch, normal)
