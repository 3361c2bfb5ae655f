"""Two modules side by side: equality first, then paired timing in other processes.

`compare(a, b, example)` is the whole of it in one call; `python -m benchmarks` runs it for ViTs.
`speed` times what is meant to differ, modules or whole training steps.
"""

import math
import pickle
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from vitx.measure import jobs, stats, subjects, tasks
from vitx.measure.comparison import (
    ALONE,
    ONE_PROCESS,
    Comparison,
    CompileSeconds,
    Process,
    Rate,
    Side,
)
from vitx.measure.equality import TIMED_LIMIT, Equality, Keys, equality, randomise
from vitx.measure.jobs import private_folder
from vitx.measure.subjects import Subject
from vitx.measure.timing import SIDES, PairTimes, TimingConfig
from vitx.measure.worker import CannotRebuild, TaskFailed, Workers
from vitx.model.compiler import needs_compiler
from vitx.model.cost import forward_macs
from vitx.registry import UserError

__all__ = ["Comparison", "TimingConfig", "compare", "equality", "randomise", "speed"]

Say = Callable[[str], None]


def compare(
    reference: nn.Module,
    candidate: nn.Module,
    example: Tensor,
    *,
    keys: Keys | None = None,
    config: TimingConfig | None = None,
    folder: Path | None = None,
    cache: Path | None = None,
    checked: Equality | None = None,
    say: Say = lambda line: None,
) -> Comparison:
    """Check that two modules compute the same function, then time them in pairs.

    `example` is the timed batch (b, c, h, w) on the device of both modules; `keys` are those of
    `equality`. Other processes rebuild both modules by pickle; where that fails, one process times
    them and the verdict is `one process, no verdict`. Modules that are not equal are not timed.
    `checked` takes an earlier result of `equality`. `folder` keeps the job's files, `cache` its
    compiled code; both are temporary if not given. A training step ends in a cross-entropy, so the
    output must be (b, classes) there. Raises ValueError for an example without images.
    """
    config = config or TimingConfig()
    _refuse_no_image(example)
    result = checked or equality(reference, candidate, example[:2], keys=keys)
    base = _before(reference, candidate, example, config, result)
    if not result.passed:
        return base
    return _time(base, reference, candidate, example, keys, folder, cache, say)


def speed(
    reference: Subject | None,
    candidate: Subject,
    example: Tensor,
    *,
    config: TimingConfig | None = None,
    folder: Path | None = None,
    cache: Path | None = None,
    say: Say = lambda line: None,
) -> Comparison:
    """Time in pairs what need not compute the same, as the arms of an ablation; or one by itself.

    As `compare`, but without a check: the result's `equality` is None. Without a reference there is
    no ratio. Of `Training` steps and `Blocks` `example` gives the device only.
    """
    _refuse_no_image(example)
    base = _before(reference, candidate, example, config or TimingConfig(), None)
    return _time(base, reference, candidate, example, None, folder, cache, say)


def _refuse_no_image(example: Tensor) -> None:
    if not len(example):
        raise UserError("example holds no image")


def _before(
    reference: Subject | None,
    candidate: Subject,
    example: Tensor,
    config: TimingConfig,
    checked: Equality | None,
) -> Comparison:
    """What is known before anything is timed."""
    given = str(example.dtype).removeprefix("torch.")
    return Comparison(
        config=config,
        verdict="not timed",
        reason=checked.reason if checked else "",
        candidate=Side(macs=_macs(candidate, example)),
        reference=None if reference is None else Side(macs=_macs(reference, example)),
        equality=checked,
        batch=len(example),
        dtype=given if config.dtype == "as given" else config.dtype,
        device=str(example.device),
    )


def _macs(subject: Subject, example: Tensor) -> int | None:
    """Of one image, counted on `meta`."""
    if not isinstance(subject, nn.Module):
        return None
    try:
        return forward_macs(subject, example[:1])
    except RuntimeError:  # what a module raises that needs values, which `meta` has not
        return None


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
        place = Path(folder or temporary, "job")
        compiled = Path(cache or temporary, "compiled")
        try:
            job = jobs.write(place, base.config, reference, candidate, example, keys)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            return _one_process(base, reference, candidate, example, str(error))
        try:
            with Workers() as workers:
                return _in_processes(base, workers, job, compiled, say)
        except CannotRebuild as error:
            return _one_process(base, reference, candidate, example, str(error))


def _in_processes(
    base: Comparison, workers: Workers, job: jobs.Job, cache: Path, say: Say
) -> Comparison:
    measured: dict[str, Side] = {}
    try:
        for name, side in base.sides.items():
            measured[name] = side | _alone(workers, job, name, cache, base.equality is not None)
    except CannotRebuild:
        raise
    except TaskFailed as error:
        return replace(base, verdict="failed", reason=str(error))
    checked = replace(base, **measured)
    if base.equality is not None:
        errors = [side.timed_error or math.inf for side in checked.sides.values()]
        if not errors[1] <= TIMED_LIMIT * errors[0]:
            reason = (
                f"as timed, the candidate's error {errors[1]:.1e} is more than "
                f"{TIMED_LIMIT:.0f}× the reference's {errors[0]:.1e}"
            )
            return replace(checked, reason=reason)
        say(f"as timed, error to float64: {errors[0]:.1e} and {errors[1]:.1e}")
    pairs: list[PairTimes] = []
    for number in range(1, base.config.processes + 1):
        try:
            pairs.append(workers.run(job, cache, tasks.pair, number - 1))
        except TaskFailed as error:
            reason = f"process {number}: {error}"
            return replace(_with_processes(checked, pairs), verdict="failed", reason=reason)
        say(f"process {number} of {base.config.processes}: {_line(pairs[-1])}")
    return summarise(checked, pairs)


def _line(pair: PairTimes) -> str:
    """What a process has timed, for people."""
    ratio = ""
    if pair.paired:
        candidate, again = map(math.exp, pair.log_ratios())
        ratio = f"ratio {candidate:.3f}, reference against itself {again:.3f}, "
    return (
        f"{ratio}warm-up ended by {pair.warm_up.ended}, {pair.disturbed} of {len(pair.rounds)} "
        "rounds disturbed"
    )


def _alone(workers: Workers, job: jobs.Job, name: str, cache: Path, checked: bool) -> Side:
    """One model by itself: peak memory, error as timed, and compile seconds cold and warm.

    What it compiled into its own empty folder is then added to the folder that the pairs share.
    """
    if job.config.compile == "none":
        side, _ = workers.run(job, cache, tasks.alone, name, error=checked)
    else:
        own = cache.with_name(f"{cache.name}-{name}")
        shutil.rmtree(own, ignore_errors=True)
        side, cold = workers.run(job, own, tasks.alone, name, error=checked)
        _, warm = workers.run(job, own, tasks.alone, name)
        side |= Side(compile_s=CompileSeconds(cold, warm))
        private_folder(cache)
        shutil.copytree(own, cache, dirs_exist_ok=True)
        shutil.rmtree(own)
    return side | workers.run(job, cache, tasks.details, name) if job.config.details else side


def summarise(base: Comparison, pairs: Sequence[PairTimes]) -> Comparison:
    """Ratio, floor, rates and verdict from what each process has timed."""
    timed = _with_processes(base, pairs)
    timed = replace(timed, candidate=timed.candidate | _side(pairs, "candidate"))
    quiet = all(pair.quiet for pair in pairs)
    reason = "" if quiet else "the machine was disturbed in most rounds of a process"
    if not pairs[0].paired:
        verdict = ALONE if quiet else stats.INCONCLUSIVE
        return replace(timed, verdict=verdict, reason=reason)
    reference = (timed.reference or Side()) | _side(pairs, "reference")
    timed = replace(timed, reference=reference, reason=reason)
    if len(pairs) < 2:
        value = math.exp(timed.log_ratios[0])
        ratio = stats.Interval(value, value, value)
        return replace(timed, verdict=ONE_PROCESS, ratio=ratio)
    ratio = stats.paired_ratio(timed.log_ratios)
    floor = stats.noise_floor(timed.log_ratios_again)
    verdict = stats.speed_verdict(ratio, floor) if quiet else stats.INCONCLUSIVE
    return replace(timed, verdict=verdict, ratio=ratio, floor=floor)


def _with_processes(base: Comparison, pairs: Sequence[PairTimes]) -> Comparison:
    processes = tuple(_process(pair) for pair in pairs)
    return replace(base, processes=processes, raw=[pair.raw() for pair in pairs])


def _process(pair: PairTimes) -> Process:
    candidate, again = pair.log_ratios() if pair.paired else (None, None)
    return Process(
        log_ratio=candidate,
        log_ratio_again=again,
        warm_up=pair.warm_up.ended,
        rounds_used=len(pair.used),
        rounds_disturbed=pair.disturbed,
        quiet=pair.quiet,
        threads=pair.threads,
        forked=pair.forked,
        gpu_readings=pair.gpu_readings,
    )


def _side(pairs: Sequence[PairTimes], name: str) -> Side:
    """Rate and page faults over the blocks of all processes."""
    rates = [pair.rates(SIDES[name]) for pair in pairs if pair.paired or name == "candidate"]
    flat = sorted(rate for process in rates for rate in process)
    low, high = (flat[min(int(share * len(flat)), len(flat) - 1)] for share in (0.1, 0.9))
    mean = None
    if len(rates) > 1:
        mean = stats.paired_ratio([math.log(statistics.median(process)) for process in rates])
    blocks = [block for pair in pairs for block in pair.blocks(SIDES[name])]
    faults = [block.page_faults for block in blocks if block.page_faults is not None]
    return Side(
        rate=Rate(statistics.median(flat), low, high, mean),
        page_faults=statistics.median(faults) if faults else None,
    )


def _one_process(
    base: Comparison, reference: Subject | None, candidate: Subject, example: Tensor, why: str
) -> Comparison:
    """The pair in this process, for modules that no other can rebuild; it gives no verdict."""
    if base.config.compile != "none":
        needs_compiler(example.device)
    base = replace(base, config=replace(base.config, keep_memory=False))
    arms = {"candidate": candidate}
    if reference is not None:
        arms = {"reference": reference, "again": reference, **arms}
    copies = {arm: deepcopy(subject) for arm, subject in arms.items()}
    timed = summarise(base, [subjects.pair(copies, example, base.config, 0)])
    return replace(timed, reason=f"no fresh process could rebuild both modules ({why[:160]})")
