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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

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
from vitx.training import tracking
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


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """One training of a side from its own draws, read on both splits after the last step."""

    side: str
    seed: int
    accuracy: float
    """On the test split."""
    loss: float
    val_accuracy: float
    seconds: float
    curve: tuple[tuple[int, float], ...]
    """Steps, with the validation accuracy after each."""
    confusion: tuple[tuple[int, ...], ...]
    """Counts of the test split: a line per class, a column per prediction."""


class Failed(Exception):
    """A training that ended without a result; its last words."""


def train_side(
    side: str, seed: int, config: TrainConfig, device: torch.device | str
) -> tuple[SeedRun, dict[str, Tensor]]:
    """Train vitx or timm from its own draws; the run and the trained weights."""
    config = override(config, seed=seed)
    model = timm_model(config.model, seed) if side == "timm" else build(config.model, seed=seed)
    training = prepare(config, model=model, device=device)
    result = train(training)
    counts = confusion(result.test_logits, result.test_target, config.model.classes)
    run = SeedRun(
        side=side,
        seed=seed,
        accuracy=result.test.accuracy,
        loss=result.test.loss,
        val_accuracy=result.val.accuracy,
        seconds=result.seconds,
        curve=tuple(
            (int(event[tracking.STEP]), event[tracking.VAL_ACCURACY])
            for event in result.curve if tracking.VAL_ACCURACY in event
        ),
        confusion=tuple(tuple(line) for line in counts.tolist()),
    )  # fmt: skip
    return run, training.state.model.cpu().state_dict()


def train_all(
    seeds: Sequence[int],
    folder: Path,
    config: TrainConfig,
    *,
    device: torch.device,
    say: Callable[[str], None],
    split: str = "test",
) -> list[SeedRun]:
    """Both sides for every seed, two at a time on one thread each, a fresh process each.

    The accuracy that is printed is that on `split`, test or validation. Raises Failed after the
    last training if one of them failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(json.dumps(flat(config)), encoding="utf8")
    jobs = [(side, seed + start) for seed in seeds for side, start in SIDES.items()]
    runs, failures = [], []
    with ThreadPoolExecutor(max_workers=2) as pool:
        trainings = [pool.submit(_train_process, *job, folder, device) for job in jobs]
        for run in (training.result() for training in trainings):
            if isinstance(run, Failed):
                failures.append(run)
                continue
            runs.append(run)
            accuracy = run.accuracy if split == "test" else run.val_accuracy
            say(f"{run.side} seed {run.seed}: {split} accuracy {accuracy:.2%}, {run.seconds:.0f} s")
    if failures:
        raise failures[0]
    return runs


def of_side(runs: Sequence[SeedRun], side: str) -> list[SeedRun]:
    """The runs of vitx or of timm."""
    return [run for run in runs if run.side == side]


def equivalence_fields(runs: Sequence[SeedRun], margin: float = MARGIN) -> dict[str, Any]:
    """The fields of an `Accuracy` that follow from the runs: values, the tests, the verdict."""
    timm, vitx = of_side(runs, "timm"), of_side(runs, "vitx")
    values = [tuple(run.accuracy for run in side) for side in (timm, vitx)]
    try:
        test = stats.equivalence(*values, margin=margin)
        verdict = "equivalent" if test.equivalent else "equivalence not shown"
    except stats.Uninformative as error:
        difference = statistics.mean(values[1]) - statistics.mean(values[0])
        test = stats.Equivalence(difference, math.nan, math.nan, margin, 1.0)
        verdict = f"uninformative: {error}"
    return vars(test) | {
        "seeds": len(vitx),
        "reference_values": values[0],
        "candidate_values": values[1],
        "verdict": verdict,
        "reference_seconds": statistics.mean(run.seconds for run in timm),
        "candidate_seconds": statistics.mean(run.seconds for run in vitx),
    }


def pilot_fields(
    runs: Sequence[SeedRun], images: int, margin: float = MARGIN
) -> dict[str, int | float]:
    """Standard deviations of validation accuracy, and the seeds per side for 90 % power.

    The standard deviation counts as at least one of the split's `images`, its resolution.
    """
    timm, vitx = (
        statistics.stdev(run.val_accuracy for run in of_side(runs, side))
        for side in ("timm", "vitx")
    )
    pooled = max(math.sqrt(statistics.mean((timm**2, vitx**2))), 1 / images)
    return {
        "seeds": len(runs) // 2,
        "reference_std": timm,
        "candidate_std": vitx,
        "margin": margin,
        "seeds_needed": stats.seeds_for(margin=margin, std=pooled),
    }


def _double_step(state: State, batch: tuple, config: TrainConfig) -> float:
    image, target = batch
    return step(state, (image.double(), target), config)["loss"].item()


def _train_process(side: str, seed: int, folder: Path, device: torch.device) -> SeedRun | Failed:
    path = folder / f"{side}-{seed}.json"
    words = [side, str(seed), str(path), str(device)]
    command = [sys.executable, "-m", "benchmarks.accuracy", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    status, last_words = run_limited(command, environment, limit_s=LIMIT_S, limit_gib=0.0)
    if status:
        return Failed(f"training {side} with seed {seed}: {last_words}")
    return msgspec.json.decode(path.read_bytes(), type=SeedRun)


def _main(side: str, seed: str, path: str, device: str) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    config = configuration(json.loads(Path(path).with_name(RECIPE).read_text(encoding="utf8")))
    run, weights = train_side(side, int(seed), config, device)
    torch.save(weights, Path(path).with_suffix(".pt"))
    Path(path).write_bytes(msgspec.json.encode(run))


if __name__ == "__main__":
    _main(*sys.argv[1:])
