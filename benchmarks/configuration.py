"""One configuration of the throughput benchmark: what it is, and how it is measured.

`timed` starts a process for it, within limits of time and memory. That process makes and checks the
models, has others time them, and measures the machine's peak before and after.
"""

import hashlib
import json
import math
import os
import pickle
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.kinds import CHECKED
from benchmarks.peers import Model
from benchmarks.report.entries import AUTO
from vitx.files import write_whole
from vitx.measure import jobs, machine, peak, tasks, timing, worker
from vitx.measure.compare import compare, equality, speed
from vitx.measure.comparison import Comparison, Side, Utilisation
from vitx.measure.equality import Equality, Unmatched
from vitx.measure.subjects import as_timed
from vitx.measure.timing import TimingConfig
from vitx.model.cost import forward_macs, step_macs
from vitx.registry import UserError
from vitx.training.evaluate import evaluating

AUTO_MOST = 4096
"""Largest batch that --batch auto tries."""
CONFIGURATION, MEASURED = "configuration.pkl", "measured.pkl"
"""Files by which a process is told its configuration, and tells what it has measured."""


@dataclass(frozen=True)
class Configuration:
    """One combination of a model with the settings of its timing."""

    model: str
    reference: str
    batch: int
    """0 for the one with most images per second."""
    config: TimingConfig
    device: str
    unchecked: bool = False

    def __str__(self) -> str:
        batch = f"batch {self.batch}" if self.batch else "best batch"
        config = self.config
        return f"{self.model}, {config.mode}, {batch}, {config.dtype}, compile {config.compile}"

    @property
    def key(self) -> str:
        """What a result is found again by."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a configuration's process has measured."""

    comparison: Comparison
    image: tuple[int, ...] = ()
    batches_tried: dict[str, float | str]
    checked: str = ""


def timed(configuration: Configuration, folder: Path) -> dict[str, Any]:
    """The fields of a `Throughput`: one configuration, measured in a process of its own."""
    jobs.private_folder(folder)
    values = measured_in_process(configuration, folder)
    return vars(values) | {
        "configuration": configuration.key,
        "candidate": configuration.model,
        "reference": configuration.reference,
        "device": configuration.device,
        "batch_asked": str(configuration.batch or AUTO),
        "protocol": timing.PROTOCOL,
    }


def measured_in_process(configuration: Configuration, folder: Path) -> Measured:
    """What its process has measured; a failed comparison with the reason where it has not."""
    path, config = folder / MEASURED, configuration.config
    path.unlink(missing_ok=True)
    (folder / CONFIGURATION).write_bytes(pickle.dumps(configuration))
    command = [sys.executable, "-m", "benchmarks.throughput", "--child", str(folder)]
    # Its own processes have the limit each, and so has what it does by itself.
    processes = config.processes + 8
    processes += 0 if configuration.batch else int(math.log2(AUTO_MOST)) + 1
    # While it looks for the best batch, its processes find the limit of memory, not itself.
    limit_gib = config.limit_gib if configuration.batch else 0.0
    status, words = worker.run_limited(
        command, os.environ, limit_s=config.limit_s * processes, limit_gib=limit_gib
    )
    if status == -signal.SIGALRM:
        words = f"to make, check or measure the models took longer than {config.limit_s:g} s"
    if not path.exists():
        return Measured(comparison=untimed(configuration, "failed", words), batches_tried={})
    measured: Measured = pickle.loads(path.read_bytes())  # from that private folder
    comparison = measured.comparison
    if status and not comparison.untimed and comparison.candidate.utilisation is None:
        reason = "; ".join(filter(None, (comparison.reason, f"no utilisation: {words}")))
        return replace(measured, comparison=replace(comparison, reason=reason))
    return measured


def untimed(configuration: Configuration, verdict: str, reason: str, **values: Any) -> Comparison:
    """A comparison without times, and why."""
    config = configuration.config
    known = {"batch": configuration.batch, "dtype": config.dtype, "device": configuration.device}
    return Comparison(config=config, verdict=verdict, reason=reason, **known | values)


def child(folder: Path) -> None:
    """Measure the configuration in the folder, in this process and those that it starts."""
    configuration = pickle.loads((folder / CONFIGURATION).read_bytes())
    for measured in measure(configuration, folder):
        write_whole(folder / MEASURED, pickle.dumps(measured))


def measure(configuration: Configuration, folder: Path) -> Iterator[Measured]:
    """What there is to say of a configuration.

    Of a model that was timed it comes twice, first without utilisation, so that a failure to
    measure the peak after it loses no times.
    """
    device, config = torch.device(configuration.device), configuration.config
    with within(config.limit_s):
        reference, candidate = make_models(configuration, device)
    batch, tried = configuration.batch, {}
    if not batch:
        config = replace(config, limit_gib=room_gib(config))
        batch, tried = best_batch(reference, candidate, config, folder, device)
    example = _images(candidate, batch, device)
    models = [model for model in (reference, candidate) if model is not None]
    with within(config.limit_s):
        checked, why = check(reference, candidate, example[:2], unchecked=configuration.unchecked)
        if not checked:  # else both were looked at
            for model in models:
                finite(model, example[:2], config)
    if checked and not checked.passed:
        comparison = untimed(
            configuration, "not equal", checked.reason, batch=batch, equality=checked
        )
        yield Measured(comparison=comparison, image=candidate.image, batches_tried=tried)
        return
    with within(config.limit_s):
        works = {model.name: _work(model, example, config) for model in models}
        shapes = dict.fromkeys(shape for w in works.values() if w for shape in w.products)
        before = peak.peak(getattr(torch, config.dtype), device, list(shapes))
    _leave_memory(device)
    comparison = _compared(reference, candidate, example, config, checked, folder)
    measured = Measured(
        comparison=comparison,
        image=candidate.image,
        batches_tried=tried,
        checked=CHECKED if checked else f"not checked: {why}",
    )
    yield measured
    if comparison.untimed:
        return
    with within(config.limit_s):
        after = peak.peak(getattr(torch, config.dtype), device, list(shapes))
    yield replace(measured, comparison=with_utilisation(comparison, works, models, before, after))


def make_models(configuration: Configuration, device: torch.device) -> tuple[Model | None, Model]:
    """The reference, if there is one, and the candidate; ValueError if their images differ."""
    candidate = peers.make(configuration.model, device)
    reference = peers.make(configuration.reference, device) if configuration.reference else None
    if reference and reference.image != candidate.image:
        raise UserError(
            f"{candidate.name} takes images of {candidate.image}, {reference.name} of "
            f"{reference.image}"
        )
    return reference, candidate


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """End this process by SIGALRM if the block takes longer, also where no Python code runs."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _compared(
    reference: Model | None,
    candidate: Model,
    example: Tensor,
    config: TimingConfig,
    checked: Equality | None,
    folder: Path,
) -> Comparison:
    """The timing, with the parameters of each side."""
    places: dict[str, Any] = {"folder": folder, "cache": folder / "cache", "config": config}
    if reference is None or checked is None:
        module = reference.module if reference else None
        comparison = speed(module, candidate.module, example, **places)
    else:
        keys = peers.conversion(reference, candidate)
        comparison = compare(
            reference.module, candidate.module, example, checked=checked, keys=keys, **places
        )
    sides = {"candidate": replace(comparison.candidate, parameters=_parameters(candidate))}
    if reference and comparison.reference:
        sides["reference"] = replace(comparison.reference, parameters=_parameters(reference))
    return replace(comparison, **sides)


def check(
    reference: Model | None, candidate: Model, image: Tensor, *, unchecked: bool = False
) -> tuple[Equality | None, str]:
    """Whether both compute the same, or why that is not known. Raises what `equality` does."""
    if reference is None:
        return None, "no reference"
    if unchecked:
        return None, "it is meant to compute something else"
    keys = peers.conversion(reference, candidate)
    if keys is None:
        return None, "the weights of one can't become those of the other"
    try:
        return equality(reference.module, candidate.module, image, keys=keys), ""
    except Unmatched as error:
        return None, str(error)


def finite(model: Model, image: Tensor, config: TimingConfig) -> None:
    """ValueError naming a model whose outputs, in the dtype that its inference is timed in, are not
    finite, if they are tensors."""
    module, example = as_timed(deepcopy(model.module), image, config)
    with evaluating(module), torch.inference_mode():
        output = module(example)
    if isinstance(output, Tensor) and not output.isfinite().all():
        raise UserError(f"{model.name} gives outputs that are not finite")


def room_gib(config: TimingConfig) -> float:
    """GiB that each process which looks for a batch, and then times it, may take: what this process
    leaves of `config.limit_gib`. Raises ValueError where that is nothing."""
    own = machine.tree_mib(os.getpid()) / 2**10
    if config.limit_gib <= own:
        raise UserError(f"limit_gib = {config.limit_gib:g} is less than the {own:.1f} before it")
    return config.limit_gib - own


def best_batch(
    reference: Model | None,
    candidate: Model,
    config: TimingConfig,
    folder: Path,
    device: torch.device,
) -> tuple[int, dict[str, float | str]]:
    """The batch with most images per second; the rates of all that were tried, and why no more.

    Chosen by a few calls of the candidate in other processes, which hold what a pair does, up to
    what fits; the configuration is timed afterwards. Raises ValueError if not even one image fits.
    """
    tried: dict[str, float | str] = {}
    rates: dict[int, float] = {}
    other = reference.module if reference else None
    batch = 1
    with worker.Workers() as workers:
        while batch <= AUTO_MOST:
            example = _images(candidate, batch, device)
            try:
                job = jobs.write(folder / "probe", config, other, candidate.module, example, None)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise UserError(
                    f"batch = '{AUTO}' needs models that can be pickled: {error}"
                ) from None
            del example
            _leave_memory(device)
            try:
                rates[batch] = workers.run(job, folder / "cache", tasks.probe, 0)
            except worker.TaskFailed as error:
                tried[str(batch)] = str(error)
                break
            tried[str(batch)] = rates[batch]
            batch *= 2
    if not rates:
        raise UserError(f"not one image can be timed: {tried['1']}")
    return max(rates, key=lambda each: rates[each]), tried


def _leave_memory(device: torch.device) -> None:
    """Give back what this process keeps of a device's memory, which the timed ones need."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def _images(model: Model, batch: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *model.image, generator=generator).to(device)


def _parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.module.parameters())


@dataclass(frozen=True)
class Work:
    """What an iteration is made of."""

    flops: int
    """Of one image: forward, in training backward too."""
    products: list[peak.Shape]
    bytes: float | None
    """Read and written by the operations of a call, for one image; None of a training step."""


def _work(model: Model, example: Tensor, config: TimingConfig) -> Work | None:
    """What is counted on `meta`; None for a module that needs values, which `meta` has not."""
    training = config.mode == "training"
    try:
        if training:  # of two images, which batch norm needs
            macs = step_macs(model.module, example[:1].repeat(2, 1, 1, 1)) // 2
        else:
            macs = forward_macs(model.module, example[:1])
        call = peak.work(model.module, example, getattr(torch, config.dtype))
    except RuntimeError:
        return None
    return Work(2 * macs, call.products, None if training else call.bytes / len(example))


def with_utilisation(
    comparison: Comparison,
    works: dict[str, Work | None],
    models: list[Model],
    before: peak.Peak,
    after: peak.Peak,
) -> Comparison:
    """The comparison with each side's work per second beside the machine's peak; failed where more
    work than the machine can do was counted."""
    names = ("reference", "candidate") if len(models) == 2 else ("candidate",)
    sides: dict[str, Side] = {}
    for name, model in zip(names, models, strict=True):
        side: Side = getattr(comparison, name)
        if (work := works[model.name]) and side.rate:
            used = _utilisation(work, side.rate.median, comparison, before, after)
            sides[name] = replace(side, utilisation=used)
    wrong = [name for name, side in sides.items()
             if side.utilisation and side.utilisation.why == peak.ABOVE_PEAK]  # fmt: skip
    comparison = replace(comparison, **sides)
    if not wrong:
        return comparison
    reason = f"{', '.join(wrong)}: more work a second than the machine can do was counted"
    return replace(comparison, verdict="failed", reason=reason)


def _utilisation(
    work: Work, images_per_s: float, comparison: Comparison, before: peak.Peak, after: peak.Peak
) -> Utilisation:
    """The work per second at a rate; in inference also what is read and written per second, if
    every operation does by itself."""
    device = torch.device(comparison.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return replace(
        peak.utilisation(work.flops * images_per_s, before, after),
        data_sheet=peak.data_sheet(gpu, getattr(torch, comparison.dtype)),
        bytes=None if work.bytes is None else work.bytes * images_per_s,
    )
