"""What a model costs before it runs: parameters and multiply-accumulates, counted on `meta`."""

import bisect
import math
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitx.config import ModelConfig, TrainConfig, delta, flat, override
from vitx.model import Vit

NEAR = 0.02
"""A cost within this share of the baseline's is taken as matched by width alone."""


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


def matched(config: TrainConfig, base: TrainConfig, by: str) -> tuple[TrainConfig, str]:
    """`config` with the width, or where that comes not near the depth, that costs what `base` does.

    `by` is `macs` (of one image forward) or `params`. Widths keep the number of heads and are
    multiples of it and of 4. What `config` itself changes in `base` stays; ValueError if that is
    both. Also returns what was changed and how near it comes, in words.
    """
    wanted = _count(base.model, by)
    free = [name for name in ("width", "depth") if f"model.{name}" not in delta(config, base)]
    if not free:
        raise ValueError("width and depth are both set, so neither can be adjusted to the cost")
    step = math.lcm(config.model.heads, 4)

    def nearest_of(name: str, values: range) -> TrainConfig:
        made = [override(config, **{f"model.{name}": value}) for value in values]
        # The cost grows with the value, so a few of them are counted.
        place = bisect.bisect_left(made, wanted, key=lambda one: _count(one.model, by))
        return min(made[max(place - 1, 0) : place + 1], key=off)

    def off(one: TrainConfig) -> float:
        return abs(_count(one.model, by) / wanted - 1)

    if off(config) == 0:
        return config, ""
    best = config
    if "width" in free:
        best = nearest_of("width", range(step, 4 * config.model.width + step, step))
    if "depth" in free and off(best) > NEAR:
        deeper = nearest_of("depth", range(1, 8 * config.model.depth + 1))
        best = min((best, deeper), key=off)
    before = flat(config)
    changed = [
        f"{name.partition('.')[2]} {before[name]} to {value}"
        for name, value in delta(best, config).items()
    ]
    words = {"macs": "MACs", "params": "parameters"}[by]
    share = _count(best.model, by) / wanted
    return best, f"{', '.join(changed) or 'nothing nearer'}; {share:.3f} of the {words}"


def _count(model: ModelConfig, by: str) -> int:
    found = cost(model)
    return {"macs": found.macs, "params": found.parameters}[by]


def _on_meta(config: ModelConfig) -> tuple[Vit, torch.Tensor]:
    with torch.device("meta"):
        return Vit(config), torch.empty(1, config.channels, *config.size)
