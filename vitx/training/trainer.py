"""The loop: it trains a state to its last step, logs, evaluates, saves and stops."""

import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from vitx import data
from vitx.data.loader import Batch
from vitx.data.sources import Images
from vitx.interop import weights
from vitx.registry import UserError
from vitx.settings import flat
from vitx.training import checkpoint, evaluate, optim, parallel, tracking
from vitx.training.config import TrainConfig
from vitx.training.prepare import Training, share_skipped
from vitx.training.state import Diverged, State, check, pack, step
from vitx.training.tracking import Event


class Stopped(SystemExit):
    """A signal came; the state was saved. Ends the program as the signal would, unless caught."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}; the state is saved")
        self.code = 128 + number


@dataclass(frozen=True)
class Result:
    """A finished run: no evaluation chose anything, and the test split was read at the end."""

    val: evaluate.Score
    test: evaluate.Score
    test_logits: Tensor
    test_target: Tensor
    curve: list[Event]
    seconds: float
    """From the start of reading the data, evaluations included, over all resumptions."""
    cpu_seconds: float
    """Of all threads and of the workers that have ended, those of a start that was stopped left
    out; of several trainers those of the first."""


def train(
    training: Training, run: tracking.Run | None = None, *, folder: Path | None = None
) -> Result:
    """Train to `config.steps`; the weights of the last step, or their average, are the result.

    `run` receives every event, in the first process only. `folder` keeps checkpoints. Raises
    Diverged when a loss or gradient was not finite and Stopped on SIGTERM, SIGHUP, Ctrl-C or a
    closed output, each after saving.
    """
    config, dataset, state = training.config, training.dataset, training.state
    if run is not None:
        run.rewind(state.steps_done)
    if folder is not None and state.part.first:
        checkpoint.set_aside(folder)
    curve = [] if run is None else run.events(tracking.VAL_ACCURACY, tracking.TEST_ACCURACY)
    with (
        closing(batches(config, dataset, state)) as stream,
        closing(Progress(training, run)) as progress,
        _signals() as received,
    ):
        try:
            while state.steps_done < config.steps:
                batch = next(stream)
                gradient_norm = step(state, batch, config)["gradient_norm"]
                progress.count(len(batch[0]) * state.part.ranks)
                if due(config.log_every, training):
                    check(state)
                    rate = progress.images_per_s
                    event = training_metrics(training, gradient_norm)
                    progress.log(event | {tracking.IMAGES_PER_S: rate})
                if due(config.eval_every, training):
                    curve.append(evaluation(training))
                    progress.log(curve[-1])
                if progress.closed:
                    received.append(signal.SIGPIPE)
                stop = parallel.any_of(bool(received), state.part)
                if stop or any(due(n, training) for n in (config.save_every, config.keep_every)):
                    check(state)
                    save(training, folder)
                if stop and state.steps_done < config.steps:
                    raise Stopped(received[-1] if received else signal.SIGTERM)
        except Diverged:  # with the last good weights on the disk
            save(training, folder)
            raise
    result = finish(training, curve)
    if run is not None:
        keep(run, training, result)
    return result


def due(every: int, training: Training) -> bool:
    """Whether what comes with every so many steps, 0 for never, and with the last is due now."""
    done = training.state.steps_done
    return done == training.config.steps or (every > 0 and done % every == 0)


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


def training_metrics(training: Training, gradient_norm: Tensor) -> Event:
    """Mean training loss and accuracy since the last logging step, the last step's numbers, and
    the means of what was reported.

    This waits for the device. Raises ValueError for a reported name that the trainer logs itself.
    """
    config, state = training.config, training.state
    loss, accuracy, images = parallel.total(state.sums.clone(), state.part).tolist()
    state.sums.zero_()
    reported = parallel.reported_means(state.reported, state.part)
    for name in reported:
        if name in tracking.METRICS:
            raise UserError(f"metric = {name!r} is logged by the trainer itself; choose another")
    return {
        tracking.STEP: state.steps_done,
        tracking.TRAIN_LOSS: loss / images,
        tracking.TRAIN_ACCURACY: accuracy / images,
        tracking.GRADIENT_NORM: gradient_norm.item(),
        tracking.LEARNING_RATE: optim.learning_rate(
            config.optim, state.steps_done - 1, config.steps
        ),
    } | reported


def evaluation(training: Training) -> Event:
    """Loss and accuracy of the curve's split now."""
    name = training.config.curve
    split = getattr(training.dataset, name)
    score, _, _ = scored(training, split)
    values = {f"{name}/loss": score.loss, f"{name}/accuracy": score.accuracy}
    return {tracking.STEP: training.state.steps_done, **values}


def scored(training: Training, split: Images) -> tuple[evaluate.Score, Tensor, Tensor]:
    """The score of a split now, its logits and its class numbers.

    Batches are those that the training's memory holds. Raises Diverged for outputs that are not
    finite.
    """
    state, batch = training.state, min(training.config.batch, evaluate.BATCH)
    logits, target, _ = evaluate.predict(
        state.result, training.dataset, split, batch=batch, part=state.part
    )
    try:
        return evaluate.score(logits, target), logits, target
    except evaluate.NotFinite as error:
        raise Diverged(f"{error} after step {state.steps_done}") from None


def save(training: Training, folder: Path | None) -> None:
    """Write a checkpoint, and the weights where they are to stay. All processes call this
    together, and the first one writes."""
    if folder is None:
        return
    config, state = training.config, training.state
    share_skipped(training)
    packed = pack(state)
    if not state.part.first:
        return
    # Weights of a step that is to be kept come first: a run goes on after its checkpoint.
    if config.keep_every and state.steps_done % config.keep_every == 0 and packed["bad_step"] < 0:
        path = folder / f"model-{state.steps_done}.safetensors"
        weights.save(state.result, path, training.description)
    checkpoint.save(
        folder,
        {
            "state": packed,
            "config": flat(config),
            "data": training.fingerprint,
            "skipped": list(training.dataset.skipped),
            "seconds": list(training.clock.read()),
        },
    )


def finish(training: Training, curve: list[Event]) -> Result:
    """Score the finished state on validation, and once on the test split."""
    dataset = training.dataset
    val, _, _ = scored(training, dataset.val)
    test, logits, target = scored(training, dataset.test)
    share_skipped(training)
    return Result(val, test, logits, target, curve, *training.clock.read())


def keep(run: tracking.Run, training: Training, result: Result, **more: object) -> None:
    """Write the weights and the final values, with `more` of them, into the run folder.

    The values stand by metric name; of a split without images there are none.
    """
    weights.save(training.state.result, run.folder / weights.FILE, training.description)
    values = dict(more)
    for name, score in (("val", result.val), ("test", result.test)):
        if score.images:
            values |= {
                f"{name}/loss": score.loss,
                f"{name}/accuracy": score.accuracy,
                f"{name}/standard_error": score.standard_error,
                f"{name}/images": score.images,
            }
    values |= {
        tracking.STEP: training.config.steps,
        tracking.SECONDS: result.seconds,
        "cpu_seconds": result.cpu_seconds,
        "data": training.dataset.origin,
        "skipped": training.dataset.skipped,
        "left_out": list(training.dataset.notes),
        "fingerprint": training.fingerprint,
    }
    run.summarise(values)  # last, as it says that the run has ended


class Progress:
    """What a run shows: a bar on a terminal, else a printed line per event. Close it at the end."""

    def __init__(self, training: Training, run: tracking.Run | None):
        self.run, self.clock, self.steps = run, training.clock, training.config.steps
        self.first_step, self.first_s = training.state.steps_done, training.clock.read()[0]
        self.bar = tqdm(
            total=self.steps,
            initial=self.first_step,
            unit="step",
            disable=not (sys.stderr.isatty() and training.state.part.first),
        )
        self.closed = False
        self._since, self._images = time.perf_counter(), 0

    def count(self, images: int) -> None:
        """One more step, of so many images over all processes."""
        self.bar.update()
        self._images += images

    @property
    def images_per_s(self) -> float:
        """Since the last event."""
        return self._images / (time.perf_counter() - self._since)

    def log(self, event: Event) -> None:
        """Keep an event in the run, and show it."""
        if tracking.TRAIN_LOSS in event:
            self.bar.set_postfix_str(_words(event), refresh=False)
        if self.run is not None:
            self.run.log(event)
            if not sys.stderr.isatty():  # else the bar shows it
                self._print(self._line(event))
        self._since, self._images = time.perf_counter(), 0

    def _print(self, line: str) -> None:
        try:
            print(line, flush=True)
        except OSError:  # whoever read it has gone: the loop saves and stops
            self.closed = True

    def _line(self, event: Event) -> str:
        done, seconds = int(event[tracking.STEP]), self.clock.read()[0] - self.first_s
        left = seconds / max(done - self.first_step, 1) * (self.steps - done)
        return f"step {done:,} of {self.steps:,}: {_words(event)}, {left / 60:.1f} min left"

    def close(self) -> None:
        self.bar.close()


def _words(event: Event) -> str:
    """An event for people."""
    split = next(key for key in event if "/" in key).partition("/")[0]
    words = [f"{split} loss {event[f'{split}/loss']:.3f}"]
    words += [f"accuracy {event[f'{split}/accuracy']:.1%}"]
    words += [
        f"{name} {value:.4g}" for name, value in event.items() if name not in tracking.METRICS
    ]
    if rate := event.get(tracking.IMAGES_PER_S):
        words += [f"{rate:,.0f} images/s"]
    return ", ".join(words)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of signals that came, which the loop reads between two steps.

    They are SIGTERM, Ctrl-C, and SIGHUP of a terminal that is closed, unless `nohup` ignores it.
    """
    received: list[int] = []
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():  # which alone may do this
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                before[number] = signal.signal(number, lambda came, _: received.append(came))
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
