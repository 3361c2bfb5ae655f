"""Tables of the main job, of whole training steps, of the gate and of single programs."""

import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence

from benchmarks import kinds
from benchmarks.kinds import Accuracy, Pretrained, Speed, Step, Timed
from benchmarks.mutants import Score
from experiments.study.pages import (
    Columns,
    Table,
    floor_text,
    interval_text,
    machine,
    ratio_text,
    same_machine,
    table,
)
from experiments.study.results import AnyResult, Result, latest, of_kind
from vitx.measure.comparison import NO_VERDICT, Side
from vitx.measure.stats import mean_interval

SIDES = ("reference", "candidate")
LABELS = {"reference": "timm", "candidate": "vitx"}
UNCOUNTED = "not counted"
CIFAR10_IMAGES = 50_000
WHERE: Columns = {"machine": machine}
FLOOR: Columns = {"floor": lambda result: floor_text(result.comparison)}
VERDICT: Columns = FLOOR | {"verdict": lambda result: result.comparison.verdict}
RATIO: Columns = {"images/s ratio (95 %)": lambda result: ratio_text(result.comparison)}
TIMING: Columns = {
    "mode": lambda result: result.comparison.config.mode,
    "compile": lambda result: result.comparison.config.compile,
    "batch": lambda result: str(result.comparison.batch),
}


def model_name(result: kinds.Pair) -> str:
    """timm's short name of the compared model, such as vit_tiny_patch16_224."""
    return result.reference.partition(":")[2]


CONFIGURATION: Columns = (
    {"model": model_name}
    | TIMING
    | {"freed memory": lambda r: "kept" if r.comparison.config.keep_memory else "by default"}
)


def size_name(model: str) -> str:
    """Ti/16 for vit_tiny_patch16_224; other names as they are."""
    sizes = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}
    name = re.search(r"_(\w+?)_patch(\d+)", model)
    return f"{sizes.get(name[1], name[1])}/{name[2]}" if name else model


def standing(
    results: Iterable[Result],
    kind: type[AnyResult],
    key: Callable[[AnyResult], Hashable] = lambda result: (),
) -> list[AnyResult]:
    """Of a kind the latest result on each machine, of each value of `key`."""
    of_this = [result for result in of_kind(results, kind) if result.kind == kind.kind]
    return latest(of_this, lambda result: (key(result), result.device, same_machine(result)))


def speeds(results: Iterable[Result]) -> list[Speed]:
    """The latest timing of each configuration on each machine, failed ones too."""

    def key(result: Speed) -> Hashable:
        config = result.comparison.config
        return (result.reference, config.mode, config.compile, config.keep_memory,
                result.comparison.dtype, result.comparison.batch)  # fmt: skip

    def place(result: Speed) -> tuple[str, bool, str, int, bool]:
        config, size = result.comparison.config, size_name(model_name(result))
        compiled, freed = config.compile != "none", not config.keep_memory
        return config.mode, compiled, size, result.comparison.batch, freed

    return sorted(standing(results, Speed, key), key=place)


def claimed(results: Iterable[Result]) -> list[Speed]:
    """Of `speeds` those that stand for their configuration: timed with freed memory kept."""
    return [result for result in speeds(results) if result.comparison.config.keep_memory]


def speed_table(results: Sequence[Result]) -> Table:
    """Ratios with intervals, floors and verdicts, a line per configuration."""
    return table(speeds(results), CONFIGURATION | RATIO | VERDICT | WHERE)


def cost_table(results: Sequence[Result]) -> Table:
    """What each side of a timing cost: images per second, work, memory, compile seconds."""
    timed = [(result, name, side) for result in speeds(results) for name in SIDES
             if (side := getattr(result.comparison, name)) and side.rate]  # fmt: skip
    of_result = {
        heading: (lambda line, cell=cell: cell(line[0]))
        for heading, cell in (CONFIGURATION | WHERE).items()
    }
    of_side = {heading: (lambda line, cell=cell: cell(line[2])) for heading, cell in COSTS.items()}
    return table(timed, of_result | {"side": lambda line: LABELS[line[1]]} | of_side)


def _rate(side: Side) -> str:
    rate = side.rate
    return f"{rate.median:.1f} ({rate.low:.1f} to {rate.high:.1f})" if rate else "–"


def _compile_seconds(side: Side) -> str:
    seconds = side.compile_s
    return f"{seconds.cold:.0f} cold, {seconds.warm:.0f} warm" if seconds else "–"


def _number(value: float | None, form: str, missing: str = "–") -> str:
    return missing if value is None else format(value, form)


COSTS: Columns = {
    "images/s, median (10 to 90 % of blocks)": _rate,
    "page faults": lambda side: _number(side.page_faults, ",.0f", UNCOUNTED),
    "GMAC forward": lambda side: f"{side.macs / 1e9:.3f}" if side.macs else UNCOUNTED,
    "peak MiB": lambda side: _number(side.peak_mib, ".0f"),
    "compile s": _compile_seconds,
}


def equality_table(results: Sequence[Result]) -> Table:
    """float64 errors of outputs and gradients, a line per model."""
    columns: Columns = {
        "model": model_name,
        "outputs": lambda result: f"{result.equality.output_error:.0e}",
        "gradients": lambda result: f"{result.equality.gradient_error:.0e}",
        "tensors": lambda result: str(result.equality.gradients),
        "parameters": lambda result: f"{result.equality.parameters_candidate:,}",
        "verdict": lambda result: result.verdict,
    }
    equal = standing(results, kinds.EqualResult, lambda result: result.reference)
    return table(equal, columns | WHERE)


def mutant_table(scores: Sequence[Score]) -> Table:
    """Which check caught each planted bug, and both counts."""
    caught = [(score.caught, score.caught_by_common_check) for score in scores]
    body = [
        (score.mutant.name, "caught" if ours else "MISSED", "caught" if common else "missed")
        for score, (ours, common) in zip(scores, caught, strict=True)
    ]
    counts = (f"{sum(column)} of {len(body)}" for column in zip(*caught, strict=True))
    header = ("planted bug", "this check", "default init, logits, 1e-4")
    return Table(header, [*body, ("all", *counts)])


def accuracy_table(results: Sequence[Result]) -> Table:
    """Test accuracy of both sides with intervals over seeds, and the equivalence test."""
    header = ("data", "side", "seeds", "test accuracy (95 % over seeds)",
              "standard error of the test set", "seconds per seed", "machine",
              "equivalence to timm")  # fmt: skip
    body = []
    for result in standing(results, Accuracy, lambda result: result.data):
        where, data = machine(result), result.data
        sides = (
            ("vitx", result.candidate_values, result.candidate_seconds, equivalence_test(result)),
            ("timm", result.reference_values, result.reference_seconds, ""),
        )
        for side, values, seconds, test in sides:
            mean = mean_interval(values)
            error = _standard_error(mean.value, result.test_images)
            body.append((data, side, str(result.seeds), interval_text(mean, ".2%"), error,
                         _number(seconds, ".0f"), where, test))  # fmt: skip
        if result.svm is not None:
            error = _standard_error(result.svm, result.test_images)
            body.append((data, "RBF SVM on pixels", "–", f"{result.svm:.2%}", error, "–", where,
                         ""))  # fmt: skip
    return Table(header, body)


def tested(result: Accuracy) -> bool:
    """Whether there is a test of equivalence that says something."""
    return result.low == result.low and result.verdict != NO_VERDICT  # not NaN


def equivalence_test(result: Accuracy) -> str:
    """The verdict of the equivalence test, with the numbers behind it where there is one."""
    if not tested(result):
        return result.verdict
    ends = (100 * result.difference, 100 * result.low, 100 * result.high)
    difference, low, high = (f"{end:+.2f}" for end in ends)
    return (
        f"{result.verdict} within {100 * result.margin:.1f} point: difference {difference} "
        f"(90 % {low} to {high}), p = {result.p_equivalence:.1g}"
    )


def _standard_error(accuracy: float, images: int) -> str:
    """Binomial standard error of an accuracy on that many images."""
    return f"{100 * (accuracy * (1 - accuracy) / images) ** 0.5:.2f} points"


def control_table(results: Sequence[Result]) -> Table:
    """Controls of the protocol: a slowdown of counted size, and timm against itself."""
    columns: Columns = {
        "control": lambda result: result.candidate,
        "expected by MACs": lambda result: f"{1 / (1 + result.planted_counted):.3f}",
    }
    controls = standing(results, kinds.Control, lambda result: result.candidate)
    return table(controls, columns | RATIO | VERDICT | WHERE)


def pilot_table(results: Sequence[Result]) -> Table:
    """Standard deviations over the pilot's seeds, and the seeds that the margin needs."""
    columns: Columns = {
        "pilot seeds per side": lambda result: str(result.seeds),
        "std of timm": lambda result: f"{100 * result.reference_std:.2f} points",
        "std of vitx": lambda result: f"{100 * result.candidate_std:.2f} points",
        "margin": lambda result: f"{100 * result.margin:.1f} points",
        "seeds for 90 % power": lambda result: str(result.seeds_needed),
    }
    return table(standing(results, kinds.Pilot), columns | WHERE)


def step_table(results: Sequence[Result]) -> Table:
    """Whole training steps, data included, in pairs."""

    def rate(side: str) -> Callable[[Timed], str]:
        def cell(result: Timed) -> str:
            timed: Side | None = getattr(result.comparison, side)
            return f"{timed.rate.median:,.0f}" if timed and timed.rate else "–"

        return cell

    columns: Columns = {
        **{side: (lambda result, side=side: getattr(result, side)) for side in SIDES},
        "compile": TIMING["compile"],
        **{f"{side} images/s": rate(side) for side in SIDES},
        "ratio (95 %)": RATIO["images/s ratio (95 %)"],
    }
    steps = standing(results, Step, lambda result: result.name)
    return table(steps, columns | VERDICT | WHERE)


def whole_table(results: Sequence[Result]) -> Table:
    """What surrounds the arithmetic of a step, and the time before the first one."""
    body = []
    for start in standing(results, kinds.Start):
        middle, least, most = (of(start.seconds) for of in (statistics.median, min, max))
        text = f"{middle:.1f} s ({least:.1f} to {most:.1f})"
        what = "from the start of the program to the end of the first step, median (range)"
        body.append((what, text, machine(start)))
    steps = standing(results, Step, lambda result: result.name)
    body += [(*line, machine(step)) for step in steps if not step.untimed for line in _around(step)]
    header = (f"scratch-cifar10, {CIFAR10_IMAGES:,} images in memory", "measured", "machine")
    return Table(header, body)


def _around(step: Step) -> list[tuple[str, str]]:
    """What a comparison of whole steps says of what surrounds their arithmetic."""
    lines, ratio, reference = [], step.comparison.ratio, step.comparison.reference
    if step.data_share is not None:
        share = f"{step.data_share:.1%}"
        lines.append(("reading and varying a batch, share of the step's time", share))
    if step.name == "wandb" and ratio:
        low, value, high = (1 / end - 1 for end in (ratio.high, ratio.value, ratio.low))
        lines.append(
            ("time that W&B offline adds (95 %)", f"{value:+.1%} ({low:+.1%} to {high:+.1%})")
        )
    if step.name == "epoch" and reference and reference.rate:
        seconds = 100 * CIFAR10_IMAGES / reference.rate.median
        lines.append(("100 epochs of plain PyTorch with its test curve, projected from one run's "
                      "rate", f"{seconds:,.0f} s"))  # fmt: skip
    return lines


def gate_table(results: Sequence[Result]) -> Table:
    """Commits beside others: ratio, floor, and whether the gate let them pass."""

    def key(result: kinds.Gate) -> Hashable:
        config = result.comparison.config
        return (result.candidate, result.reference, result.model, config.mode, config.processes,
                result.comparison.batch, config.pair_s, config.block_s)  # fmt: skip

    def processes(result: kinds.Gate) -> str:
        config = result.comparison.config
        return f"{config.processes} of {config.pair_s:g} s, blocks of {config.block_s:g} s"

    columns: Columns = {
        "commit": lambda result: result.candidate[:7],
        "against": lambda result: result.reference[:7],
        "model": lambda result: result.model,
        "mode": TIMING["mode"],
        "batch": TIMING["batch"],
        "processes": processes,
    }
    judged: Columns = {
        "threshold": lambda result: f"{result.threshold:.0%}",
        "gate": lambda result: result.outcome,
    }
    return table(standing(results, kinds.Gate, key), columns | RATIO | FLOOR | judged | WHERE)


def pretrained_table(results: Sequence[Result]) -> Table:
    """Accuracy of the same weights in timm and in vitx."""

    def key(result: Pretrained) -> Hashable:
        return result.reference, result.weights, result.data, result.images

    header = ("model", "weights", "data", "images", "top-1 (standard error)", "top-5",
              "predictions identical", "images/s", "machine")  # fmt: skip
    body = []
    for result in standing(results, Pretrained, key):
        images = f"{result.images:,}"
        sides = ((result.reference, result.of_reference), (result.candidate, result.of_candidate))
        for name, side in sides:
            body.append((name, result.weights, result.data, images,
                         side.top1_text(result.images), f"{side.top5:.2%}",
                         f"{result.identical:,} of {images}",
                         f"{result.images / side.seconds:,.1f}", machine(result)))  # fmt: skip
    return Table(header, body)


def check_table(results: Sequence[Result]) -> Table:
    """What a device computes beside a CPU, and whether it lies within its band."""
    header = ("machine", "compared with a CPU", "apart", "band", "within it")
    checks = standing(results, kinds.Check)
    body = [(machine(result), *line) for result in checks for line in result.deviations()]
    return Table(header, body)
