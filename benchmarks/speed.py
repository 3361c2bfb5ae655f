"""Speed of vitx against timm: which pairs are timed, and the results that come of it."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitx.interop.timm import from_timm, live_model
from vitx.measure.compare import compare
from vitx.measure.comparison import Comparison
from vitx.measure.equality import Equality, equality
from vitx.measure.timing import TimingConfig
from vitx.model.cost import forward_macs

PLANTED = 0.05
"""Extra work of the planted slowdown, as a share of the model's MACs."""
ALIGNED = 8
"""Planted products have widths that are multiples of this: others are slower than their work."""


def usual(device: torch.device) -> tuple[str, str]:
    """The size and dtype that are timed if nothing is said: larger ones on a GPU."""
    if device.type != "cuda":
        return "Ti/16", "float32"
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return "B/16", "bfloat16" if bfloat16 else "float16"


def warm_up_s(device: torch.device) -> float:
    """Limit of the warm-up in seconds; on a CPU longer ones left times no steadier."""
    return 1.0 if device.type == "cpu" else 4.0  # a GPU's clock takes seconds to rise


@dataclass(frozen=True)
class Pair:
    """A timm model and the `Vit` made from it, with a batch of random images."""

    name: str
    reference: nn.Module
    candidate: nn.Module
    example: Tensor

    @property
    def labels(self) -> dict[str, str | tuple[int, ...]]:
        """The fields of a result that say what was compared."""
        return {
            "reference": f"timm:{self.name}",
            "candidate": f"vitx:from_timm({self.name})",
            "device": str(self.example.device),
            "image": tuple(self.example.shape[-2:]),
        }


def make_pair(name: str, *, batch: int, device: torch.device, **options: Any) -> Pair:
    """timm's model of that name, our rendering of it, and the batch that is timed."""
    torch.manual_seed(0)
    reference = live_model(name, options).to(device)
    candidate = from_timm(reference)
    height, width = candidate.config.size
    example = torch.randn(batch, candidate.config.channels, height, width).to(device)
    return Pair(name, reference, candidate, example)


def check(pair: Pair) -> Equality:
    """Equality in float64 on two images, and strict loading both ways."""
    pair.candidate.load_state_dict(pair.reference.state_dict(), strict=True)
    pair.reference.load_state_dict(pair.candidate.state_dict(), strict=True)
    return equality(pair.reference, pair.candidate, pair.example[:2])


def time_pair(pair: Pair, config: TimingConfig, **how: Any) -> Comparison:
    """One configuration. `how` are further arguments of `compare`, here and below."""
    return compare(pair.reference, pair.candidate, pair.example, config=config, **how)


def control(pair: Pair, config: TimingConfig, share: float, **how: Any) -> dict[str, Any]:
    """The fields of a `Control`: the same timing of timm against timm with `share` more work, which
    it must find slower; with none it must not tell them apart."""
    if not share:
        twin = deepcopy(pair.reference)
        comparison = compare(pair.reference, twin, pair.example, config=config, **how)
        name, counted = f"timm:{pair.name} again", 0.0
    else:
        slowed, keys = slow_down(pair.reference, pair.example[:1], share)
        comparison = compare(pair.reference, slowed, pair.example, config=config, keys=keys, **how)
        name = f"timm:{pair.name} with {share:.0%} more MACs"
        macs = [forward_macs(model, pair.example[:1]) for model in (slowed, pair.reference)]
        counted = macs[0] / macs[1] - 1
    labels = pair.labels | {"candidate": name}
    return labels | {"comparison": comparison, "planted": share, "planted_counted": counted}


class Burden(nn.Module):
    """A block followed by two matrix products whose result is zero: x + x·A·0 = x."""

    down: Tensor
    up: Tensor

    def __init__(self, block: nn.Module, width: int, hidden: int):
        super().__init__()
        self.block = block
        generator = torch.Generator().manual_seed(0)
        down = torch.randn(width, hidden, generator=generator) / width**0.5
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", torch.zeros(hidden, width), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.block(tokens)
        return tokens + (tokens @ self.down) @ self.up


def slow_down(model: nn.Module, image: Tensor, share: float) -> tuple[nn.Module, Mapping[str, str]]:
    """A copy of a timm ViT with about `share` more MACs, over all blocks, and its key map."""
    slowed: Any = deepcopy(model)
    macs, width, depth = forward_macs(model, image), slowed.embed_dim, len(slowed.blocks)
    tokens = slowed.patch_embed.num_patches + slowed.num_prefix_tokens
    hidden = share * macs / (depth * 2 * tokens * width)
    hidden = max(round(hidden / ALIGNED), 1) * ALIGNED
    device = image.device
    slowed.blocks = nn.Sequential(
        *(Burden(block, width, hidden).to(device) for block in slowed.blocks)
    )
    names = model.state_dict()
    return slowed, {name: _burdened(name) for name in names if name.startswith("blocks.")}


def _burdened(name: str) -> str:
    blocks, number, rest = name.split(".", 2)
    return f"{blocks}.{number}.block.{rest}"
