"""The trainer: `init(config) -> State`, `step(state, batch) -> metrics`, and one visible loop."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vitx import data, evaluate, optim, tracking
from vitx.config import TrainConfig
from vitx.functional.loss import cross_entropy
from vitx.model import build

Batch = tuple[Tensor, Tensor]


@dataclass
class State:
    """Everything that changes in training. `steps_done` also fixes the position in the data.

    Dropout draws from the device's global generator, which `init` seeds.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps_done: int = 0


@dataclass(frozen=True)
class Result:
    """A finished run: validation chose nothing in it, and the test split was read once."""

    val: evaluate.Score
    test: evaluate.Score
    test_logits: Tensor
    curve: list[dict[str, Any]]
    seconds: float


def init(
    config: TrainConfig, *, model: nn.Module | None = None, device: torch.device | str = "cpu"
) -> State:
    """The state before the first step. `model` replaces the one that the configuration builds."""
    torch.manual_seed(config.seed)
    if model is None:
        model = build(config.model, seed=config.seed)
    model = model.to(device).train()
    return State(model, optim.adamw(model, config.optim))


def step(state: State, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """One optimizer step on (image, target), in place; the loss and accuracy stay on the device."""
    image, target = batch
    rate = optim.learning_rate(config.optim, state.steps_done, config.steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    logits = state.model(image)
    loss = cross_entropy(logits, target, label_smoothing=config.optim.label_smoothing)
    loss.backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.steps_done += 1
    accuracy = (logits.detach().argmax(dim=1) == target).float().mean()
    return {"loss": loss.detach(), "accuracy": accuracy}


def train(
    config: TrainConfig,
    run: tracking.Run | None = None,
    *,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> tuple[State, Result]:
    """Train to `config.steps`, read validation every `eval_every` steps and test once at the end.

    The weights of the last step are the result. `run` receives every event; `model` as in `init`.
    """
    started = time.perf_counter()
    dataset = data.load(config.data).to(device)
    state = init(config, model=model, device=device)
    stream = data.batches(dataset, config.data, batch=config.batch, seed=config.seed)
    curve = []
    for event in _events(state, stream, dataset, config):
        curve.append(event)
        if run is not None:
            run.log(event)
    logits = {
        name: evaluate.predict(state.model, dataset, split)
        for name, split in (("val", dataset.val), ("test", dataset.test))
    }
    val = evaluate.score(logits["val"], dataset.val.target)
    test = evaluate.score(logits["test"], dataset.test.target)
    result = Result(val, test, logits["test"], curve, time.perf_counter() - started)
    if run is not None:
        run.summarise(summary(result, config))
    return state, result


def summary(result: Result, config: TrainConfig) -> dict[str, Any]:
    """Final values by metric name."""
    return {
        tracking.VAL_LOSS: result.val.loss,
        tracking.VAL_ACCURACY: result.val.accuracy,
        tracking.TEST_LOSS: result.test.loss,
        tracking.TEST_ACCURACY: result.test.accuracy,
        "test/standard_error": result.test.standard_error,
        "seconds": result.seconds,
        tracking.STEP: config.steps,
    }


def _events(
    state: State, stream: Iterator[Batch], dataset: data.Dataset, config: TrainConfig
) -> Iterator[dict[str, Any]]:
    """Run the steps; yield a reading every `eval_every` of them and at the last.

    Training loss and accuracy are those of the last batch.
    """
    since, seen = time.perf_counter(), 0
    with tqdm(total=config.steps, unit="step", disable=not sys.stderr.isatty()) as bar:
        while state.steps_done < config.steps:
            metrics = step(state, next(stream), config)
            bar.update()
            seen += config.batch
            if state.steps_done % config.eval_every and state.steps_done < config.steps:
                continue
            loss, accuracy = metrics["loss"].item(), metrics["accuracy"].item()
            rate = seen / (time.perf_counter() - since)  # after .item(), which waits for the device
            logits = evaluate.predict(state.model, dataset, dataset.val)
            val = evaluate.score(logits, dataset.val.target)
            event = {
                tracking.STEP: state.steps_done,
                tracking.TRAIN_LOSS: loss,
                tracking.TRAIN_ACCURACY: accuracy,
                tracking.VAL_LOSS: val.loss,
                tracking.VAL_ACCURACY: val.accuracy,
                tracking.LEARNING_RATE: state.optimizer.param_groups[0]["lr"],
                tracking.IMAGES_PER_S: rate,
            }
            bar.set_postfix(loss=f"{loss:.3f}", val=f"{val.accuracy:.1%}")
            yield event
            since, seen = time.perf_counter(), 0
