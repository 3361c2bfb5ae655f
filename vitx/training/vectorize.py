"""Several seeds, and learning rates, of one small model trained as one program.

The parameters of all lanes lie in tensors with a leading axis `s`; a lane's `State` is that of
`state.init`, with views into them. Forward and backward passes run once for all lanes, by
`torch.vmap`. All that follows in a step, and every metric, is the code of a run alone.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from vitx import data, metrics
from vitx.data.loader import Batch
from vitx.model.functional.attention import ATTENTION, sdpa
from vitx.model.vit import build
from vitx.registry import UserError, resolve
from vitx.settings import delta, override
from vitx.training import optim
from vitx.training import state as training_state
from vitx.training.config import TrainConfig
from vitx.training.loss import cross_entropy
from vitx.training.prepare import Clock, Training, check_data
from vitx.training.state import Diverged, State, change, init, right
from vitx.training.tracking import Event
from vitx.training.trainer import Result, batches, due, evaluation, finish, training_metrics

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
                raise UserError(f"lanes may differ in {', '.join(COMMON)}, not in {name}")
    for name in NOISE:
        if rate := getattr(first.model, name):
            raise UserError(
                f"model.{name} = {rate} draws inside the model, where lanes would share one "
                "generator; set it to 0, or train seed by seed"
            )
    for name, plain in PLAIN.items():
        if (value := getattr(first, name)) != plain:
            raise UserError(f"{name} = {value!r} is not for lanes, which take {plain!r}")


ByName = dict[str, Tensor]
Gradients = tuple[ByName, tuple[Tensor, tuple[Tensor, ByName]]]
"""Gradients, losses, hits and what was reported, each with the leading axis s."""


@dataclass(frozen=True)
class Lanes:
    """States side by side."""

    states: list[State]
    configs: list[TrainConfig]
    weights: ByName
    """Every parameter by name, (s, *shape); the states' parameters are views of its entries."""
    gradients: Callable[[ByName, Tensor, Tensor], Gradients]
    """Of (weights, images, targets)."""


def lanes(
    configs: Sequence[TrainConfig],
    *,
    device: torch.device | str = "cpu",
    classes: Sequence[str] = (),
) -> Lanes:
    """The states before the first step, each with the values that it has alone.

    Raises ValueError for configurations that `check` refuses.
    """
    check(configs)
    states = [init(config, device=device, classes=classes) for config in configs]
    stacked: ByName = {}
    for name, _ in states[0].model.named_parameters():
        each = [state.model.get_parameter(name) for state in states]
        stacked[name] = torch.stack([parameter.detach() for parameter in each])
        for parameter, own in zip(each, stacked[name], strict=True):
            parameter.data = own
    return Lanes(states, list(configs), stacked, _gradients(configs[0], states[0], device))


def _gradients(
    config: TrainConfig, state: State, device: torch.device | str
) -> Callable[[ByName, Tensor, Tensor], Gradients]:
    """The forward and backward pass of lanes with this configuration and this first state."""
    trained = [name for name, _ in state.trained]
    # The backward pass of fused attention knows no lanes; `math` is the same function.
    fused = resolve(config.model.attention, ATTENTION) is sdpa
    shape = override(config.model, attention="math") if fused else config.model
    model = build(shape, device=device).train()

    def loss(free: ByName, held: ByName, image: Tensor, target: Tensor):
        sums: metrics.Sums = {}
        with metrics.recording(sums):
            logits = functional_call(model, free | held, (image,))
            mean = cross_entropy(logits, target, label_smoothing=config.optim.label_smoothing)
        reported = {
            name: torch.as_tensor(total / count, device=image.device)
            for name, (total, count) in sums.items()
        }
        return mean, (right(logits, target), reported)

    each = vmap(grad_and_value(loss, has_aux=True))

    def gradients(weights: ByName, image: Tensor, target: Tensor) -> Gradients:
        free = {name: weights[name] for name in trained}
        held = {name: value for name, value in weights.items() if name not in free}
        return each(free, held, image, target)

    return gradients


def step(side_by_side: Lanes, batches: Sequence[Batch]) -> list[ByName]:
    """One optimizer step of every lane on its own batch; their metrics, on the device."""
    image, target = (torch.stack(parts) for parts in zip(*batches, strict=True))
    gradients, (losses, (hits, reported)) = side_by_side.gradients(
        side_by_side.weights, image, target
    )
    each = []
    pairs = zip(side_by_side.states, side_by_side.configs, strict=True)
    for lane, (state, config) in enumerate(pairs):
        for name, parameter in state.trained:
            parameter.grad = gradients[name][lane]
        optim.set_rate(
            state.optimizers, optim.learning_rate(config.optim, state.steps_done, config.steps)
        )
        images = len(image[lane])
        with metrics.recording(state.reported):
            for name, values in reported.items():
                metrics.report(name, values[lane])
            each.append(change(state, losses[lane], hits[lane] / images, float(images), config))
    return each


@dataclass(frozen=True)
class Lane:
    """A finished lane: as a run alone, or with the error that ended it."""

    training: Training
    events: list[Event]
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
    side_by_side, fingerprint = (
        lanes(configs, device=device, classes=dataset.classes),
        dataset.fingerprint,
    )
    runs = [
        (Training(config, dataset, state, clock, fingerprint), batches(config, dataset, state))
        for config, state in zip(configs, side_by_side.states, strict=True)
    ]
    events: list[list[Event]] = [[] for _ in configs]
    for _ in range(first.steps):
        each = step(side_by_side, [next(stream) for _, stream in runs])
        for kept, (training, _), values in zip(events, runs, each, strict=True):
            if due(training.config.log_every, training):
                kept.append(training_metrics(training, values["gradient_norm"]))
            if due(training.config.eval_every, training):
                with suppress(Diverged):  # it is said at the end
                    kept.append(evaluation(training))
    return [_end(training, kept) for (training, _), kept in zip(runs, events, strict=True)]


def _end(training: Training, events: list[Event]) -> Lane:
    try:
        training_state.check(training.state)
        curve = [event for event in events if f"{training.config.curve}/loss" in event]
        return Lane(training, events, finish(training, curve))
    except Diverged as error:
        return Lane(training, events, None, str(error))
