"""Speed of vitx against timm: which pairs are timed, and the rows that come of it."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitx.interop.timm import from_timm, live_model
from vitx.measure.compare import Comparison, compare
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
    def labels(self) -> dict[str, Any]:
        """The fields of a row that say what was compared."""
        return {
            "reference": f"timm:{self.name}",
            "candidate": f"vitx:from_timm({self.name})",
            "device": str(self.example.device),
            "image": list(self.example.shape[-2:]),
            "batch": len(self.example),
        }


def make_pair(name: str, *, batch: int, device: torch.device, **options: Any) -> Pair:
    """timm's model of that name, our rendering of it, and the batch that is timed."""
    torch.manual_seed(0)
    reference = live_model(name, options).to(device)
    candidate = from_timm(reference)
    height, width = candidate.config.size
    example = torch.randn(batch, candidate.config.channels, height, width).to(device)
    return Pair(name, reference, candidate, example)


def check(pair: Pair) -> tuple[Equality, dict[str, Any]]:
    """Equality in float64 on two images, strict loading both ways, and the fields of its row."""
    pair.candidate.load_state_dict(pair.reference.state_dict(), strict=True)
    pair.reference.load_state_dict(pair.candidate.state_dict(), strict=True)
    result = equality(pair.reference, pair.candidate, pair.example[:2])
    verdict = "equal" if result.passed else "not equal"
    return result, pair.labels | {"equality": vars(result), "verdict": verdict}


def time_pair(pair: Pair, plan: TimingConfig, **how: Any) -> tuple[str, dict[str, Any]]:
    """One configuration: the row's kind and its fields, raw times among them.

    `how` are further arguments of `compare`, here and in the controls below.
    """
    return _timed("speed", pair, pair.candidate, plan, how)


def plant(
    pair: Pair, plan: TimingConfig, *, share: float = PLANTED, **how: Any
) -> tuple[str, dict[str, Any]]:
    """The same timing of timm against timm with `share` more work, which it must find slower."""
    slowed, keys = slow_down(pair.reference, pair.example[:1], share)
    kind, fields = _timed("plant", pair, slowed, plan, how | {"keys": keys})
    macs = fields["macs"]
    return kind, fields | {
        "candidate": f"timm:{pair.name} with {share:.0%} more MACs",
        "planted": share,
        "planted_counted": macs["candidate"] / macs["reference"] - 1,
    }


def null(pair: Pair, plan: TimingConfig, **how: Any) -> tuple[str, dict[str, Any]]:
    """The same timing of timm against timm as the candidate, which it must not tell apart."""
    kind, fields = _timed("noise", pair, deepcopy(pair.reference), plan, how)
    return kind, fields | {"candidate": f"timm:{pair.name} again", "planted_counted": 0.0}


def _timed(
    kind: str, pair: Pair, candidate: nn.Module, plan: TimingConfig, how: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    found = compare(pair.reference, candidate, pair.example, plan=plan, **how)
    kind = "failure" if found.verdict == "failed" else kind
    return kind, pair.labels | found.fields() | {"raw": _raw(found)}


class Burden(nn.Module):
    """A block followed by two matrix products whose result is zero: x + x·A·0 = x."""

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


def _raw(found: Comparison) -> list[dict]:
    return [
        {key: record[key] for key in ("rounds", "warm_up", "iterations")}
        for record in found.processes
    ]
