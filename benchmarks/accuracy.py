"""Accuracy of vitx and timm by one recipe, in both senses: the same trajectory, and equivalence.

Trajectory: the same initial weights and batches give the same losses in float64, step for step.
Equivalence: each side draws its own initial weights with its own library's code (the scheme that
timm calls `jax` and vitx `xavier`) and has its own data seeds; two one-sided tests and a margin.

`python -m benchmarks.accuracy SIDE SEED FILE DEVICE` trains one model by the recipe in the file's
folder, and writes its result.
"""

import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from experiments.recipes import CIFAR10_SMALL
from experiments.study.runs import configuration
from vitx import data
from vitx.interop.timm import from_timm
from vitx.measure import stats
from vitx.measure.equality import largest
from vitx.measure.machine import end_with_parent
from vitx.measure.worker import run_limited
from vitx.model.config import ModelConfig
from vitx.model.vit import build
from vitx.settings import flat, override
from vitx.training.config import TrainConfig
from vitx.training.evaluate import confusion
from vitx.training.prepare import prepare
from vitx.training.state import State, init, step
from vitx.training.trainer import train

MARGIN = 0.01
"""Largest difference of mean test accuracy that counts as the same: one point, fixed beforehand."""

LIMIT_S = 900.0
"""A training that takes longer is ended and reported."""

CIFAR10 = override(
    CIFAR10_SMALL,
    steps=20_000,
    eval_every=2_000,
    **{"data.train": 45_000, "data.val": 5_000, "optim.warmup_steps": 1_000,
       "model.patch": 4, "model.width": 192, "model.heads": 3, "model.depth": 6},
)  # fmt: skip
"""A plain ViT for all of CIFAR-10, for a GPU; not tuned, and the same on both sides."""

RECIPE = "recipe.json"
"""What the processes of a folder train by."""

PILOT_SEEDS = (600, 601, 602, 603)

TIMM_SEEDS_FROM = 10_000
"""timm's seeds are vitx's plus this, so that no draw is shared."""

SIDES = {"timm": TIMM_SEEDS_FROM, "vitx": 0}


def timm_model(config: ModelConfig, seed: int) -> nn.Module:
    """timm's own `VisionTransformer` of that shape, its weights drawn by timm's own code."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=config.size,
        patch_size=config.patch_size,  # type: ignore[arg-type]
        in_chans=config.channels,
        num_classes=config.classes,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        weight_init="jax",
    )


def trajectory(config: TrainConfig, steps: int) -> float:
    """Largest relative difference of the losses over `steps` steps of both models in float64."""
    reference = timm_model(config.model, config.seed).double()
    models = {"timm": reference, "vitx": from_timm(deepcopy(reference))}
    dataset = data.load(config.data, size=config.model.size)
    losses = {}
    for side, model in models.items():
        state = init(config, model=model)
        stream = data.batches(dataset, batch=config.batch, seed=config.seed)
        losses[side] = [_double_step(state, next(stream), config) for _ in range(steps)]
    return largest(abs(a - b) / abs(a) for a, b in zip(losses["timm"], losses["vitx"], strict=True))


def train_side(side: str, seed: int, config: TrainConfig, device: torch.device | str) -> dict:
    """Train vitx or timm from its own draws; the values that a row needs."""
    config = override(config, seed=seed)
    model = timm_model(config.model, seed) if side == "timm" else build(config.model, seed=seed)
    training = prepare(config, model=model, device=device)
    result = train(training)
    found = {
        "side": side,
        "seed": seed,
        "accuracy": result.test.accuracy,
        "loss": result.test.loss,
        "val_accuracy": result.val.accuracy,
        "seconds": result.seconds,
        "curve": result.curve,
        "confusion": confusion(
            result.test_logits, result.test_target, config.model.classes
        ).tolist(),
    }
    return found | {"weights": training.state.model.cpu().state_dict()}


def train_all(
    seeds: list[int],
    folder: Path,
    config: TrainConfig,
    *,
    device: torch.device,
    say: Callable[[str], None],
    split: str = "test",
) -> list[dict]:
    """Both sides for every seed, two at a time on one thread each, a fresh process each.

    What is said is the accuracy on `split`, test or validation. A training that fails gives
    {"failure": its last words}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(json.dumps(flat(config)), encoding="utf8")
    jobs = [(side, seed + start) for seed in seeds for side, start in SIDES.items()]
    results = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        for found in pool.map(lambda job: _train_process(*job, folder, device), jobs):
            results.append(found)
            if "failure" in found:
                continue
            value = found["accuracy" if split == "test" else "val_accuracy"]
            say(
                f"{found['side']} seed {found['seed']}: {split} accuracy {value:.2%}, "
                f"{found['seconds']:.0f} s"
            )
    return results


def row_fields(results: list[dict], margin: float = MARGIN) -> dict:
    """The accuracy fields of a row: values a seed, the tests, and what they say."""
    values = {
        side: [found["accuracy"] for found in results if found["side"] == side] for side in SIDES
    }
    try:
        test = stats.equivalence(values["timm"], values["vitx"], margin=margin)
        verdict = "equivalent" if test.equivalent else "equivalence not shown"
    except stats.Uninformative as error:
        difference = statistics.mean(values["vitx"]) - statistics.mean(values["timm"])
        test = stats.Equivalence(difference, math.nan, math.nan, margin, 1.0)
        verdict = f"uninformative: {error}"
    return {
        "seeds": len(values["vitx"]),
        "reference_values": values["timm"],
        "candidate_values": values["vitx"],
        "margin": margin,
        "difference": test.difference,
        "low": test.low,
        "high": test.high,
        "p_equivalence": test.p_equivalence,
        "verdict": verdict,
        **{
            f"{name}_seconds": statistics.mean(r["seconds"] for r in results if r["side"] == side)
            for name, side in (("reference", "timm"), ("candidate", "vitx"))
        },
    }


def pilot_fields(results: list[dict], images: int, margin: float = MARGIN) -> dict:
    """Standard deviations of validation accuracy, and the seeds a side for 90 % power.

    The standard deviation counts as at least one of the split's `images`, its resolution.
    """
    stds = {
        side: statistics.stdev(found["val_accuracy"] for found in results if found["side"] == side)
        for side in SIDES
    }
    pooled = math.sqrt(statistics.mean(std**2 for std in stds.values()))
    pooled = max(pooled, 1 / images)
    return {
        "seeds": len(results) // 2,
        "reference_std": stds["timm"],
        "candidate_std": stds["vitx"],
        "margin": margin,
        "seeds_needed": stats.seeds_for(margin=margin, std=pooled, wanted=0.9),
    }


def _double_step(state: State, batch: tuple, config: TrainConfig) -> float:
    image, target = batch
    return step(state, (image.double(), target), config)["loss"].item()


def _train_process(side: str, seed: int, folder: Path, device: torch.device) -> dict:
    path = folder / f"{side}-{seed}.json"
    words = [side, str(seed), str(path), str(device)]
    command = [sys.executable, "-m", "benchmarks.accuracy", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    status, said = run_limited(command, environment, limit_s=LIMIT_S, limit_gib=0.0)
    if status:
        return {"failure": f"training {side} with seed {seed}: {said}"}
    return json.loads(path.read_text())


def _main(side: str, seed: str, path: str, device: str) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    config = configuration(json.loads(Path(path).with_name(RECIPE).read_text(encoding="utf8")))
    found = train_side(side, int(seed), config, device)
    torch.save(found.pop("weights"), Path(path).with_suffix(".pt"))
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
