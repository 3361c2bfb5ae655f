"""Optimizers, which parameters they change and decay, and the learning rate at a step.

A bad step changes nothing: `update` takes a flag on the device, which only steps of timm's
optimizers wait to read.
"""

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitx.registry import UserError, nearest, resolve
from vitx.training.config import OptimConfig
from vitx.training.muon import Muon
from vitx.training.schedule import SCHEDULE

Group = dict[str, Any]
"""Parameters of an optimizer with what it needs for them: `params`, `weight_decay`, `share`."""
UNDECAYED = ("cls_token", "reg_token", "pos_embed")
"""Last words of the names of parameters that never decay, whatever their shape."""
FUSED = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
"""PyTorch's optimizers that are one kernel per step, and take a flag that makes it do nothing."""


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Switch off the gradients of parameters whose names match.

    Raises ValueError for a pattern that matches none, or if none is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            raise UserError(
                f"optim.freeze = {pattern!r} matches no parameter; {nearest(pattern, parameters)}"
            )
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"optim.freeze = {list(patterns)} leaves no parameter to train")


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[Group]:
    """Parameters by weight decay and layer: matrices and kernels decay; biases, gains, tokens and
    positions do not. `share` is the group's part of the learning rate."""
    depth = 1 + max(_layer(name, 0) for name, _ in model.named_parameters())
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2 and name.rpartition(".")[2] not in UNDECAYED
        decays = matrix or config.decay == "all"
        share = config.layer_decay ** (depth - _layer(name, depth))
        groups.setdefault((decays, share), []).append(parameter)
    return [
        {"params": each, "weight_decay": config.weight_decay if decays else 0.0, "share": share}
        for (decays, share), each in sorted(groups.items(), reverse=True, key=lambda g: g[0])
    ]


def optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimizers that together change every parameter that is not frozen.

    One, but for muon, which is for matrices in the blocks and has adamw for all else.
    """
    groups = parameter_groups(model, config)
    if config.name == "muon":
        return _muon(model, groups, config)
    make = _fused if config.name in FUSED else _timm
    return [make(config.name, groups, config)]


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up from lr/warmup, then lr times the schedule of the steps that remain."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    return config.lr * resolve(config.schedule, SCHEDULE)(progress)


def set_rate(made: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of every group to its share of `rate`."""
    for optimizer in made:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]


def norms(gradients: Sequence[Tensor]) -> Float[Tensor, " tensors"]:
    """The norm of each, in one call for all."""
    return torch.stack(torch._foreach_norm(gradients))  # type: ignore[reportPrivateImportUsage]


def multiply(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Scale all in place, in one call."""
    torch._foreach_mul_(gradients, factor)  # type: ignore[reportPrivateImportUsage]


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, share: Tensor) -> None:
    """average += share·(model - average), parameter by parameter, in three calls for all."""
    averages, weights = list(average.parameters()), list(model.parameters())
    change = torch._foreach_sub(weights, averages)  # type: ignore[reportPrivateImportUsage]
    multiply(change, share)
    torch._foreach_add_(averages, change)  # type: ignore[reportPrivateImportUsage]


@torch.no_grad()
def update(made: Sequence[torch.optim.Optimizer], bad: Tensor) -> None:
    """One step of every optimizer, or of none if the flag `bad` (1.0 or 0.0) is set."""
    for optimizer in made:
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, bad  # type: ignore[attr-defined]
            optimizer.step()
        elif not bad.item():
            optimizer.step()


def _fused(name: str, groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    betas = {"momentum": config.beta1} if name == "sgd" else {"betas": (config.beta1, config.beta2)}
    made = FUSED[name](groups, lr=config.lr, fused=True, **betas)
    if name == "sgd" and config.beta1:
        # PyTorch would make the momentum with the first step, and leave it unset if that is bad.
        for group in groups:
            for parameter in group["params"]:
                made.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return made


def _timm(name: str, groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    """timm's, with our numbers as far as it has them; ValueError for one that it would ignore."""
    from timm.optim import create_optimizer_v2, get_optimizer_info  # type: ignore[attr-defined]

    info, usual = get_optimizer_info(name), OptimConfig()
    how: Group = {"momentum": config.beta1} if info.has_momentum else {}
    if info.has_betas and info.num_betas == 2:
        how["betas"] = (config.beta1, config.beta2)
    taken = {"beta1": bool(how), "beta2": "betas" in how}
    for beta, is_taken in taken.items():
        if not is_taken and getattr(config, beta) != getattr(usual, beta):
            raise UserError(f"optim.{beta} is no number of optim.name = {name!r}")
    try:
        # timm would add weight decay of its own making to parameters, so it gets the groups.
        return create_optimizer_v2(groups, opt=name, lr=config.lr, weight_decay=0.0, **how)  # type: ignore[arg-type]
    except (TypeError, AssertionError, ImportError, ValueError) as error:
        raise UserError(f"optim.name = {name!r} can't be made so: {error}") from error


def _muon(
    model: nn.Module, groups: list[Group], config: OptimConfig
) -> list[torch.optim.Optimizer]:
    """Muon for matrices in the blocks, query, key and value each by itself; AdamW for the rest."""
    parts = {
        p: 3 if ".qkv." in name else 1
        for name, p in model.named_parameters()
        if name.startswith("blocks.") and p.ndim == 2
    }

    def of(number: int) -> list[Group]:
        """The groups with their parameters that are so many matrices, 0 for the rest."""
        own = [[p for p in group["params"] if parts.get(p, 0) == number] for group in groups]
        return [group | {"params": each} for group, each in zip(groups, own, strict=True) if each]

    matrices = [group | {"parts": number} for number in (3, 1) for group in of(number)]
    rest = of(0)
    if not matrices:
        raise UserError("optim.name = 'muon' is for matrices of blocks, but all are frozen")
    muon = Muon(matrices, config.lr, momentum=config.beta1)
    return [muon, _fused("adamw", rest, config)] if rest else [muon]


def _layer(name: str, head: int) -> int:
    """0 for what comes before the blocks, 1 for the first block, …, `head` for what follows."""
    if block := re.search(r"(^|\.)blocks\.(\d+)\.", name):
        return int(block[2]) + 1
    words = name.split(".")
    return 0 if "patch_embed" in words or words[-1] in UNDECAYED else head
