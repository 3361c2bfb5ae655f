"""What changes in training: `init(config) -> State`, `step(state, batch, config) -> metrics`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitx import metrics
from vitx.data.loader import Batch
from vitx.interop import weights
from vitx.model.vit import build
from vitx.registry import UserError
from vitx.training import optim, parallel
from vitx.training.config import TrainConfig
from vitx.training.loss import cross_entropy
from vitx.training.parallel import ALONE, Part

GROWTH_STEPS = 2000
"""Steps without overflow after which the scale of float16 gradients doubles."""


class Diverged(UserError):
    """A loss or gradient was not finite."""


@dataclass
class State:
    """Everything that changes in training. `steps_done` also fixes the position in the data.

    Dropout draws from the device's global generator, which `init` seeds and `pack` keeps.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    average: nn.Module | None
    """Moving average of the weights, if there is one."""
    bad_step: Tensor
    """The first step whose loss or gradient was not finite, on the device; -1 so far."""
    bad_tensor: Tensor
    """Which it was: 0 the loss, k the k-th trained parameter's gradient."""
    scale: Tensor
    """What the loss is multiplied by, for float16 gradients; else 1."""
    steady: Tensor
    """Steps since the scale last changed."""
    sums: Tensor
    """Since the last logging step, on the device: loss and accuracy times images, and images."""
    run: Callable[[Tensor], Tensor]
    """The model as it is trained: itself, compiled, or shared by several processes."""
    steps_done: int = 0
    part: Part = ALONE
    reported: metrics.Sums = field(default_factory=dict)
    """What `metrics.report` has recorded since the last logging step."""

    @property
    def result(self) -> nn.Module:
        """The weights that count: the average, if there is one."""
        return self.model if self.average is None else self.average

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are not frozen, by name."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]


def init(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    part: Part = ALONE,
    classes: Sequence[str] = (),
) -> State:
    """The state before the first step. `model` replaces the one that the configuration builds.

    `classes` are the data's, by which a head of weights to start from is matched.
    """
    torch.manual_seed(config.seed + config.seed_augment + 1_000_003 * part.rank)
    seed = config.seed + config.seed_init
    if model is None and config.weights:
        # Parameters are in float32, whatever the file's precision.
        model = weights.start(config.model, config.weights, classes=classes, seed=seed).float()
        model.reset_buffers()
    elif model is None:
        model = build(config.model, seed=seed)
    model = model.to(device).train()
    optim.freeze(model, config.optim.freeze)
    number = {"device": device, "dtype": torch.long}
    bad_step = torch.tensor(-1, **number)
    average = deepcopy(model) if config.ema else None
    run = cast("nn.Module", torch.compile(model)) if config.compile else model
    if not part.alone:
        run = parallel.averaging(run)
    return State(
        model,
        optim.optimizers(model, config.optim),
        average,
        bad_step=bad_step,
        bad_tensor=torch.tensor(-1, **number),
        scale=torch.tensor(2.0**16 if config.precision == "float16" else 1.0, device=device),
        steady=torch.tensor(0, **number),
        sums=torch.zeros(3, device=device),
        run=run,
        part=part,
    )


def step(state: State, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """One optimizer step on (image, target), in place; the loss and accuracy stay on the device.

    Accuracy of mixed targets counts the larger class. A loss or gradient that is not finite makes
    this step and all later ones change nothing; `check` says so. A gradient that is too large for
    float16 leaves out this step alone and halves what the loss is multiplied by.
    """
    optim.set_rate(
        state.optimizers, optim.learning_rate(config.optim, state.steps_done, config.steps)
    )
    with metrics.recording(state.reported):
        loss, accuracy, images = gradients(state, batch, config)
        return change(state, loss, accuracy, images, config)


def gradients(
    state: State, batch: Batch, config: TrainConfig
) -> tuple[Tensor, Tensor, float | Tensor]:
    """The first half of `step`: add the gradients to the parameters; loss, accuracy, images."""
    image, target = batch
    loss, hits = torch.zeros((), device=image.device), torch.zeros((), device=image.device)
    images, whole = image.chunk(config.accumulate), _mean_share(image, state.part)
    for number, (x, y) in enumerate(zip(images, target.chunk(config.accumulate), strict=True), 1):
        # Processes add up their gradients once, with the last part.
        shared = isinstance(state.run, DistributedDataParallel) and number < len(images)
        with state.run.no_sync() if shared else nullcontext():  # type: ignore[attr-defined]
            mean, part_hits = forward(state, x, y, config)
            part_loss = mean * len(x) / whole  # two exact numbers, whatever the dtype
            (part_loss * state.scale).backward()
        loss = loss + part_loss.detach()
        hits = hits + part_hits
    return loss, hits / whole, whole


def forward(
    state: State, image: Tensor, target: Tensor, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Mean loss of a part of a batch, and how many of its images are right."""
    with autocast(image.device, config.precision):
        logits = state.run(image)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    loss = cross_entropy(logits, target, label_smoothing=config.optim.label_smoothing)
    return loss, right(logits.detach(), target)


def right(logits: Tensor, target: Tensor) -> Tensor:
    """How many of a batch's largest logits are those of their class, or of the larger share."""
    label = target.argmax(dim=1) if target.is_floating_point() else target
    return (logits.argmax(dim=1) == label).sum()


def change(
    state: State, loss: Tensor, accuracy: Tensor, images: float | Tensor, config: TrainConfig
) -> dict[str, Tensor]:
    """The second half of `step`: the gradients that lie in the parameters change the state."""
    gradients = [p.grad for _, p in state.trained if p.grad is not None]
    skip, norm = _watch(state, loss, gradients, config)
    if config.optim.clip:
        nn.utils.clip_grads_with_norm_(
            [p for _, p in state.trained], config.optim.clip, norm, foreach=True
        )
    optim.update(state.optimizers, skip)
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    if state.average is not None:
        going = (state.bad_step < 0).float()
        optim.follow(state.average, state.model, (1 - config.ema) * going)
    state.steps_done += 1
    state.sums += torch.stack([loss, accuracy, torch.ones_like(loss)]) * images
    return {"loss": loss, "accuracy": accuracy, "gradient_norm": norm}


def _mean_share(image: Tensor, part: Part) -> float | Tensor:
    """Images of the whole batch an equal share of a process has, on the device.

    Gradients and metrics are averaged over processes, whose shares of an epoch's last batch may
    differ by an image; dividing by this weighs every image alike.
    """
    if part.alone:
        return float(len(image))
    # Filled on the device: a tensor copied from here would wait for it.
    count = torch.full((), float(len(image)), device=image.device)
    return parallel.total(count, part) / part.ranks


@torch.no_grad()
def _watch(
    state: State, loss: Tensor, gradients: list[Tensor], config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Whether to leave the step out (1.0 or 0.0) and the gradient's norm, both on the device.

    Gradients come out unscaled. The first bad step and tensor are written into the state.
    """
    half = config.precision == "float16"
    if half:
        optim.multiply(gradients, 1 / state.scale)
    norms = optim.norms(gradients)
    bad = ~torch.cat([loss[None].to(norms.dtype), norms]).isfinite()
    # An overflow of float16 is no fault while the scale can still be halved.
    fault = bad[0] | (bad.any() & (state.scale < 1)) if half else bad.any()
    fault = parallel.largest(fault.long(), state.part).bool()
    first = fault & (state.bad_step < 0)
    state.bad_step.copy_(torch.where(first, state.steps_done, state.bad_step))
    state.bad_tensor.copy_(torch.where(first, bad.long().argmax(), state.bad_tensor))
    skip = (state.bad_step >= 0) | bad.any()
    if half:
        overflow = bad.any()
        steady = torch.where(overflow, 0, state.steady + 1)
        grow = steady >= GROWTH_STEPS
        factor = torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0))
        state.scale.mul_(factor)
        state.steady.copy_(torch.where(grow, 0, steady))
    return skip.float(), norms.norm()


def check(state: State) -> None:
    """Raises Diverged, naming step and tensor, if a step was bad. This waits for the device."""
    step_number = int(state.bad_step.item())
    if step_number >= 0:
        which = int(state.bad_tensor.item())
        what = "loss" if which <= 0 else f"gradient of {state.trained[which - 1][0]}"
        raise Diverged(
            f"the {what} of step {step_number + 1} is not finite; the weights are those before it"
        )


def pack(state: State) -> dict[str, Any]:
    """The state as plain tensors and numbers: what a checkpoint keeps."""
    device = state.bad_step.device
    random = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        random[device.type] = torch.get_device_module(device).get_rng_state(*_index(device))
    own = (state.sums.cpu(), random, metrics.numbers(state.reported))
    sums, randoms, reported = zip(*parallel.gathered(own, state.part), strict=True)
    return {
        "model": state.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
        "average": None if state.average is None else state.average.state_dict(),
        "bad_step": state.bad_step,
        "bad_tensor": state.bad_tensor,
        "scale": state.scale,
        "steady": state.steady,
        "steps_done": state.steps_done,
        "sums": list(sums),
        "random": list(randoms),
        "reported": list(reported),
    }


def unpack(state: State, packed: dict[str, Any]) -> None:
    """Put a packed state into one that `init` made of the same configuration."""
    state.model.load_state_dict(packed["model"])
    for optimizer, values in zip(state.optimizers, packed["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    if state.average is not None:
        state.average.load_state_dict(packed["average"])
    for name in ("bad_step", "bad_tensor", "scale", "steady"):
        getattr(state, name).copy_(packed[name])
    state.steps_done = packed["steps_done"]
    if len(packed["random"]) != state.part.ranks:
        raise UserError(
            f"the checkpoint is of {len(packed['random'])} processes, not {state.part.ranks}"
        )
    state.sums.copy_(packed["sums"][state.part.rank])
    if "reported" in packed:  # checkpoints before `report` was there have none
        state.reported = dict(packed["reported"][state.part.rank])
    device, random = state.bad_step.device, packed["random"][state.part.rank]
    made_on = list(random)[-1]
    if made_on != device.type:
        raise UserError(f"the checkpoint was made on {made_on}; on {device.type} draws differ")
    torch.set_rng_state(random["cpu"])
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.set_rng_state(random[device.type], *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """How a device's generator is told from its neighbours'; Apple's has none."""
    return () if device.type == "mps" else (device,)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which a forward pass has this precision."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))
