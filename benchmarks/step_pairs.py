"""Two ways of training side by side, which `benchmarks.steps` times: whole steps, data included.

The images are CIFAR-10's in memory, the model is that of the scratch-cifar10 recipe. Compared are
the project's code in plain PyTorch with the recipe, timm's ViT of the same shape in this trainer
with ours (eager and compiled), the trainer with and without W&B, an epoch of the project's code
with one of the cifar10 recipe, and seeds of digits one by one and as lanes.
"""

import atexit
import itertools
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import nn

from benchmarks import plain
from experiments.recipes import RECIPES
from vitx import data
from vitx.data.images import Split
from vitx.data.sources import FACTS, Images
from vitx.interop import weights
from vitx.interop.timm import from_timm
from vitx.measure.machine import descendants
from vitx.measure.timing import Block
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
Make = Callable[[str, data.Dataset], Block]
"""The block of one side of a pair, whose iterations are steps."""


@dataclass(frozen=True)
class StepPair:
    """Two ways of training."""

    reference: str
    candidate: str
    make: Make
    error: Callable[[], float] | None = None
    """Largest difference of both models' logits with the same weights, if they are the same."""
    config: TrainConfig = CONFIG
    """Of the candidate."""
    seeds: int = 1
    """That a step trains."""


@dataclass(frozen=True)
class TrainingSide:
    """A side of a pair as it is timed: an iteration is a number of steps, on data in a file."""

    pair: str
    side: str
    steps: int
    data: Path

    @property
    def images(self) -> int:
        """Of one iteration."""
        pair = PAIRS[self.pair]
        return self.steps * pair.config.batch * pair.seeds

    def make_block(self) -> Block:
        """Seconds of so many iterations."""
        block = PAIRS[self.pair].make(self.side, _dataset(self.data))
        return lambda iterations: block(iterations * self.steps)


@lru_cache(maxsize=1)
def _dataset(path: Path) -> data.Dataset:
    return torch.load(path, weights_only=False)  # written by `benchmarks.steps`


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
    # Whole batches only: a smaller one would be compiled anew, and make a block shorter.
    dataset = replace(dataset, config=override(config.data, drop_last=True))
    stream = data.batches(dataset, batch=config.batch, seed=config.seed)

    def block(steps: int) -> float:
        read = dataset.test.take(range(round(config.data.val * steps / config.eval_every)))
        start = time.perf_counter()
        for _ in range(steps):
            step(state, next(stream), config)
        if curve:
            evaluate.predict(state.model, dataset, read)
        return time.perf_counter() - start

    return block


def project(dataset: data.Dataset, *, workers: int = 0, curve: bool = False) -> Block:
    """Blocks of the plain rendering. Its loader is started and stopped outside of the time.

    With `curve` a block reads as much of the test split as falls to its steps of an epoch.
    """
    torch.manual_seed(0)
    model = plain.PlainVit()
    run = plain.make_step(model)

    def loader(split: Images, images: int, *, workers: int = 0, varied: bool) -> Iterator:
        assert isinstance(split, Split)  # in memory
        chosen = torch.randperm(len(split.target))[:images]
        return plain.batches(
            split.image[chosen], split.target[chosen], batch=CONFIG.batch, workers=workers,
            varied=varied,
        )  # fmt: skip

    def block(steps: int) -> float:
        images = (steps + 6) * CONFIG.batch
        varied = loader(dataset.train, images, workers=workers, varied=True)
        tested = loader(dataset.test, round(TEST_IMAGES * steps / EPOCH_STEPS), varied=False)
        run(*next(varied))  # by now the workers are at work
        start = time.perf_counter()
        for _ in range(steps):
            run(*next(varied))
        if curve:
            plain.accuracy(model, tested)
        return time.perf_counter() - start

    return block


def timm_model() -> nn.Module:
    """timm's ViT with the shape and the function of the recipe's."""
    from timm.models.vision_transformer import VisionTransformer

    c = CONFIG.model
    return VisionTransformer(
        img_size=c.size, patch_size=c.patch_size, embed_dim=c.width, depth=c.depth,
        num_heads=c.heads, mlp_ratio=c.mlp_ratio, num_classes=c.classes, final_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-5), act_layer=partial(nn.GELU, approximate="tanh"),
    )  # fmt: skip


def against_timm(config: TrainConfig) -> Make:
    def make(side: str, dataset: data.Dataset) -> Block:
        torch.manual_seed(0)
        model = timm_model()
        return trainer(config, dataset, model if side == "reference" else from_timm(model))

    return make


def against_project(workers: int) -> Make:
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
    """The trainer with a metric logged per block; the candidate's goes to W&B too.

    The processes that W&B started work on during a block of the candidate and stand still during
    those of the reference, so that what they take is in its time alone.
    """
    steps = trainer(CONFIG, dataset)
    folder, before = tempfile.TemporaryDirectory(), descendants(os.getpid())
    mode = "offline" if side == "candidate" else "disabled"
    os.environ.pop("WANDB_SERVICE", None)  # its own processes of W&B, not another's
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
        run.log({tracking.STEP: next(done), tracking.SECONDS: steps(count)})
        seconds = time.perf_counter() - start
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
        return time.perf_counter() - start

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


PAIRS = {
    "plain": StepPair(
        "plain PyTorch, loader in the process", "scratch-cifar10", against_project(0), plain_error
    ),
    "plain-workers": StepPair(
        "plain PyTorch, 2 loader processes", "scratch-cifar10", against_project(2), plain_error
    ),
    "timm": StepPair(
        "timm in this trainer", "vitx in this trainer", against_timm(CONFIG), timm_error
    ),
    "timm-compiled": StepPair(
        "timm in this trainer", "vitx in this trainer", against_timm(COMPILED), timm_error, COMPILED
    ),
    "wandb": StepPair("without W&B", "with W&B offline", against_silence),
    "epoch": StepPair(
        "plain PyTorch, loader in the process, and its curve",
        "cifar10, and its curve",
        against_recipe,
        config=OURS,
    ),
    "lanes": StepPair(
        f"{LANES} seeds of digits one by one",
        f"{LANES} seeds of digits as lanes",
        against_one_by_one,
        config=DIGITS,
        seeds=LANES,
    ),
}
