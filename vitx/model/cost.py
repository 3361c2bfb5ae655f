"""What a model costs before it runs: parameters and multiply-accumulates, counted on `meta`."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitx.model.config import ModelConfig
from vitx.model.vit import Vit


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulates of one image's forward pass."""

    parameters: int
    macs: int


def cost(config: ModelConfig) -> Cost:
    """The cost of a configuration; nothing is allocated and no data is needed."""
    vit, image = _on_meta(config)
    return Cost(sum(p.numel() for p in vit.parameters()), forward_macs(vit, image))


def training_macs(config: ModelConfig) -> int:
    """Multiply-accumulates of an image's forward and backward pass, counted as `forward_macs` does.

    Patch drop makes them fewer. All parameters are trained; the optimizer's own work is left out.
    """
    return step_macs(*_on_meta(config))


def step_macs(model: nn.Module, image: torch.Tensor) -> int:
    """As `forward_macs`, of a forward and backward pass in training."""
    twin = deepcopy(model).to("meta").train()
    with FlopCounterMode(display=False) as counter:
        twin(image.to("meta")).sum().backward()
    return counter.get_total_flops() // 2


def forward_macs(model: nn.Module, image: torch.Tensor) -> int:
    """Multiply-accumulates of `model(image)`: half of PyTorch's FLOP count, on the meta device.

    The model is not changed. On the CPU PyTorch counts nothing for fused attention; on `meta` it
    counts both of its products.
    """
    twin = deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(image.to("meta"))
    return counter.get_total_flops() // 2


def _on_meta(config: ModelConfig) -> tuple[Vit, torch.Tensor]:
    with torch.device("meta"):
        return Vit(config), torch.empty(1, config.channels, *config.size)
