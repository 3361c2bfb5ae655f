"""Where the time of one call or step goes: by stage, by phase, and from call to call.

Stages are those of models with timm's names of modules. Everything here waits for the device more
often than a timed block does, so shares are shown, and rates are those of `vitx.measure.timing`.
"""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitx.measure.comparison import Latency, Saved
from vitx.measure.machine import now
from vitx.measure.stats import Interval
from vitx.measure.timing import Arm, Block
from vitx.registry import UserError
from vitx.training import state as training
from vitx.training.config import TrainConfig

QUANTILES = (0.50, 0.90, 0.99)
LEAST_CALLS = 400
"""Calls that the quantiles are read from, at least. With fewer than 368 even the slowest call is
below the highest quantile more often than its interval allows: 0.99³⁶⁸ < 0.025."""
LEAST_PAIRS = 20
"""Pairs of blocks that a difference is the median of, at least."""
MEAN_WARM, MEAN_CALLS = 10, 40
"""timm's number of calls before and while it measures."""
REPEATS = 20
"""Calls or steps that shares are medians of."""
MIXING = (F.scaled_dot_product_attention, F.softmax, torch.softmax, torch.sigmoid, Tensor.softmax,
          torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.einsum)  # fmt: skip
"""Functions by which attention mixes tokens: the linear map after one of them is `proj`."""
STAGES = ("patchify", "qkv", "attention", "proj", "mlp", "norm", "residual", "head", "remainder")
"""`residual` is what blocks do beside their parts; `remainder` all else of a call."""


def latency(block: Block, seconds: float) -> Latency:
    """Quantiles of the seconds of single calls, the device waited for after each.

    Their 95 % intervals are those of order statistics, which hold for any law of the times as far
    as calls are independent.
    """
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < LEAST_CALLS:
        times.append(block(1))
    times.sort()
    return Latency(len(times), *(_quantile(times, share) for share in QUANTILES))


def saved(arms: Mapping[str, Arm], iterations: Mapping[str, int], seconds: float) -> Saved:
    """Seconds per image that the arm `compiled` saves beside the arm `eager`, in this process.

    The median over pairs of neighbouring blocks of so many iterations, in changing order, with the
    95 % interval of order statistics, which holds as far as pairs are independent and says nothing
    of other processes.
    """
    differences: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(differences) < LEAST_PAIRS:
        order = ("eager", "compiled")[:: -1 if len(differences) % 2 else 1]
        each = {name: arms[name].block(iterations[name]) / iterations[name] for name in order}
        differences.append((each["eager"] - each["compiled"]) / arms["eager"].images)
    differences.sort()
    return Saved(len(differences), _quantile(differences, 0.5))


def _quantile(times: Sequence[float], share: float) -> Interval:
    """A quantile of sorted values, and the order statistics around it that hold it 95 in 100."""
    n = len(times)
    low, high = (int(stats.binom.ppf(p, n, share)) for p in (0.025, 0.975))
    return Interval(
        times[min(int(share * n), n - 1)], times[max(low - 1, 0)], times[min(high, n - 1)]
    )


def mean_of_calls(block: Block) -> float:
    """Mean seconds of `MEAN_CALLS`, each waited for, after `MEAN_WARM`: one number of one process.

    timm's `benchmark.py` (1.0) reports this, as images per second.
    """
    block(MEAN_WARM)
    return statistics.mean(block(1) for _ in range(MEAN_CALLS))


def phases(model: nn.Module, example: Tensor, config: TrainConfig) -> dict[str, float]:
    """Median seconds of a training step's forward pass with its loss, backward pass, and the rest:
    clipping, optimizer and what watches for values that are not finite.
    """
    state, device = training.init(config, model=model, device=example.device), example.device
    with torch.no_grad():
        classes = model(example[:2]).shape[-1]  # batch norm needs two
    target = torch.randint(classes, (len(example),), device=device)
    times: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
    for _ in range(2 + REPEATS):
        marks = [now(device)]
        loss, hits = training.forward(state, example, target, config)
        marks.append(now(device))
        (loss * state.scale).backward()
        marks.append(now(device))
        training.change(state, loss.detach(), hits / len(example), float(len(example)), config)
        marks.append(now(device))
        for phase, (before, after) in zip(times.values(), itertools.pairwise(marks), strict=True):
            phase.append(after - before)
    return {name: statistics.median(phase[2:]) for name, phase in times.items()}


def stages(model: nn.Module, image: Tensor) -> dict[str, float]:
    """Median seconds of each of `STAGES` in an eager inference call; in each call they add up.

    Raises Unknown for a model whose modules have other names than timm's.
    """
    for name in ("patch_embed", "blocks", "blocks.0.attn", "blocks.0.mlp", "head"):
        try:
            model.get_submodule(name)
        except AttributeError:
            raise Unknown(f"the model has no module {name}: its stages are not known") from None
    model.eval()
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for repeat in range(2 + REPEATS):
        with torch.inference_mode(), _Stages(model, image.device) as watch:
            start = now(image.device)
            model(image)
            whole = now(image.device) - start
        if repeat >= 2:
            for stage, seconds in watch.split(whole).items():
                times[stage].append(seconds)
    return {stage: statistics.median(seconds) for stage, seconds in times.items()}


class Unknown(UserError):
    """A model whose stages can't be told apart."""


class _Stages:
    """Adds up the time of modules, and of the linear maps and attention inside of attention.

    Linear maps are seen as functions, not as modules: a model may call a part of one's weights.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device = model, device
        self.seconds: dict[str, float] = {}
        self.within = False
        self.mixed = False
        self.stack = ExitStack()

    def __enter__(self) -> "_Stages":
        for name, module in self.model.named_modules():
            if stage := _stage(name):
                self._watch(module, stage)
        self.stack.enter_context(_Functions(self))
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _watch(self, module: nn.Module, stage: str) -> None:
        started: list[float] = []

        def before(*_: object) -> None:
            if stage == "attn":
                self.within, self.mixed = True, False
            started.append(now(self.device))

        def after(*_: object) -> None:
            self.add(stage, now(self.device) - started.pop())
            if stage == "attn":
                self.within = False

        for handle in (
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
        ):
            self.stack.callback(handle.remove)

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def split(self, whole: float) -> dict[str, float]:
        """Seconds of each of `STAGES`."""
        own = {stage: self.seconds.get(stage, 0.0) for stage in STAGES}
        attn, block, inner = (self.seconds.get(k, 0.0) for k in ("attn", "block", "inner"))
        # Within attention also reshaping, which the fused function's inputs need.
        own["attention"] = attn - own["qkv"] - own["proj"]
        own["norm"] += inner
        own["residual"] = block - attn - own["mlp"] - inner
        own["remainder"] = whole - sum(v for k, v in own.items() if k != "remainder")
        return own


class _Functions(TorchFunctionMode):
    """Times linear maps inside of attention: before its mixing `qkv`, after it `proj`."""

    def __init__(self, watch: _Stages):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        watch = self.watch
        watch.mixed |= func in MIXING
        if not watch.within or func is not F.linear:
            return func(*args, **(kwargs or {}))
        start = now(watch.device)
        result = func(*args, **(kwargs or {}))
        watch.add("proj" if watch.mixed else "qkv", now(watch.device) - start)
        return result


def _stage(name: str) -> str:
    """The stage of a module of that name, `inner` for a block's norms; empty for none."""
    if name in ("patch_embed", "norm", "fc_norm", "head"):
        return {"patch_embed": "patchify", "fc_norm": "norm"}.get(name, name)
    blocks, _, rest = name.partition(".")
    part = rest.partition(".")[2]
    if blocks != "blocks" or not rest:
        return ""
    return {"": "block", "attn": "attn", "mlp": "mlp", "norm1": "inner", "norm2": "inner"}.get(
        part, ""
    )
