"""Several seeds, and learning rates, of one small model trained as one program.

The parameters of all lanes lie in tensors with a leading axis `s`; a lane's `State` is that of
`train.init`, with views into them. Forward and backward passes run once for all lanes, by
`torch.vmap`. All that follows in a step, and every reading, is the code of a run alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from vitx import data
from vitx.data.loader import Batch
from vitx.model.functional.attention import ATTENTION, sdpa
from vitx.model.vit import build
from vitx.registry import resolve
from vitx.settings import delta, override
from vitx.training import optim
from vitx.training.config import TrainConfig
from vitx.training.loss import cross_entropy
from vitx.training.state import Diverged, State, change, init, right
from vitx.training.state import check as check_finite
from vitx.training.trainer import Clock, Result, batches, check_data, curve_reading, final, reading

COMMON = {
    "seed": 0,
    "seed_init": 0,
    "seed_order": 0,
    "seed_augment": 0,
    "optim.lr": 1.0,
    "optim.weight_decay": 0.0,
}
"""Settings in which lanes may differ. With these values for them, configurations that may be lanes
of one program are the same."""
NOISE = ("drop", "attention_drop", "position_drop", "head_drop", "drop_path", "patch_drop")
"""Rates of what draws inside the model, where all lanes would share one generator."""
PLAIN = {"compile": False, "precision": "float32", "accumulate": 1, "keep_every": 0}
"""Settings that lanes have in one way only."""


def check(configs: Sequence[TrainConfig]) -> None:
    """ValueError naming the setting for which these can't be lanes of one program."""
    first, *others = configs
    for config in others:
        for name in delta(config, first):
            if name not in COMMON:
                raise ValueError(f"lanes may differ in {', '.join(COMMON)}, not in {name}")
    for name in NOISE:
        if rate := getattr(first.model, name):
            raise ValueError(
                f"model.{name} = {rate} draws inside the model, where lanes would share one "
                "generator; set it to 0, or train seed by seed"
            )
    for name, plain in PLAIN.items():
        if (value := getattr(first, name)) != plain:
            raise ValueError(f"{name} = {value!r} is not for lanes, which take {plain!r}")


@dataclass(frozen=True)
class Lanes:
    """States side by side."""

    states: list[State]
    configs: list[TrainConfig]
    weights: dict[str, Tensor]
    """Every parameter by name, (s, *shape); the states' parameters are views of its rows."""
    gradients: Callable[..., Any]
    """(weights, images, targets) to gradients by name, and loss and hits a lane."""


def lanes(configs: Sequence[TrainConfig], *, device: torch.device | str = "cpu") -> Lanes:
    """The states before the first step, each with the values that it has alone.

    Raises ValueError for configurations that `check` refuses.
    """
    check(configs)
    states = [init(config, device=device) for config in configs]
    stacked: dict[str, Tensor] = {}
    for name, _ in states[0].model.named_parameters():
        each = [state.model.get_parameter(name) for state in states]
        stacked[name] = torch.stack([parameter.detach() for parameter in each])
        for parameter, row in zip(each, stacked[name], strict=True):
            parameter.data = row
    trained = [name for name, _ in states[0].trained]
    smoothing = configs[0].optim.label_smoothing
    # The backward pass of fused attention knows no lanes; `math` is the same function.
    fused = resolve(configs[0].model.attention, ATTENTION) is sdpa
    shape = override(configs[0].model, attention="math") if fused else configs[0].model
    model = build(shape, device=device).train()

    def loss(free: dict[str, Tensor], held: dict[str, Tensor], image: Tensor, target: Tensor):
        logits = functional_call(model, free | held, (image,))
        return cross_entropy(logits, target, label_smoothing=smoothing), right(logits, target)

    each = vmap(grad_and_value(loss, has_aux=True))

    def gradients(weights: dict[str, Tensor], image: Tensor, target: Tensor) -> Any:
        free = {name: weights[name] for name in trained}
        held = {name: value for name, value in weights.items() if name not in free}
        return each(free, held, image, target)

    return Lanes(states, list(configs), stacked, gradients)


def step(found: Lanes, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """One optimizer step of every lane on its own batch; their readings, on the device."""
    image, target = (torch.stack(parts) for parts in zip(*batches, strict=True))
    gradients, (losses, hits) = found.gradients(found.weights, image, target)
    readings = []
    for lane, (state, config) in enumerate(zip(found.states, found.configs, strict=True)):
        for name, parameter in state.trained:
            parameter.grad = gradients[name][lane]
        optim.set_rate(
            state.optimizers, optim.learning_rate(config.optim, state.steps_done, config.steps)
        )
        images = len(image[lane])
        readings.append(change(state, losses[lane], hits[lane] / images, float(images), config))
    return readings


@dataclass(frozen=True)
class Lane:
    """A finished lane: as a run alone, or with the error that ended it."""

    config: TrainConfig
    state: State
    events: list[dict[str, Any]]
    result: Result | None
    error: str = ""


def train(
    configs: Sequence[TrainConfig],
    *,
    dataset: data.Dataset | None = None,
    device: torch.device | str = "cpu",
) -> list[Lane]:
    """Train all to their last step. Seconds in the results are those of all lanes together.

    A lane whose loss or gradient is not finite stands still from there on, and says so.
    """
    clock, (first, *_) = Clock(), configs
    if dataset is None:
        dataset = data.load(first.data, size=first.model.size)
    dataset = dataset.to(device)
    check_data(first, dataset)
    found = lanes(configs, device=device)
    pairs = zip(configs, found.states, strict=True)
    streams = [batches(config, dataset, state) for config, state in pairs]
    events: list[list[dict[str, Any]]] = [[] for _ in configs]
    for done in range(1, first.steps + 1):
        metrics = step(found, [next(stream) for stream in streams])
        for kept, state, config, values in zip(events, found.states, configs, metrics, strict=True):
            if done % config.log_every == 0 or done == config.steps:
                kept.append(reading(state, values["gradient_norm"], config))
            if done % config.eval_every == 0 or done == config.steps:
                kept.append(curve_reading(state, dataset, config))
    return [
        _end(config, state, kept, dataset, clock)
        for config, state, kept in zip(configs, found.states, events, strict=True)
    ]


def _end(
    config: TrainConfig,
    state: State,
    events: list[dict[str, Any]],
    dataset: data.Dataset,
    clock: Clock,
) -> Lane:
    try:
        check_finite(state)
    except Diverged as error:
        return Lane(config, state, events, None, str(error))
    curve = [event for event in events if f"{config.curve}/loss" in event]
    return Lane(config, state, events, final(state, dataset, curve, clock))
