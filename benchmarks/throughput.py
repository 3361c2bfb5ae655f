"""Throughput of one configuration: `python -m benchmarks.throughput --model vitx:S/16 --batch 8`.

What a sweep over batches, compile modes and models calls; images_per_s stands in its summary.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from experiments import cli
from vitx import timing, tracking
from vitx.config import size
from vitx.cost import forward_macs
from vitx.interop.timm import live_model
from vitx.model import build
from vitx.timing import Plan

FAMILIES = ("vitx", "timm")


@dataclass(frozen=True)
class Settings:
    """Time one model by itself. For a comparison of two, use python -m benchmarks."""

    model: str = "vitx:Ti/16"
    """vitx:SIZE/PATCH or timm:NAME."""
    batch: int = 8
    compile: str = "none"
    mode: str = "inference"
    seconds: float = 5.0
    """How long blocks are timed after the warm-up."""
    out: Path = tracking.OUT
    """Folder of run folders."""
    wandb: str = ""
    """W&B mode: online, offline or disabled; empty for WANDB_MODE, else offline."""
    device: str = ""
    """Device; empty for the accelerator of this machine, else the CPU."""


def main(args: list[str]) -> None:
    """Time it, print the rate, and keep it in a run folder."""
    settings = cli.parse(Settings, args, prog="python -m benchmarks.throughput")
    if settings.batch < 1:
        raise ValueError(f"batch = {settings.batch} must be at least 1")
    plan = Plan(mode=settings.mode, compile=settings.compile, pair_s=settings.seconds)
    model = make(settings.model).to(tracking.device(settings.device))
    values = vars(settings) | {"out": str(settings.out)}
    label = f"{settings.model},batch={settings.batch},{settings.compile}"
    with tracking.Run(
        settings.out, "throughput", label, values, mode=settings.wandb or None
    ) as run:
        found = measure(model, settings.batch, plan)
        run.log({tracking.STEP: 0, tracking.IMAGES_PER_S: found[tracking.IMAGES_PER_S]})
        run.summarise(found)
    rates = (found[name] for name in (tracking.IMAGES_PER_S, "images_per_s_10", "images_per_s_90"))
    print("{:.1f} images/s (10 to 90 % of blocks: {:.1f} to {:.1f})".format(*rates))


def make(name: str) -> nn.Module:
    """The model of that name. Raises ValueError for an unknown one."""
    family, _, rest = name.partition(":")
    if family not in FAMILIES or not rest:
        raise ValueError(f"model = {name!r} must be vitx:SIZE/PATCH or timm:NAME")
    return build(size(rest)) if family == "vitx" else live_model(rest, {})


def measure(model: nn.Module, batch: int, plan: Plan) -> dict[str, float]:
    """Images/s over blocks after a warm-up: median, 10 % and 90 % quantile; MACs of an image."""
    device = next(model.parameters()).device
    # What is compiled runs for images of its own size; timm says it in its configuration.
    config = getattr(model, "config", None)
    shape = (config.channels, *config.size) if config else model.default_cfg["input_size"]  # type: ignore[index]
    example = torch.randn(batch, *shape, device=device)
    step = timing.make_step(model, timing.prepare(model, plan), example, plan)
    warm = timing.warm_up({"model": step}, plan, device)
    iterations = max(1, round(plan.block_s / warm["seconds_each"]["model"]))
    rates, start = [], time.perf_counter()
    while time.perf_counter() - start < plan.pair_s or len(rates) < 3:
        rates.append(batch * iterations / timing.time_block(step, iterations, device))
    low, *_, high = statistics.quantiles(rates, n=10, method="inclusive")
    return {
        tracking.IMAGES_PER_S: statistics.median(rates),
        "images_per_s_10": low,
        "images_per_s_90": high,
        "blocks": len(rates),
        "first_s": warm["first_s"]["model"],
        "macs": forward_macs(model, example[:1]),
    }


if __name__ == "__main__":
    cli.run(main)
