"""The loop: it trains a state to its last step, logs, evaluates, saves and stops."""

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vitx import data
from vitx.data.loader import Batch
from vitx.interop import weights
from vitx.model.compiler import needs_compiler
from vitx.settings import delta, flat, from_flat
from vitx.training import checkpoint, evaluate, optim, parallel, tracking
from vitx.training.config import FREE, TrainConfig
from vitx.training.parallel import ALONE, Part
from vitx.training.state import Diverged, State, check, forward, init, pack, step, unpack


class Stopped(SystemExit):
    """A signal came; the state was saved. Ends the program as the signal would, unless caught."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}; the state is saved")
        self.code = 128 + number


@dataclass(frozen=True)
class Result:
    """A finished run: no reading chose anything in it, and the test split was read at the end."""

    val: evaluate.Score
    test: evaluate.Score
    test_logits: Tensor
    test_target: Tensor
    curve: list[dict[str, Any]]
    seconds: float
    """From the start of reading the data, readings included, over all resumptions."""
    cpu_seconds: float
    """Of all threads and of the workers that have ended, those of a start that was stopped left
    out; of several trainers those of the first."""


class Clock:
    """Wall and CPU seconds of a run, over all the processes that it was resumed in."""

    def __init__(self):
        self.before = (0.0, 0.0)
        self._start = self._now()

    def read(self) -> tuple[float, float]:
        (wall, cpu), start, before = self._now(), self._start, self.before
        return before[0] + wall - start[0], before[1] + cpu - start[1]

    def _now(self) -> tuple[float, float]:
        times = os.times()
        own, children = times.user + times.system, times.children_user + times.children_system
        return time.perf_counter(), own + children


@dataclass(frozen=True)
class Ready:
    """A run about to start or to go on: what is read and checked before anything is written."""

    dataset: data.Dataset
    state: State
    clock: Clock


def prepare(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    part: Part = ALONE,
    resume: Path | None = None,
    dataset: data.Dataset | None = None,
) -> Ready:
    """Read the data, make the state, or take it from the checkpoint in the folder `resume`.

    `dataset` is what was read before, for several runs on the same data. Raises ValueError for
    settings that don't fit the data, or the run that is resumed.
    """
    clock = Clock()
    flat(config)  # what no checkpoint can record is refused before it is trained
    if config.compile:
        needs_compiler(device)
    if dataset is None:
        dataset = data.load(config.data, size=config.model.size)
    dataset = dataset.to(device)
    check_data(config, dataset, part)
    state = init(config, model=model, device=device, part=part)
    if config.weights and part.first:
        _compare_preprocessing(config, dataset)
    if resume is not None:
        kept = checkpoint.load(resume)
        refuse_changes(config, kept["config"])
        if kept["data"] != dataset.fingerprint:
            raise ValueError(
                f"the data are not those of the run in {resume}: other images, or others in the "
                "splits; start a new run"
            )
        _settle(state, config)
        unpack(state, kept["state"])
        check(state)
        dataset.skipped[:] = _union([dataset.skipped, kept["skipped"]])
        clock.before = tuple(kept["seconds"])
    return Ready(dataset, state, clock)


def _settle(state: State, config: TrainConfig) -> None:
    """One pass of several processes, which changes nothing once `unpack` has been there.

    PyTorch sorts its buckets of gradients anew after the first pass of every start, and three or
    more processes then add in another order: this way a resumed run adds in that of one that went
    on.
    """
    if state.part.alone:
        return
    count = max(config.batch // state.part.ranks // config.accumulate, 1)
    device, model = state.bad_step.device, config.model
    image = torch.zeros(count, model.channels, *model.size, device=device)
    target = torch.zeros(count, dtype=torch.long, device=device)
    loss, _ = forward(state, image, target, config)
    loss.backward()
    for optimizer in state.optimizers:
        optimizer.zero_grad()


def train(
    config: TrainConfig,
    run: tracking.Run | None = None,
    *,
    ready: Ready | None = None,
    folder: Path | None = None,
    **how: Any,
) -> tuple[State, Result]:
    """Train to `config.steps`; the weights of the last step, or their average, are the result.

    `ready` is what `prepare` made, else `how` are its arguments. `run` receives every event, in the
    first process only. `folder` keeps checkpoints. Raises Diverged when a loss or gradient was not
    finite and Stopped on SIGTERM or Ctrl-C, each after saving.
    """
    ready = ready or prepare(config, **how)
    dataset, state, clock, part = ready.dataset, ready.state, ready.clock, ready.state.part
    if run is not None:
        run.rewind(state.steps_done)
    if folder is not None and part.first:
        checkpoint.set_aside(folder)
    fingerprint = dataset.fingerprint
    about = weights.Description(config.model, dataset.classes, dataset.preprocessing)

    def save() -> None:
        if folder is None:
            return
        dataset.skipped[:] = _union(parallel.gathered(dataset.skipped, part))
        kept = {"state": pack(state), "config": flat(config), "data": fingerprint,
                "skipped": list(dataset.skipped), "seconds": list(clock.read())}  # fmt: skip
        if part.first:
            # Weights of a step that is to be kept come first: a run goes on after its checkpoint.
            due = config.keep_every and state.steps_done % config.keep_every == 0
            if due and kept["state"]["bad_step"] < 0:
                path = folder / f"model-{state.steps_done}.safetensors"
                weights.save(state.result, path, about)
            checkpoint.save(folder, kept)

    stream = batches(config, dataset, state)
    curve = [] if run is None else run.events(tracking.VAL_ACCURACY, tracking.TEST_ACCURACY)
    first = state.steps_done, clock.read()[0]
    with _signals() as caught:
        for event in _events(state, stream, dataset, config, caught, save):
            if tracking.VAL_LOSS in event or tracking.TEST_LOSS in event:
                curve.append(event)
            if run is not None:
                run.log(event)
                if not sys.stderr.isatty():  # else the bar says it
                    print(_line(event, config, first, clock), flush=True)
    stream.close()  # ends its workers, whose seconds count then
    result = final(state, dataset, curve, clock)
    if run is not None:
        keep(run, state, result, dataset, config)
    return state, result


def batches(
    config: TrainConfig, dataset: data.Dataset, state: State
) -> Generator[Batch, None, None]:
    """This process's training batches from the state's position on."""
    return data.batches(
        dataset,
        batch=config.batch,
        seed=config.seed + config.seed_augment,
        order_seed=config.seed + config.seed_order,
        start=state.steps_done,
        device=state.bad_step.device,
        part=(state.part.rank, state.part.ranks),
    )


def final(state: State, dataset: data.Dataset, curve: list[dict[str, Any]], clock: Clock) -> Result:
    """Score the finished state on validation, and once on the test split."""
    logits, target, _ = evaluate.predict(state.result, dataset, dataset.val, part=state.part)
    val = evaluate.score(logits, target)
    logits, target, _ = evaluate.predict(state.result, dataset, dataset.test, part=state.part)
    dataset.skipped[:] = _union(parallel.gathered(dataset.skipped, state.part))
    return Result(val, evaluate.score(logits, target), logits, target, curve, *clock.read())


def keep(
    run: tracking.Run,
    state: State,
    result: Result,
    dataset: data.Dataset,
    config: TrainConfig,
    **more: Any,
) -> None:
    """Write the final values, with `more` of them, and the weights into the run folder."""
    about = weights.Description(config.model, dataset.classes, dataset.preprocessing)
    weights.save(state.result, run.folder / weights.FILE, about)
    # Last, as it says that the run has ended.
    values = summary(result, config, dataset) | {"fingerprint": dataset.fingerprint}
    run.summarise(values | more)


def check_data(config: TrainConfig, dataset: data.Dataset, part: Part = ALONE) -> None:
    """ValueError if the data that was read does not fit the configuration."""
    data.check_batch(dataset, config.batch, part.ranks)
    if config.model.channels != len(dataset.mean):
        raise ValueError(
            f"model.channels = {config.model.channels} does not fit the data, which have "
            f"{len(dataset.mean)}"
        )
    classes = len(dataset.classes)
    if config.model.classes != classes:
        raise ValueError(
            f"model.classes = {config.model.classes} does not fit the data, which have {classes}"
        )
    if dataset.size != config.model.size:
        raise ValueError(f"model.image = {config.model.size} does not fit the data: {dataset.size}")
    if not len(getattr(dataset, config.curve)):
        raise ValueError(
            f"curve = {config.curve!r}, but the data have no such split; set data.{config.curve}, "
            "the number of images to hold out, or choose the other split"
        )


def _compare_preprocessing(config: TrainConfig, dataset: data.Dataset) -> None:
    """Say so if the weights to start from were trained on otherwise normalised images."""
    theirs = weights.describe(config.weights, heads=config.model.heads).preprocessing
    ours = dataset.preprocessing
    if theirs is None or all(
        torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-3)
        for a, b in ((theirs.mean, ours.mean), (theirs.std, ours.std))
    ):
        return
    print(
        f"warning: {config.weights} was trained on images normalised by mean {_short(theirs.mean)} "
        f"and deviation {_short(theirs.std)}; data.normalise = {config.data.normalise!r} takes "
        f"{_short(ours.mean)} and {_short(ours.std)}",
        file=sys.stderr,
    )


def _short(values: Sequence[float]) -> str:
    """Numbers of the channels, for people."""
    return ", ".join(f"{value:.3f}" for value in values)


def refuse_changes(config: TrainConfig, before: dict[str, Any]) -> None:
    """ValueError naming the first setting that differs from a checkpoint's and matters."""
    for name, value in delta(config, from_flat(TrainConfig, before)).items():
        if name not in FREE:
            raise ValueError(
                f"{name} = {value!r}, but the run to resume was started with "
                f"{before.get(name)!r}; only {', '.join(FREE)} may change"
            )


def _union(lists: Sequence[Sequence[str]]) -> list[str]:
    """What stands in any of them, once."""
    return list(dict.fromkeys(itertools.chain.from_iterable(lists)))


def summary(result: Result, config: TrainConfig, dataset: data.Dataset) -> dict[str, Any]:
    """Final values by metric name; of a split without images there are none."""
    values: dict[str, Any] = {}
    for name, score in (("val", result.val), ("test", result.test)):
        if score.images:
            values |= {
                f"{name}/loss": score.loss,
                f"{name}/accuracy": score.accuracy,
                f"{name}/standard_error": score.standard_error,
                f"{name}/images": score.images,
            }
    return values | {
        tracking.STEP: config.steps,
        tracking.SECONDS: result.seconds,
        "cpu_seconds": result.cpu_seconds,
        "data": dataset.origin,
        "skipped": dataset.skipped,
    }


@dataclass
class _Caught:
    """The signal that came, if one did."""

    number: int = 0


@contextmanager
def _signals() -> Iterator[_Caught]:
    """SIGTERM and Ctrl-C only set a flag, which the loop reads between two steps."""
    caught = _Caught()

    def note(number: int, frame: object) -> None:
        caught.number = number

    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread, which alone may do this
        pass
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _events(
    state: State,
    stream: Iterator[Batch],
    dataset: data.Dataset,
    config: TrainConfig,
    caught: _Caught,
    save: Callable[[], None],
) -> Iterator[dict[str, Any]]:
    """Run the steps; yield readings of the loss, and of the curve's split, when they are due.

    Training loss and accuracy are means over the images since the last reading.
    """
    since, seen = time.perf_counter(), 0
    quiet = not (sys.stderr.isatty() and state.part.first)
    with tqdm(total=config.steps, initial=state.steps_done, unit="step", disable=quiet) as bar:
        while state.steps_done < config.steps:
            batch = next(stream)
            metrics = step(state, batch, config)
            done = state.steps_done
            bar.update()
            seen += len(batch[0]) * state.part.ranks
            last = done == config.steps
            if done % config.log_every == 0 or last:
                check_or_save(state, save)
                rate = seen / (time.perf_counter() - since)
                event = reading(state, metrics["gradient_norm"], config) | {
                    tracking.IMAGES_PER_S: rate
                }
                bar.set_postfix_str(_words(event), refresh=False)
                yield event
                since, seen = time.perf_counter(), 0
            if done % config.eval_every == 0 or last:
                yield curve_reading(state, dataset, config)
                since, seen = time.perf_counter(), 0
            stop = parallel.any_of(bool(caught.number), state.part)
            kept = config.keep_every and done % config.keep_every == 0
            if done % config.save_every == 0 or kept or last or stop:
                check_or_save(state, save, due=True)
            if stop and not last:
                raise Stopped(caught.number or signal.SIGTERM)


def reading(state: State, norm: Tensor, config: TrainConfig) -> dict[str, Any]:
    """Mean training loss and accuracy since the last reading, and the last step's numbers.

    This waits for the device.
    """
    loss, accuracy, images = parallel.total(state.sums.clone(), state.part).tolist()
    state.sums.zero_()
    return {
        tracking.STEP: state.steps_done,
        tracking.TRAIN_LOSS: loss / images,
        tracking.TRAIN_ACCURACY: accuracy / images,
        tracking.GRADIENT_NORM: norm.item(),
        tracking.LEARNING_RATE: optim.learning_rate(
            config.optim, state.steps_done - 1, config.steps
        ),
    }


def curve_reading(state: State, dataset: data.Dataset, config: TrainConfig) -> dict[str, Any]:
    """Loss and accuracy of the curve's split now."""
    split = getattr(dataset, config.curve)
    logits, target, _ = evaluate.predict(state.result, dataset, split, part=state.part)
    found = evaluate.score(logits, target)
    return {
        tracking.STEP: state.steps_done,
        f"{config.curve}/loss": found.loss,
        f"{config.curve}/accuracy": found.accuracy,
    }


def _words(event: dict[str, Any]) -> str:
    """A reading for people."""
    split = next(iter(key for key in event if "/" in key)).partition("/")[0]
    rate = event.get(tracking.IMAGES_PER_S)
    return (
        f"{split} loss {event[f'{split}/loss']:.3f}, accuracy {event[f'{split}/accuracy']:.1%}"
        + (f", {rate:,.0f} images/s" if rate else "")
    )


def _line(
    event: dict[str, Any], config: TrainConfig, first: tuple[int, float], clock: Clock
) -> str:
    """A reading where there is no terminal; `first` is the step and second that this start had."""
    done = event[tracking.STEP]
    left = (clock.read()[0] - first[1]) / max(done - first[0], 1) * (config.steps - done)
    return f"step {done:,} of {config.steps:,}: {_words(event)}, {left / 60:.1f} min left"


def check_or_save(state: State, save: Callable[[], None], *, due: bool = False) -> None:
    """Raise Diverged with the last good weights on disk; if all is well, save where it is due."""
    try:
        check(state)
    except Diverged:
        save()
        raise
    if due:
        save()
