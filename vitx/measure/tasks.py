"""What worker processes do for a comparison: `pair`, `probe`, `alone` and `details`."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from vitx.measure import breakdown, subjects
from vitx.measure.comparison import Side
from vitx.measure.equality import timed_error
from vitx.measure.jobs import Job
from vitx.measure.machine import keep_memory, peak_mib
from vitx.measure.subjects import Subject, as_timed, make_arm, prepare, step_config
from vitx.measure.timing import ARMS, Arm, PairTimes, TimingConfig, iterations_of, warm_up
from vitx.training import state as training


def pair(job: Job, number: int) -> PairTimes:
    """The reference, the same reference again and the candidate; or the candidate alone."""
    times = subjects.pair(*_arms(job, number), job.config, number)
    return replace(times, forked=job.forked)


def probe(job: Job, number: int) -> float:
    """The candidate's images per second in a few calls, all arms in memory."""
    return subjects.probe(*_arms(job, number), job.config)


def _arms(job: Job, number: int) -> tuple[dict[str, Subject], Tensor]:
    """A subject per arm, and the example. Which is made first changes from process to process."""
    if job.config.keep_memory:
        keep_memory()
    example = job.start()
    arms = ARMS if len(job.sides) == 2 else ("candidate",)
    order = random.Random(number).sample(arms, len(arms))
    sides = {arm: "candidate" if arm == "candidate" else "reference" for arm in order}
    return {arm: job.load(side) for arm, side in sides.items()}, example


def alone(job: Job, name: str, *, error: bool = False) -> tuple[Side, float]:
    """One side by itself: memory, if asked for its error as timed, and its compile seconds.

    `peak_mib` is that of the process above what it had before; on a GPU the peak of the device's
    allocator, beside `host_mib` of the process. Compiling takes memory too, and is counted.
    """
    job.start()  # whose example would lie beside the one in the timed dtype on a GPU
    job.import_all()  # so that each side carries the same imports
    before_mib = peak_mib()
    subject, image = as_timed(job.load(name), job.load("example"), job.config)
    run = prepare(subject, job.config) if error else None
    arm = make_arm(subject, image, job.config, run)
    if image.is_cuda:
        torch.cuda.reset_peak_memory_stats(image.device)
    first = arm.block(1)
    later = sorted(arm.block(1) for _ in range(3))[1]
    side = Side(peak_mib=peak_mib() - before_mib)
    if image.is_cuda:
        device_mib = torch.cuda.max_memory_allocated(image.device) / 2**20
        side = Side(peak_mib=device_mib, host_mib=side.peak_mib)
    if job.config.mean:  # as its process is set up by default, which is how timm's benchmark runs
        side |= Side(mean_images_per_s=arm.images / breakdown.mean_of_calls(arm.block))
    if run is not None:
        side |= Side(timed_error=_timed_error(job, name, subject, image, run))
    return side, max(first - later, 0.0)


def _timed_error(
    job: Job, name: str, subject: nn.Module, image: Tensor, run: Callable[[Tensor], Tensor]
) -> float:
    return timed_error(
        job.load("reference"),
        subject,
        image,
        training=job.config.mode == "training",
        run=partial(_as_stepped, run, job.config),
        keys=job.load("keys") if name == "candidate" else None,
    )


def _as_stepped(run: Callable[[Tensor], Tensor], config: TimingConfig, image: Tensor) -> Tensor:
    """A module's output as the timed call or step computes it."""
    if config.mode == "inference" or config.dtype == "as given":
        return run(image)
    with training.autocast(image.device, config.dtype):
        return run(image)


def details(job: Job, name: str) -> Side:
    """Where a module's time goes, as far as this configuration lets it be told."""
    if job.config.keep_memory:
        keep_memory()
    config = job.config
    subject, example = as_timed(job.load(name), job.start(), config)
    side = Side()
    if config.mode == "inference" and len(example) == 1:
        arm = make_arm(subject, example, config)
        warm_up({name: arm}, config)
        side |= Side(latency=breakdown.latency(arm.block, config.pair_s))
    if config.compile != "none":  # whose parts are one
        return side | Side(saved=_saved(job, name, subject, example))
    if config.mode == "training":
        return side | Side(
            phases=breakdown.phases(subject, example, step_config(len(example), config))
        )
    try:
        return side | Side(stages=breakdown.stages(subject, example))
    except breakdown.Unknown:
        return side


def _saved(job: Job, name: str, subject: Subject, example: Tensor) -> breakdown.Saved:
    config = job.config
    other, _ = as_timed(job.load(name), example, config)  # a training step changes it
    arms: dict[str, Arm] = {
        "eager": make_arm(other, example, replace(config, compile="none")),
        "compiled": make_arm(subject, example, config),
    }
    iterations = iterations_of(warm_up(arms, config).seconds_each, config.block_s)
    return breakdown.saved(arms, iterations, config.pair_s)
