"""Whole training steps, data included, in pairs: `python -m benchmarks.steps --root DIR`.

The images are CIFAR-10's in memory, the model is that of the scratch-cifar10 recipe. Compared are
the project's code in plain PyTorch with the recipe, timm's ViT of the same shape in this trainer
with ours (eager and compiled), the trainer with and without W&B, an epoch of the project's code
with one of the cifar10 recipe, and seeds of digits one by one and as lanes. Every process holds
three arms, the reference twice; a block is a run of steps, and rounds hold a block an arm.
"""

import atexit
import itertools
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks import plain
from experiments import cli
from experiments.recipes import RECIPES
from experiments.study.rows import Rows
from vitx import data
from vitx.data.sources import FACTS
from vitx.files import read_json, write_json
from vitx.interop import weights
from vitx.interop.timm import from_timm
from vitx.measure import stats
from vitx.measure.equality import TOLERANCE
from vitx.measure.machine import Watch, descendants, end_with_parent, keep_memory
from vitx.measure.timing import ARMS, log_ratios
from vitx.measure.worker import run_limited
from vitx.model.cost import forward_macs
from vitx.model.vit import build
from vitx.registry import choose
from vitx.settings import override
from vitx.training import evaluate, tracking, vectorize
from vitx.training.config import TrainConfig
from vitx.training.state import init, step
from vitx.training.trainer import batches

CONFIG = RECIPES["scratch-cifar10"]
EPOCH_STEPS = math.ceil(CONFIG.data.train_images / CONFIG.batch)
TEST_IMAGES = FACTS["cifar10"].test
COMPILED = override(CONFIG, compile=True)
OURS = RECIPES["cifar10"]
DIGITS = RECIPES["digits"]
LANES = 8
LIMIT_S = 3600.0
"""A process that takes longer is ended, and its comparison is a failure."""
DATA, RECORD = "data.pt", "record.json"
"""What a process reads, and what it leaves."""
Block = Callable[[int], float]
"""Runs a number of steps; the seconds of an image."""


@dataclass(frozen=True)
class Settings:
    """Time whole training steps on CIFAR-10 in pairs; rows go to a run folder."""

    root: str
    """Folder of CIFAR-10, as for experiments.train."""
    only: tuple[str, ...] = ()
    """Comparisons; empty for all of them."""
    processes: int = 5
    steps: int = 15
    """Steps of a block."""
    out: Path = tracking.OUT


@dataclass(frozen=True)
class Comparison:
    """Two ways of training; `make(side, dataset)` gives the block of one."""

    reference: str
    candidate: str
    make: Callable[[str, data.Dataset], Block]
    error: Callable[[], float] | None = None
    """Largest difference of both models' logits with the same weights, if they are the same."""
    config: TrainConfig = CONFIG
    """Of the candidate."""


def trainer(
    config: TrainConfig,
    dataset: data.Dataset,
    model: nn.Module | None = None,
    *,
    curve: bool = False,
) -> Block:
    """Blocks of this project's step, with its data.

    With `curve` a block reads as many images as fall to its steps of what the recipe reads.
    """
    state = init(config, model=model)
    dataset = replace(dataset, config=config.data)
    stream = data.batches(dataset, batch=config.batch, seed=config.seed)

    def block(steps: int) -> float:
        read = dataset.test.take(range(round(config.data.val * steps / config.eval_every)))
        start = time.perf_counter()
        for _ in range(steps):
            step(state, next(stream), config)
        if curve:
            evaluate.predict(state.model, dataset, read)
        return (time.perf_counter() - start) / (steps * config.batch)

    return block


def project(dataset: data.Dataset, *, workers: int = 0, curve: bool = False) -> Block:
    """Blocks of the plain rendering. Its loader is started and stopped outside of the time.

    With `curve` a block reads as much of the test split as falls to its steps of an epoch.
    """
    torch.manual_seed(0)
    model = plain.PlainVit()
    run = plain.make_step(model)
    splits: Any = dataset

    def loader(split: data.Split, images: int, **how: Any) -> Iterator:
        some = torch.randperm(len(split.target))[:images]
        return plain.batches(split.image[some], split.target[some], batch=CONFIG.batch, **how)

    def block(steps: int) -> float:
        varied = loader(splits.train, (steps + 6) * CONFIG.batch, workers=workers)
        readings = loader(splits.test, round(TEST_IMAGES * steps / EPOCH_STEPS), varied=False)
        run(*next(varied))  # by now the workers are at work
        start = time.perf_counter()
        for _ in range(steps):
            run(*next(varied))
        if curve:
            plain.accuracy(model, readings)
        return (time.perf_counter() - start) / (steps * CONFIG.batch)

    return block


def timm_model() -> nn.Module:
    """timm's ViT with the shape and the function of the recipe's."""
    from functools import partial

    from timm.models.vision_transformer import VisionTransformer

    c = CONFIG.model
    model = VisionTransformer(
        img_size=c.size, patch_size=c.patch_size, embed_dim=c.width, depth=c.depth,
        num_heads=c.heads, mlp_ratio=c.mlp_ratio, num_classes=c.classes, final_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-5), act_layer=partial(nn.GELU, approximate="tanh"),
    )  # fmt: skip
    return model


def against_timm(config: TrainConfig) -> Callable[[str, data.Dataset], Block]:
    def make(side: str, dataset: data.Dataset) -> Block:
        torch.manual_seed(0)
        model = timm_model()
        return trainer(config, dataset, model if side == "reference" else from_timm(model))

    return make


def against_project(workers: int) -> Callable[[str, data.Dataset], Block]:
    def make(side: str, dataset: data.Dataset) -> Block:
        if side == "reference":
            return project(dataset, workers=workers)
        return trainer(CONFIG, dataset)

    return make


def against_recipe(side: str, dataset: data.Dataset) -> Block:
    if side == "reference":
        return project(dataset, curve=True)
    return trainer(OURS, dataset, curve=True)


def against_silence(side: str, dataset: data.Dataset) -> Block:
    """The trainer with a reading logged a block; the candidate's goes to W&B too.

    The processes that W&B started work on during a block of the candidate and stand still during
    those of the reference, so that what they take is in its time alone.
    """
    steps = trainer(CONFIG, dataset)
    folder, before = tempfile.TemporaryDirectory(), descendants(os.getpid())
    mode = "offline" if side == "candidate" else "disabled"
    run = tracking.Run(Path(folder.name), "steps", side, {}, mode=mode)
    started = _started_since(before) if side == "candidate" else set()
    done = itertools.count(1)

    def send(number: int) -> None:
        for process in started:
            os.kill(process, number)

    def finish() -> None:
        send(signal.SIGCONT)
        run.finish()
        folder.cleanup()

    def block(count: int) -> float:
        send(signal.SIGCONT)
        start = time.perf_counter()
        seconds = steps(count)
        run.log({tracking.STEP: next(done), tracking.SECONDS: seconds})
        seconds = (time.perf_counter() - start) / (count * CONFIG.batch)
        send(signal.SIGSTOP)
        return seconds

    atexit.register(finish)
    send(signal.SIGSTOP)
    return block


def against_one_by_one(side: str, dataset: data.Dataset) -> Block:
    """Several seeds of digits: a step of each in turn, or one step of all as lanes."""
    dataset = data.load(DIGITS.data)
    configs = [override(DIGITS, seed=seed) for seed in range(LANES)]
    lanes = vectorize.lanes(configs) if side == "candidate" else None
    states = lanes.states if lanes else [init(config) for config in configs]
    streams = [batches(c, dataset, state) for c, state in zip(configs, states, strict=True)]

    def block(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            if lanes:
                vectorize.step(lanes, [next(stream) for stream in streams])
            else:
                for config, state, stream in zip(configs, states, streams, strict=True):
                    step(state, next(stream), config)
        return (time.perf_counter() - start) / (steps * DIGITS.batch * LANES)

    return block


def _started_since(before: set[int]) -> set[int]:
    """Processes of W&B, which the system may list a moment later."""
    for _ in range(50):
        if started := descendants(os.getpid()) - before:
            return started
        time.sleep(0.1)
    raise RuntimeError("W&B started no process")


def plain_error() -> float:
    """Of the plain model and ours with its weights: largest difference of logits, in float64."""
    torch.manual_seed(0)
    model = plain.PlainVit().double().eval()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder, "w.pt"))
        vit = weights.load(Path(folder, "w.pt"), heads=plain.HEADS).eval()
    return _difference(model, vit)


def timm_error() -> float:
    """The same of timm's model."""
    torch.manual_seed(0)
    model = timm_model().double().eval()
    return _difference(model, from_timm(model).eval())


def _difference(one: nn.Module, other: nn.Module) -> float:
    image = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    return (one(image) - other(image)).abs().max().item()


COMPARISONS = {
    "plain": Comparison(
        "plain PyTorch, loader in the process", "scratch-cifar10", against_project(0), plain_error
    ),
    "plain-workers": Comparison(
        "plain PyTorch, 2 loader processes", "scratch-cifar10", against_project(2), plain_error
    ),
    "timm": Comparison(
        "timm in this trainer", "vitx in this trainer", against_timm(CONFIG), timm_error
    ),
    "timm-compiled": Comparison(
        "timm in this trainer", "vitx in this trainer", against_timm(COMPILED), timm_error, COMPILED
    ),
    "wandb": Comparison("without W&B", "with W&B offline", against_silence),
    "epoch": Comparison(
        "plain PyTorch, loader in the process, and its curve",
        "cifar10, and its curve",
        against_recipe,
        config=OURS,
    ),
    "lanes": Comparison(
        f"{LANES} seeds of digits one by one",
        f"{LANES} seeds of digits as lanes",
        against_one_by_one,
        config=DIGITS,
    ),
}


def main(args: list[str]) -> None:
    """Run every comparison in fresh processes; print and keep a row for each."""
    settings = cli.parse(Settings, args, prog="python -m benchmarks.steps")
    cli.at_least(settings, processes=2, steps=1)
    for name in settings.only:
        choose("only", name, COMPARISONS)
    dataset = data.load(override(CONFIG.data, root=settings.root))
    rows = Rows(settings.out / "steps" / time.strftime("%Y%m%d-%H%M%S-steps"))
    seconds = [first_step(settings.root) for _ in range(settings.processes)]
    print(f"first step {median(seconds):.1f} s after the start of the program")
    rows.add("speed", what="start", recipe="scratch-cifar10", seconds=seconds, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(dataset, Path(folder, DATA))
        for name in settings.only or COMPARISONS:
            kind, fields = compared(name, settings.processes, settings.steps, Path(folder))
            print(_line(name, rows.add(kind, **fields)))
    print(rows.path)


def compared(name: str, processes: int, steps: int, folder: Path) -> tuple[str, dict[str, Any]]:
    """The kind and the fields of a comparison's row, timed in so many fresh processes.

    One whose models differ, or of which a process fails, is a failure.
    """
    comparison = COMPARISONS[name]
    error = comparison.error() if comparison.error else None
    labels, unknown = _labels(name, error), {"ratio": None, "noise_floor": None, "images_per_s": {}}
    if error is not None and not error <= TOLERANCE:
        said = {"verdict": "not equal", "reason": f"logits differ by {error:.1e} in float64"}
        return "failure", labels | unknown | said
    records = []
    for number in range(processes):
        record, words = _child(name, number, steps, folder)
        if words:
            return "failure", labels | unknown | {"verdict": "failed", "reason": words}
        records.append(record)
    return "speed", labels | _fields(records)


def first_step(root: str) -> float:
    """Seconds from the start of the training program to the end of its first step, data read."""
    command = [sys.executable, "-m", "experiments.train", "scratch-cifar10"]
    flags = ["--data.root", root, "--log-every", "1", "--wandb", "disabled"]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        program = subprocess.Popen(
            [*command, *flags, "--out", folder], stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert program.stdout is not None
        try:
            found = any(line.startswith("step 1 ") for line in program.stdout)
            seconds = time.perf_counter() - start
        finally:
            program.kill()
            program.wait()
        errors.seek(0)
        if not found:
            last = (errors.read().strip().splitlines() or ["no word"])[-1]
            raise ValueError(f"{' '.join(command)} ended before a step: {last}")
    return seconds


def _child(name: str, number: int, steps: int, folder: Path) -> tuple[dict[str, Any], str]:
    """The record of one process; or none, and why it failed."""
    command = [sys.executable, "-m", "benchmarks.steps", "--child", name, str(number), str(steps)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    environment.pop("WANDB_SERVICE", None)  # its own processes of W&B, not this one's
    status, words = run_limited(
        [*command, str(folder)], environment, limit_s=LIMIT_S, limit_gib=0.0
    )
    return ({}, words) if status else (read_json(folder / RECORD), "")


def child(name: str, number: int, steps: int, folder: Path) -> None:
    """One process of a comparison: warm up, then rounds in every order; keeps its record."""
    end_with_parent()
    keep_memory()
    dataset: data.Dataset = torch.load(folder / DATA, weights_only=False)  # written by `main`
    made = random.Random(number).sample(ARMS, 3)
    sides = {arm: "candidate" if arm == "candidate" else "reference" for arm in ARMS}
    blocks = {arm: COMPARISONS[name].make(sides[arm], dataset) for arm in made}
    for block in blocks.values():
        block(3)
    orders = list(itertools.permutations(ARMS))
    random.Random(number).shuffle(orders)
    rounds = []
    for order in orders:
        watch, seconds = Watch(), {}
        for arm in order:
            seconds[arm] = blocks[arm](steps)
        rounds.append({"order": order, "seconds": seconds, **vars(watch.read())})
    times = {arm: [entry["seconds"][arm] for entry in rounds] for arm in ARMS}
    record = {
        "rounds": rounds,
        **log_ratios(times, dict.fromkeys(ARMS, 1)),  # seconds are those of an image already
        "threads": torch.get_num_threads(),
    }
    if name == "timm":
        record["data_share"] = data_share(dataset, steps)
    write_json(folder / RECORD, record)


def data_share(dataset: data.Dataset, steps: int) -> float:
    """The part of a step's time that goes into its batch."""
    state = init(CONFIG)
    stream = data.batches(dataset, batch=CONFIG.batch, seed=1)
    batch_s = step_s = 0.0
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(stream)
        middle = time.perf_counter()
        step(state, batch, CONFIG)
        batch_s, step_s = batch_s + middle - start, step_s + time.perf_counter() - middle
    return batch_s / (batch_s + step_s)


def _labels(name: str, error: float | None) -> dict[str, Any]:
    """What is known of a comparison before it is timed."""
    comparison = COMPARISONS[name]
    config = comparison.config
    image = torch.zeros(1, config.model.channels, *config.model.size)
    return {
        "what": "step",
        "comparison": name,
        "reference": comparison.reference,
        "candidate": comparison.candidate,
        "mode": "training",
        "compile": "default" if config.compile else "none",
        "dtype": "float32",
        "batch": config.batch,
        "image": list(config.model.size),
        "device": "cpu",
        "macs": {"candidate": forward_macs(build(config.model), image)},
        "equality": None if error is None else {"logits_error": error},
    }


def _fields(records: Sequence[dict]) -> dict[str, Any]:
    ratio = stats.paired_ratio([r["log_ratio"] for r in records])
    floor = stats.noise_floor([r["log_ratio_again"] for r in records])
    arms = {"reference": ("reference", "again"), "candidate": ("candidate",)}
    rates = {
        side: {"median": 1 / median(_seconds(records, chosen))} for side, chosen in arms.items()
    }
    shares = [record["data_share"] for record in records if "data_share" in record]
    return {
        "ratio": ratio.value,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "noise_floor": floor,
        "verdict": stats.speed_verdict(ratio, floor),
        "images_per_s": rates,
        "processes": len(records),
        "order": ["".join(a[0] for e in r["rounds"] for a in e["order"]) for r in records],
        "data_share": median(shares) if shares else None,
        "threads": sorted({record["threads"] for record in records}),
        "raw": [record["rounds"] for record in records],
    }


def _seconds(records: Sequence[dict], arms: Sequence[str]) -> Iterator[float]:
    return (entry["seconds"][arm] for r in records for entry in r["rounds"] for arm in arms)


def _line(name: str, row: dict[str, Any]) -> str:
    if row["kind"] == "failure":
        return f"{name}: {row['verdict']}: {row['reason']}"
    rates = [row["images_per_s"][side]["median"] for side in ("reference", "candidate")]
    return (
        f"{name}: {row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f}), floor "
        f"±{row['noise_floor']:.1%}: {row['verdict']}; {rates[0]:,.0f} and {rates[1]:,.0f} images/s"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        name, number, count, folder = sys.argv[2:]
        child(name, int(number), int(count), Path(folder))
    else:
        cli.run(main)
