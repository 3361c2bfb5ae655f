"""Throughput and latency of models, over batches, precisions and compile modes, each with its cost.

`python -m benchmarks.throughput --models vitx:S/16 hf:S/16 --reference timm:vit_small_patch16_224`
times every combination of what is given, each in processes of its own within limits of time and
memory. One that fails is a row that says so; the others go on, and --resume makes what is missing.
With a reference every model is timed in pairs with it, after both were checked equal where the
weights of one can become those of the other.
"""

import hashlib
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from experiments.study.rows import Rows
from torch import Tensor

from benchmarks import peers
from benchmarks.peers import Model
from benchmarks.report import charts, matrix
from benchmarks.report.matrix import AUTO, CHECKED
from benchmarks.speed import usual, warm_up_s
from experiments import cli
from experiments.study.pages import Row
from vitx.files import read_json, write_json
from vitx.measure import machine, peak, timing, worker
from vitx.measure.compare import Comparison, compare, equality, speed
from vitx.measure.equality import Equality, Unmatched
from vitx.measure.timing import TimingConfig
from vitx.model.cost import forward_macs, step_macs
from vitx.registry import choose
from vitx.training import parallel, provenance, tracking
from vitx.training.evaluate import evaluating

AUTO_MOST = 4096
"""Largest batch that --batch auto tries."""
MOST_MEMORY = 0.8
"""Share of the machine's memory that a configuration may take if nothing is said."""
NOT_CHECKED = "not checked"
MOST_SECONDS = 1e6
"""Of the limit of a process; the system's timers take no more than some years."""
GROUP = "throughput"
PROG = "python -m benchmarks.throughput"


@dataclass(frozen=True)
class Settings:
    """Time models by themselves, or in pairs with a reference."""

    models: tuple[str, ...] = ()
    """vitx:S/16, vitx:TIMM_NAME, timm:NAME, torchvision:S/16, torchvision:NAME, hf:S/16, hf:FOLDER,
    vit_pytorch:S/16, or python:FILE:FUNCTION, which gives a module; vitx:Ti/16 if none is named, on
    a GPU B/16."""
    reference: str = ""
    """A model that all others are timed in pairs with."""
    unchecked: bool = False
    """The models are meant to compute something else than the reference, with weights of the same
    names: their outputs are not compared, and their ratios get no verdict."""
    batch: tuple[str, ...] = ("8",)
    """Images of a batch; auto for the one with most images/s of the model, not of the reference."""
    dtype: tuple[str, ...] = ()
    """float32 if none is named, on a GPU bfloat16."""
    compile: tuple[str, ...] = ("none",)
    mode: tuple[str, ...] = ("inference",)
    processes: int = 10
    seconds: float = 6.0
    """How long blocks are timed in a process after the warm-up: in pairs at least six of each
    model, of a model alone at least one."""
    limit_s: float = 900.0
    """A process that takes longer is ended, and its configuration is a failure; so it is if making
    and checking the models takes longer."""
    limit_gib: float = 0.0
    """Memory of the machine, not of a GPU, that a configuration may take with all its processes; 0
    for 80 % of what there is. With --batch auto its own process has no limit."""
    mean: bool = False
    """Also read rates as timm's benchmark does: the mean of 40 calls of one process."""
    resume: bool = False
    """Go on with the newest run of the same settings; what has a row, failed or not, is left."""
    out: Path = tracking.OUT
    """Folder of run folders."""
    wandb: str = ""
    """W&B mode: online, offline or disabled; empty for WANDB_MODE, else offline."""
    device: str = ""
    """Device; empty for the accelerator of this machine, else the CPU."""


@dataclass(frozen=True)
class Configuration:
    """One cell of the matrix."""

    model: str
    reference: str
    batch: int
    """0 for the one with most images/s."""
    plan: TimingConfig
    device: str
    unchecked: bool = False

    def __str__(self) -> str:
        batch = f"batch {self.batch}" if self.batch else "best batch"
        plan = self.plan
        return f"{self.model}, {plan.mode}, {batch}, {plan.dtype}, compile {plan.compile}"

    @property
    def key(self) -> str:
        """What a row is found again by."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def main(args: list[str]) -> None:
    """Check what was asked for, time what has no row yet, print and keep it."""
    settings = cli.parse(Settings, args, prog=PROG)
    model, dtype = usual(parallel.device(settings.device))
    settings = replace(
        settings, models=settings.models or (f"vitx:{model}",), dtype=settings.dtype or (dtype,)
    )
    asked = configurations(settings)
    values = {name: _plain(value) for name, value in vars(settings).items()}
    values["versions"] = versions([*settings.models, settings.reference])
    name = _label(settings)
    group = settings.out / tracking.group_of(GROUP)
    folder = _newest(group, values) if settings.resume else None
    with tracking.Run(
        settings.out, GROUP, name, values, mode=settings.wandb or None, folder=folder
    ) as run:
        rows = Rows(run.folder)
        done = {row["configuration"] for row in rows.kept}
        for number, configuration in enumerate(asked, 1):
            if configuration.key in done:
                continue
            print(f"[{number} of {len(asked)}] {configuration} …", flush=True)
            kind, fields = timed(configuration, run.folder / "work")
            row = rows.add(kind, **fields)
            run.log({tracking.ROW: len(rows.kept), **_numbers(row)})
            print(f"  {line(row)}", flush=True)
        shutil.rmtree(run.folder / "work", ignore_errors=True)
        run.summarise(_summary(rows.kept))
        show(rows.kept, run)
        print(f"rows: {rows.path}\n{run.where}")


def versions(names: Sequence[str]) -> dict[str, Any]:
    """What rows of these models depend on beside the settings: declared versions, those of
    packages, and the files of a person's own models."""
    # What a person's file imports may stand beside it; so may what is no Python of today.
    own = sorted(
        {
            path
            for name in names if name.startswith("python:")
            for path in Path(name.split(":")[1]).parent.glob("*.py") if path.is_file()
        }
    )  # fmt: skip
    files = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in own))
    environment = provenance.environment()
    return {
        "protocol": timing.PROTOCOL,
        "version": environment["version"],
        "packages": environment["versions"],
        "files": files.hexdigest()[:16],
    }


def show(rows: Sequence[Row], run: tracking.Run) -> None:
    """Tables and figures of the rows into the run's folder and W&B."""
    shown = matrix.throughput_table(rows)
    run.table("throughput", shown.header, shown.body)
    for path in charts.write(rows, run.figures, pictures=".png"):
        if path.suffix == ".png":
            run.figure(path.stem, path)


def configurations(settings: Settings) -> list[Configuration]:
    """Every combination; ValueError for a value that can't be."""
    device = parallel.device(settings.device)
    for name in filter(None, (*settings.models, settings.reference)):
        peers.check(name)
    for dtype in settings.dtype:
        choose("dtype", dtype, timing.DTYPES[1:])
        _check_dtype(dtype, device)
    for name in ("batch", "mode", "compile"):
        if not getattr(settings, name):
            raise ValueError(f"{name} names nothing to time")
    cli.goes_with(settings, unchecked="reference")
    if not settings.limit_s < MOST_SECONDS:
        raise ValueError(f"limit_s = {settings.limit_s:g} must be less than {MOST_SECONDS:,.0f}")
    if not 0 < settings.seconds < math.inf:
        raise ValueError(f"seconds = {settings.seconds} must be positive and finite")
    batches = [_batch(word) for word in settings.batch]
    plan = TimingConfig(
        processes=settings.processes,
        pair_s=settings.seconds,
        warm_up_s=warm_up_s(device),
        limit_s=settings.limit_s,
        limit_gib=settings.limit_gib or round(MOST_MEMORY * machine.memory_gib(), 1),
        details=True,
        mean=settings.mean,
    )
    names = [name for name in dict.fromkeys(settings.models) if name != settings.reference]
    if not names:
        raise ValueError("models names no other model than the reference")
    each = (settings.mode, batches, settings.dtype, settings.compile)
    product = itertools.product(names, *(dict.fromkeys(values) for values in each))
    return [
        Configuration(name, settings.reference, batch,
                      replace(plan, mode=mode, dtype=dtype, compile=compiled), str(device),
                      settings.unchecked)
        for name, mode, batch, dtype, compiled in product
    ]  # fmt: skip


def _batch(word: str) -> int:
    if word == AUTO:
        return 0
    if not word.isdecimal() or int(word) < 1:
        raise ValueError(f"batch = {word!r} must be a whole number, at least 1, or {AUTO}")
    return int(word)


def _check_dtype(dtype: str, device: torch.device) -> None:
    asked = device.type == "cuda" and dtype == "bfloat16"
    if asked and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"dtype = {dtype!r}: {torch.cuda.get_device_name(device)} has no bfloat16")


def timed(configuration: Configuration, folder: Path) -> tuple[str, dict[str, Any]]:
    """One configuration in a process of its own: the kind and the fields of its row."""
    worker.private_folder(folder)
    asked, result = folder / "configuration.json", folder / "result.json"
    result.unlink(missing_ok=True)
    asked.write_text(json.dumps(asdict(configuration)))
    command = [sys.executable, "-m", "benchmarks.throughput", "--child", str(folder)]
    plan = configuration.plan
    # Its own processes have the limit each, and so has what it does by itself.
    tasks = plan.processes + 8 + (0 if configuration.batch else int(math.log2(AUTO_MOST)) + 1)
    whole_s = plan.limit_s * tasks
    # While it looks for the best batch, its processes find the limit of memory, not itself.
    limit_gib = plan.limit_gib if configuration.batch else 0.0
    status, words = worker.run_limited(command, os.environ, limit_s=whole_s, limit_gib=limit_gib)
    if status == -signal.SIGALRM:
        words = f"to make, check or measure the models took longer than {plan.limit_s:g} s"
    labels = {
        "what": matrix.WHAT,
        "configuration": configuration.key,
        "candidate": configuration.model,
        "reference": configuration.reference,
        "device": configuration.device,
        "batch": configuration.batch,
        "batch_asked": str(configuration.batch or AUTO),
        "mode": plan.mode,
        "compile": plan.compile,
        "dtype": plan.dtype,
        "plan": asdict(plan),
        "protocol": timing.PROTOCOL,
    }
    if not result.exists():
        return "failure", labels | {"verdict": "failed", "reason": words}
    found = json.loads(result.read_text())
    if status and found["kind"] == "speed" and not found["utilisation"]:
        said = (found["reason"], f"no utilisation: {words}")
        found["reason"] = "; ".join(filter(None, said))
    return found.pop("kind"), labels | found


def child(folder: Path) -> None:
    """Time the configuration in the folder, in this process and those that it starts."""
    said = json.loads((folder / "configuration.json").read_text())
    configuration = Configuration(**{**said, "plan": TimingConfig(**said["plan"])})
    for fields in measure(configuration, folder):
        write_json(folder / "result.json", fields)


def measure(configuration: Configuration, folder: Path) -> Iterator[dict[str, Any]]:
    """The fields of a configuration's row, with its kind.

    Of a model that was timed they come twice, first without utilisation, so that a failure to
    measure the peak after it loses no times.
    """
    device, plan = torch.device(configuration.device), configuration.plan
    with within(plan.limit_s):
        candidate = peers.make(configuration.model, device)
        reference = peers.make(configuration.reference, device) if configuration.reference else None
    sides = {"candidate": candidate} | ({"reference": reference} if reference else {})
    if reference and reference.image != candidate.image:
        raise ValueError(
            f"{candidate.name} takes images of {candidate.image}, {reference.name} of "
            f"{reference.image}"
        )
    batch, tried = configuration.batch, {}
    if not batch:
        plan = replace(plan, limit_gib=room_gib(plan))
        batch, tried = best_batch(reference, candidate, plan, folder, device)
    example = _images(candidate, batch, device)
    with within(plan.limit_s):
        checked, why = check(reference, candidate, example[:2], unchecked=configuration.unchecked)
        if not checked:  # else both were looked at
            for model in sides.values():
                finite(model, example[:2], plan)
    if checked and not checked.passed:
        yield {"kind": "failure", "verdict": "not equal", "reason": checked.reason, "batch": batch,
               "equality": vars(checked)}  # fmt: skip
        return
    dtype = getattr(torch, plan.dtype)
    with within(plan.limit_s):
        works = {side: _work(model, example, plan) for side, model in sides.items()}
        products = list(dict.fromkeys(p for work in works.values() if work for p in work.products))
        before = peak.peak(dtype, device, products)
    _leave_memory(device)
    found = _compared(reference, candidate, example, plan, checked, folder)
    fields = found.fields() | {
        "batch": batch,
        "batches_tried": tried,
        "checked": CHECKED if checked else f"{NOT_CHECKED}: {why}",
        "image": list(candidate.image),
        "parameters": {side: _parameters(model) for side, model in sides.items()},
        "utilisation": {},
        "raw": [{k: record[k] for k in ("rounds", "warm_up")} for record in found.processes],
    }
    failed = fields["verdict"] in ("failed", "not timed")
    fields["kind"] = "failure" if failed else "speed"
    yield fields
    if failed:
        return
    with within(plan.limit_s):
        after = peak.peak(dtype, device, products)
    used = {
        side: _utilisation(work, rate["median"], example, dtype, before, after)
        for side, rate in found.images_per_s.items()
        if (work := works[side])
    }
    wrong = [side for side, each in used.items() if each["why"] == peak.ABOVE_PEAK]
    if wrong:
        reason = f"{', '.join(wrong)}: more work a second than the machine can do was counted"
        fields |= {"kind": "failure", "verdict": "failed", "reason": reason}
    yield fields | {"utilisation": used}


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
    plan: TimingConfig,
    checked: Equality | None,
    folder: Path,
) -> Comparison:
    places = {"folder": folder, "cache": folder / "cache"}
    if reference is None or checked is None:
        module = reference.module if reference else None
        return speed(module, candidate.module, example, plan=plan, **places)
    keys = peers.conversion(reference, candidate)
    return compare(
        reference.module, candidate.module, example, plan=plan, checked=checked, keys=keys, **places
    )


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


def finite(model: Model, image: Tensor, plan: TimingConfig) -> None:
    """ValueError naming a model whose outputs, in the dtype that its inference is timed in, are not
    finite, if they are tensors."""
    module, example = timing.as_timed(deepcopy(model.module), image, plan)
    with evaluating(module), torch.inference_mode():
        output = module(example)
    if isinstance(output, Tensor) and not output.isfinite().all():
        raise ValueError(f"{model.name} gives outputs that are not finite")


def room_gib(plan: TimingConfig) -> float:
    """GiB that each process which looks for a batch, and then times it, may take: what this process
    leaves of `plan.limit_gib`. Raises ValueError where that is nothing."""
    own = machine.tree_mib(os.getpid()) / 2**10
    if plan.limit_gib <= own:
        raise ValueError(f"limit_gib = {plan.limit_gib:g} is less than the {own:.1f} before it")
    return plan.limit_gib - own


def best_batch(
    reference: Model | None,
    candidate: Model,
    plan: TimingConfig,
    folder: Path,
    device: torch.device,
) -> tuple[int, dict[str, float | str]]:
    """The batch with most images/s; the rates of all that were tried, and why no more were.

    Chosen by a few calls of the candidate in other processes, which hold what a pair does, up to
    what fits; the configuration is timed afterwards. Raises ValueError if not even one image fits.
    """
    tried: dict[str, float | str] = {}
    rates: dict[int, float] = {}
    other = reference.module if reference else None
    batch = 1
    with worker.Tasks(folder / "probe", plan) as tasks:
        while batch <= AUTO_MOST:
            example = _images(candidate, batch, device)
            try:
                worker.write(folder / "probe", plan, other, candidate.module, example, None)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"batch = '{AUTO}' needs models that can be pickled: {error}"
                ) from None
            del example
            _leave_memory(device)
            found = tasks.run("probe", "0", cache=folder / "cache")
            tried[str(batch)] = found.get("images_per_s", found.get("failure", ""))
            if "failure" in found:
                break
            rates[batch] = found["images_per_s"]
            batch *= 2
    if not rates:
        raise ValueError(f"not one image can be timed: {tried['1']}")
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
    bytes: float
    """Read and written by the operations of a call, for one image; 0 of a training step."""


def _work(model: Model, example: Tensor, plan: TimingConfig) -> Work | None:
    """What is counted on `meta`; None for a module that needs values, which `meta` has not."""
    training = plan.mode == "training"
    try:
        if training:  # of two images, which batch norm needs
            macs = step_macs(model.module, example[:1].repeat(2, 1, 1, 1)) // 2
        else:
            macs = forward_macs(model.module, example[:1])
        call = peak.work(model.module, example, getattr(torch, plan.dtype))
    except RuntimeError:
        return None
    return Work(2 * macs, call.products, 0 if training else call.bytes / len(example))


def _utilisation(
    work: Work,
    rate: float,
    example: Tensor,
    dtype: torch.dtype,
    before: peak.Peak,
    after: peak.Peak,
) -> dict[str, Any]:
    """The work a second at a rate in images/s beside the machine's peak; in inference also what is
    read and written a second, if every operation does by itself."""
    said = peak.utilisation(work.flops * rate, before, after)
    gpu = torch.cuda.get_device_name(example.device) if example.is_cuda else None
    said["data_sheet"] = peak.data_sheet(gpu, dtype)
    return said | ({"bytes": work.bytes * rate} if work.bytes else {})


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    if row["kind"] == "failure":
        return f"{row['verdict']}: {row['reason']}"
    rate = row["images_per_s"]["candidate"]
    said = f"{_value(rate):,.1f} images/s"
    if "mean" in rate:
        said += f" ({rate['mean_low']:,.1f} to {rate['mean_high']:,.1f} within this run)"
    if row["ratio_low"] is not None:
        said += (
            f"; {row['ratio']:.3f} of the reference's ({row['ratio_low']:.3f} to "
            f"{row['ratio_high']:.3f}), floor ±{row['noise_floor']:.1%}, {matrix.verdict(row)}"
        )
    elif row["reason"]:
        said += f", {row['verdict']}: {row['reason']}"
    return said


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """What goes to W&B of a row."""
    if row["kind"] == "failure":
        return {}
    name = "/".join(str(row[key]) for key in ("candidate", "mode", "batch", "dtype", "compile"))
    found = {f"{name}/{tracking.IMAGES_PER_S}": _value(row["images_per_s"]["candidate"])}
    if row["ratio"] is not None:
        found[f"{name}/ratio"] = row["ratio"]
    return found


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Final values; the rate and its interval if there is one configuration, as in a sweep."""
    said: dict[str, Any] = {tracking.ROW: len(rows)}
    timed_rows = [row for row in rows if row["kind"] == "speed"]
    if len(rows) == len(timed_rows) == 1:
        rate = rows[0]["images_per_s"]["candidate"]
        said |= {tracking.IMAGES_PER_S: _value(rate)}
        said |= {f"{tracking.IMAGES_PER_S}_{name}": value for name, value in rate.items()}
    return said


def _value(rate: Mapping[str, float]) -> float:
    """The rate over processes; of one process its median."""
    return rate.get("mean", rate["median"])


def _label(settings: Settings) -> str:
    several = f" and {len(settings.models) - 1} more" if len(settings.models) > 1 else ""
    return f"{settings.models[0]}{several}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value)


def _newest(group: Path, values: dict[str, Any]) -> Path | None:
    """The newest run folder of the same settings and versions, but for how it was called.

    Raises ValueError if there is none.
    """
    free = ("resume", "wandb", "out")
    wanted = {name: value for name, value in values.items() if name not in free}
    found = [
        path.parent
        for path in group.glob("*/config.json")
        if {k: v for k, v in read_json(path).items() if k not in free} == wanted
    ]
    if not found:
        raise ValueError(f"{group} holds no run of these settings and versions to resume")
    return max(found, key=lambda path: path.stat().st_mtime)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        machine.end_with_parent()
        cli.run(lambda args: child(Path(args[0])), sys.argv[2:])
    else:
        cli.run(main)
