"""Two modules side by side: equality first, then paired timing in other processes.

`compare(a, b, example)` is the whole of it in one call; `python -m benchmarks` runs it for ViTs.
`speed` times what is meant to differ, modules or whole training steps.
"""

import itertools
import math
import pickle
import shutil
import statistics
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitx.measure import stats, timing, worker
from vitx.measure.equality import TIMED_LIMIT, Equality, Keys, equality, randomise
from vitx.measure.timing import Subject, TimingConfig
from vitx.model.compiler import needs_compiler
from vitx.model.cost import forward_macs

__all__ = ["Comparison", "TimingConfig", "compare", "equality", "randomise", "speed"]

Say = Callable[[str], None]

ONE_PROCESS, ALONE = "one process, no verdict", "timed alone"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Ratios are the candidate's images/s over the reference's."""

    plan: TimingConfig
    equality: Equality | None
    """None where nothing was checked: of modules that need not compute the same, or of one."""
    verdict: str
    """A word of `stats.speed_verdict`, `not timed`, `failed`, `timed alone`, or `one process, no
    verdict`."""
    reason: str = ""
    ratio: stats.Interval | None = None
    """From one process the value stands at both ends, and there is no floor."""
    floor: float | None = None
    images_per_s: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of each side: median, 10 % and 90 % quantile over all blocks (`low`, `high`); and the
    geometric mean of the processes' medians with its 95 % interval (`mean`, `mean_low`,
    `mean_high`), which one process has not."""
    page_faults: dict[str, float] = field(default_factory=dict)
    """Median of each side over all blocks, of one iteration."""
    timed_error: dict[str, float] = field(default_factory=dict)
    """Relative root-mean-square error to float64 of each side, as timed."""
    resources: dict[str, dict[str, Any]] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    """Multiply-accumulates of one image forward; empty where they can't be counted."""
    batch: int = 0
    dtype: str = ""
    device: str = ""
    processes: list[dict] = field(default_factory=list)
    """The raw record of each process: times, order, machine state."""

    def fields(self) -> dict[str, Any]:
        """The comparison as the fields of a row, without the raw times."""
        ratio = self.ratio
        known = ratio if len(self.processes) > 1 else None  # one process has no interval
        return {
            "mode": self.plan.mode,
            "compile": self.plan.compile,
            "dtype": self.dtype,
            "batch": self.batch,
            "device": self.device,
            "ratio": ratio and ratio.value,
            "ratio_low": known and known.low,
            "ratio_high": known and known.high,
            "noise_floor": self.floor,
            "verdict": self.verdict,
            "reason": self.reason,
            "images_per_s": self.images_per_s,
            "page_faults": self.page_faults,
            "keep_memory": self.plan.keep_memory,
            "processes": len(self.processes),
            "order": ["".join(_letters(p)) for p in self.processes],
            "macs": self.macs,
            "peak_mib": {side: found.get("peak_mib") for side, found in self.resources.items()},
            "host_mib": {side: found.get("host_mib") for side, found in self.resources.items()},
            "compile_s": {side: found.get("compile_s") for side, found in self.resources.items()},
            **{
                detail: {side: found.get(detail) for side, found in self.resources.items()}
                for detail in ("latency", "stages", "phases", "saved", "mean_images_per_s")
                if self.plan.details
            },
            "equality": self.equality and asdict(self.equality) | {"timed_error": self.timed_error},
            "plan": asdict(self.plan),
            "log_ratios": [p["log_ratio"] for p in self.processes],
            "log_ratios_again": [p["log_ratio_again"] for p in self.processes],
            "warm_up": [p["warm_up"]["ended"] for p in self.processes],
            "rounds_disturbed": [p["rounds_disturbed"] for p in self.processes],
            "rounds_used": [p["rounds_used"] for p in self.processes],
            "threads": sorted({p["threads"] for p in self.processes}),
            "forked": all(p.get("forked", False) for p in self.processes),
            "gpu_readings": [p["gpu_readings"] for p in self.processes if p["gpu_readings"]],
        }

    def __str__(self) -> str:
        """A short table for people."""
        lines = [f"equality   {self.equality or 'not checked: different functions'}"]
        if self.timed_error:
            a, b = self.timed_error["reference"], self.timed_error["candidate"]
            lines.append(f"as timed   error to float64: reference {a:.1e}, candidate {b:.1e}")
        if self.ratio is not None:
            r = self.ratio
            said = "one process, no interval"
            if self.floor is not None:
                said = f"95 % {r.low:.3f} to {r.high:.3f}; floor ±{self.floor:.1%}"
            lines.append(f"speed      {r.value:.3f}× the reference's images/s ({said})")
        for side, rate in self.images_per_s.items():
            found = self.resources.get(side, {})
            extra = [f"{self.macs[side] / 1e9:.3f} GMAC an image"] if side in self.macs else []
            if found.get("peak_mib") is not None:
                extra.append(f"peak {found['peak_mib']:.0f} MiB")
            if found.get("compile_s"):
                seconds = found["compile_s"]
                extra.append(f"compile {seconds['cold']:.1f} s cold, {seconds['warm']:.1f} s warm")
            lines.append(f"{side:<10} {rate['median']:.2f} images/s; {'; '.join(extra)}")
        what = f"{self.plan.mode}, compile {self.plan.compile}"
        reason = f": {self.reason}" if self.reason else ""
        lines.append(f"verdict    {self.verdict} ({what}){reason}")
        return "\n".join(lines)


class _CantRebuild(Exception):
    """Another process can't unpickle a module."""


def compare(
    reference: nn.Module,
    candidate: nn.Module,
    example: Tensor,
    *,
    keys: Keys | None = None,
    plan: TimingConfig | None = None,
    folder: Path | None = None,
    cache: Path | None = None,
    checked: Equality | None = None,
    say: Say = lambda line: None,
) -> Comparison:
    """Check that two modules compute the same function, then time them in pairs.

    `example` is the timed batch (b, c, h, w) on the device of both modules; `keys` are those of
    `equality`. Other processes rebuild both modules by pickle; where that fails, one
    process times them and the verdict is `one process, no verdict`. Modules that are not equal are
    not timed. `checked` takes an equality result that was found before. `folder` keeps the job's
    files, `cache` its compiled code; both are temporary if not given. A training step ends in a
    cross-entropy, so the output must be (b, classes) there.
    """
    if not len(example):
        raise ValueError("example holds no image")
    result = checked or equality(reference, candidate, example[:2], keys=keys)
    base = _before(reference, candidate, example, plan or TimingConfig(), result)
    if not result.passed:
        return base
    return _time(base, reference, candidate, example, keys, folder, cache, say)


def speed(
    reference: Subject | None,
    candidate: Subject,
    example: Tensor,
    *,
    plan: TimingConfig | None = None,
    folder: Path | None = None,
    cache: Path | None = None,
    say: Say = lambda line: None,
) -> Comparison:
    """Time in pairs what need not compute the same, as the arms of an ablation; or one by itself.

    As `compare`, but that nothing is checked: the result's `equality` is None. Without a reference
    there is no ratio. Of `Training` steps `example` gives the device only.
    """
    if not len(example):
        raise ValueError("example holds no image")
    base = _before(reference, candidate, example, plan or TimingConfig(), None)
    return _time(base, reference, candidate, example, None, folder, cache, say)


def _before(
    reference: Subject | None,
    candidate: Subject,
    example: Tensor,
    plan: TimingConfig,
    checked: Equality | None,
) -> Comparison:
    """What is known before anything is timed."""
    return Comparison(
        plan,
        checked,
        "not timed",
        reason=checked.reason if checked else "",
        macs=_macs(reference, candidate, example[:1]),
        batch=len(example),
        dtype=_dtype(example, plan),
        device=str(example.device),
    )


def _dtype(example: Tensor, plan: TimingConfig) -> str:
    given = str(example.dtype).removeprefix("torch.")
    return given if plan.dtype == "as given" else plan.dtype


def _time(
    base: Comparison,
    reference: Subject | None,
    candidate: Subject,
    example: Tensor,
    keys: Keys | None,
    folder: Path | None,
    cache: Path | None,
    say: Say,
) -> Comparison:
    """Time the pair in other processes, or in this one where they can't rebuild it."""
    with tempfile.TemporaryDirectory(prefix="vitx-") as temporary:
        job = Path(folder or temporary, "job")
        compiled = Path(cache or temporary, "compiled")
        try:
            worker.write(job, base.plan, reference, candidate, example, keys)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            return _one_process(base, reference, candidate, example, str(error))
        try:
            with worker.Tasks(job, base.plan) as tasks:
                return _in_processes(base, tasks, compiled, say, paired=reference is not None)
        except _CantRebuild as error:
            return _one_process(base, reference, candidate, example, str(error))


def _in_processes(
    base: Comparison, tasks: worker.Tasks, cache: Path, say: Say, *, paired: bool
) -> Comparison:
    plan, resources = base.plan, {}
    for side in ("reference", "candidate") if paired else ("candidate",):
        resources[side] = _alone(tasks, plan, side, cache, checked=base.equality is not None)
        if "failure" in resources[side]:
            if not resources[side].get("rebuilt", True):
                raise _CantRebuild(resources[side]["failure"])
            return replace(base, verdict="failed", reason=resources[side]["failure"])
        if plan.details:
            details = tasks.run("details", side, cache=cache)
            if "failure" in details:
                return replace(base, verdict="failed", reason=details["failure"])
            resources[side] |= details
    checked = replace(base, resources=resources)
    if base.equality is not None:
        errors = {side: found["timed_error"] for side, found in resources.items()}
        checked = replace(checked, timed_error=errors)
        if not errors["candidate"] <= TIMED_LIMIT * errors["reference"]:
            reason = (
                f"as timed, the candidate's error {errors['candidate']:.1e} is more than "
                f"{TIMED_LIMIT:.0f}× the reference's {errors['reference']:.1e}"
            )
            return replace(checked, reason=reason)
        say(f"as timed, error to float64: {errors['reference']:.1e} and {errors['candidate']:.1e}")
    records = []
    for process in range(plan.processes):
        record = tasks.run("pair", str(process), cache=cache)
        if "failure" in record:
            reason = f"process {process + 1}: {record['failure']}"
            return replace(checked, verdict="failed", reason=reason, processes=records)
        records.append(record)
        ratio = (
            f"ratio {math.exp(record['log_ratio']):.3f}, reference against itself "
            f"{math.exp(record['log_ratio_again']):.3f}, "
            if paired
            else ""
        )
        say(
            f"process {process + 1} of {plan.processes}: {ratio}warm-up ended by "
            f"{record['warm_up']['ended']}, {record['rounds_disturbed']} of "
            f"{len(record['rounds'])} rounds disturbed"
        )
    return summarise(replace(checked, processes=records))


def summarise(found: Comparison) -> Comparison:
    """Ratio, floor, rates and verdict from the raw records of the processes."""
    paired = found.processes[0]["log_ratio"] is not None
    sides = {"reference": ("reference", "again")} if paired else {}
    sides |= {"candidate": ("candidate",)}
    rates = {side: _rates(found, arms) for side, arms in sides.items()}
    faults = {
        side: statistics.median(_all(found, "page_faults", arms)) for side, arms in sides.items()
    }
    found = replace(found, images_per_s=rates, page_faults=faults)
    quiet = all(record["quiet"] for record in found.processes)
    disturbed = "" if quiet else "the machine was disturbed in most rounds of a process"
    if not paired:
        verdict = ALONE if quiet else stats.INCONCLUSIVE
        return replace(found, verdict=verdict, reason=disturbed)
    logs = [record["log_ratio"] for record in found.processes]
    again = [record["log_ratio_again"] for record in found.processes]
    if len(logs) < 2:
        value = math.exp(logs[0])
        ratio = stats.Interval(value, value, value)
        return replace(found, verdict=ONE_PROCESS, reason=disturbed, ratio=ratio)
    ratio, floor = stats.paired_ratio(logs), stats.noise_floor(again)
    verdict = stats.speed_verdict(ratio, floor) if quiet else stats.INCONCLUSIVE
    return replace(found, verdict=verdict, reason=disturbed, ratio=ratio, floor=floor)


def _alone(
    tasks: worker.Tasks, plan: TimingConfig, side: str, cache: Path, *, checked: bool
) -> dict:
    """One model by itself: peak memory, error as timed, and compile seconds cold and warm.

    What it compiled into its own empty folder is then added to the folder that the pairs share.
    """
    error = ("error",) if checked else ()
    if plan.compile == "none":
        found = tasks.run("alone", side, *error, cache=cache)
        return found | {"compile_s": None}
    own = cache.with_name(f"{cache.name}-{side}")
    shutil.rmtree(own, ignore_errors=True)
    cold = tasks.run("alone", side, *error, cache=own)
    if "failure" in cold:
        return cold
    warm = tasks.run("alone", side, cache=own)
    if "failure" in warm:
        return warm
    worker.private_folder(cache)
    shutil.copytree(own, cache, dirs_exist_ok=True)
    shutil.rmtree(own)
    return cold | {"compile_s": {"cold": cold["compile_s"], "warm": warm["compile_s"]}}


def _one_process(
    base: Comparison, reference: Subject | None, candidate: Subject, example: Tensor, why: str
) -> Comparison:
    """The pair in this process, for modules that no other can rebuild; it gives no verdict."""
    if base.plan.compile != "none":
        needs_compiler(example.device)
    base = replace(base, plan=replace(base.plan, keep_memory=False))
    models = {"candidate": candidate}
    if reference is not None:
        models = {"reference": reference, "again": reference, **models}
    record = timing.pair({arm: deepcopy(m) for arm, m in models.items()}, example, base.plan, 0)
    found = summarise(replace(base, processes=[record]))
    return replace(found, reason=f"no fresh process could rebuild both modules ({why[:160]})")


def _macs(reference: Subject | None, candidate: Subject, image: Tensor) -> dict[str, int]:
    """MACs of each module, counted on `meta`."""
    sides = {"reference": reference, "candidate": candidate}
    try:
        return {
            side: forward_macs(module, image)
            for side, module in sides.items()
            if isinstance(module, nn.Module)
        }
    except RuntimeError:  # what a module raises that needs values, which `meta` has not
        return {}


def _letters(record: dict) -> list[str]:
    """The order of a process's blocks: r reference, a the reference again, c candidate."""
    return [arm[0] for entry in record["rounds"] for arm in entry["order"]]


def _rates(found: Comparison, arms: tuple[str, ...]) -> dict[str, float]:
    rates = [
        [record["images"][arm] / seconds for arm in arms for seconds in record["seconds"][arm]]
        for record in found.processes
    ]
    flat = sorted(itertools.chain.from_iterable(rates))
    low, high = (flat[min(int(share * len(flat)), len(flat) - 1)] for share in (0.1, 0.9))
    blocks = {"median": statistics.median(flat), "low": low, "high": high}
    if len(rates) < 2:
        return blocks
    mean = stats.paired_ratio([math.log(statistics.median(some)) for some in rates])
    return blocks | {"mean": mean.value, "mean_low": mean.low, "mean_high": mean.high}


def _all(found: Comparison, what: str, arms: tuple[str, ...]) -> list[float]:
    """A reading of the blocks of those arms in every process."""
    return [value for record in found.processes for arm in arms for value in record[what][arm]]
