"""The verdict table and its figure: a line per claim, a column per kind of device."""

from collections import Counter
from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks import kinds
from benchmarks.kinds import Accuracy, EqualResult, Mutants, Speed
from benchmarks.report import calibration, plots
from benchmarks.report.tables import claimed, model_name, size_name, standing, tested
from experiments.study.pages import Table, floor_text, interval_text, machine, ratio_text
from experiments.study.results import Result, latest, of_kind
from vitx.measure.equality import largest
from vitx.measure.stats import mean_interval

PLANTED_BUGS = "bugs of one word, planted in the source, that this check catches"
TRIALS = "trials in which this timing saw a difference"


def headline(results: Sequence[Result]) -> Table:
    """The verdict table: a line per claim; a column for each kind of device and packed file."""
    machines = _machines(results)
    columns = sorted(machines)
    lines: dict[str, dict[str, list[str]]] = {}
    for result in _evidence(results):
        line, text = claim(result, results)
        lines.setdefault(line, {}).setdefault(machine(result), []).append(text)
    body = [
        (line, *("; ".join(texts.get(machines[column], ["–"])) for column in columns))
        for line, texts in lines.items()
    ]
    series = [
        calibration.complete([r for r in results if _column(r) == column]) for column in columns
    ]
    if any(series):
        cells = (calibration.summary(trials) if trials else "–" for trials in series)
        body.append((TRIALS, *cells))
    return Table(("claim", *(machines[column] for column in columns)), body)


def sentence(results: Sequence[Result]) -> str:
    """Three numbers for a first look: a ratio, the largest error, an accuracy."""
    shown = _machines(results).values()
    evidence = [result for result in _evidence(results) if machine(result) in shown]
    speeds = [
        speed for speed in of_kind(evidence, Speed)
        if (speed.comparison.config.mode, speed.comparison.config.compile) == ("inference", "none")
    ]  # fmt: skip
    equal, accuracy = of_kind(evidence, EqualResult)[-1], of_kind(evidence, Accuracy)[-1]
    speed = speeds[0]
    return (
        f"On {machine(speed)}, eager inference of {vit(speed)} at batch "
        f"{speed.comparison.batch} runs at {ratio_text(speed.comparison)} times timm's images per "
        "second. Outputs and all "
        f"gradients in float64 equal timm's in {_equal_text(equal, results)}. A ViT trained from "
        f"scratch reaches {interval_text(mean_interval(accuracy.candidate_values), '.2%')} test "
        f"accuracy on {accuracy.data}."
    )


def speed_figure(results: Sequence[Result]) -> Figure:
    """A forest plot of what was timed on the verdict table's machines, with their names where there
    are several."""
    machines = _machines(results).values()
    timed = [r for r in claimed(results) if r.comparison.ratio and machine(r) in machines]
    several = len({machine(result) for result in timed}) > 1
    bars = []
    for result in timed:
        comparison = result.comparison
        assert comparison.ratio is not None
        label = (
            f"{vit(result)}, {comparison.config.mode}, "
            f"{'eager' if comparison.config.compile == 'none' else 'compiled'}, "
            f"batch {comparison.batch}"
        )
        bars.append(
            plots.Bar(
                label + (f"\n{machine(result)}" if several else ""),
                comparison.ratio,
                floor=comparison.floor,
            )
        )
    return plots.ratios(bars, title="vitx over timm, with the same weights")


def _machines(results: Sequence[Result]) -> dict[tuple[str, str], str]:
    """The machine that stands for each kind of device and packed file in verdict table and figure:
    the one that most claims were measured on, the later one if they are equal. The other tables
    show all."""
    evidence = _evidence(results)
    counts = Counter(machine(result) for result in evidence)
    machines: dict[tuple[str, str], str] = {}
    for result in sorted(evidence, key=lambda result: result.when):
        column, name = _column(result), machine(result)
        if counts[name] >= counts[machines.get(column, "")]:
            machines[column] = name
    return machines


def _column(result: Result) -> tuple[str, str]:
    """The kind of device and the packed file that a result is of."""
    return result.device.partition(":")[0], result.origin


def _evidence(results: Sequence[Result]) -> list[Result]:
    """The results behind the verdict table, in its order."""
    accuracies = standing(results, Accuracy, lambda result: result.data)
    checks = standing(results, EqualResult), standing(results, Mutants)
    return [*checks[0], *checks[1], *claimed(results), *accuracies]


def claim(result: Result, results: Sequence[Result]) -> tuple[str, str]:
    """A result's line in the verdict table: the claim, and what was measured."""
    if isinstance(result, EqualResult):
        return "float64 outputs and all gradients equal timm's", _equal_text(result, results)
    if isinstance(result, Mutants):
        common = f"{result.caught_by_common_check} of {result.planted}"
        other = f"comparing logits at default init to 1e-4: {common}"
        return PLANTED_BUGS, f"{result.caught} of {result.planted} ({other})"
    if isinstance(result, Accuracy):
        mean = interval_text(mean_interval(result.candidate_values), ".2%")
        within = f" to timm within {100 * result.margin:.0f} point" if tested(result) else ""
        return accuracy_claim(result), f"{mean}, {result.seeds} seeds; {result.verdict}{within}"
    assert isinstance(result, Speed)
    return speed_claim(result), _speed_text(result)


def accuracy_claim(result: Accuracy) -> str:
    """What an accuracy is a claim of."""
    return f"test accuracy on {result.data}, from scratch"


def speed_claim(result: Speed) -> str:
    """What a timing is a claim of."""
    config = result.comparison.config
    how = "eager" if config.compile == "none" else "compiled"
    return f"images per second over timm's, {config.mode}, {how}"


def vit(result: kinds.Pair) -> str:
    """ViT-Ti/16 for vit_tiny_patch16_224."""
    name, size = model_name(result), size_name(model_name(result))
    return name if size == name else f"ViT-{size}"


def _speed_text(result: kinds.Timed) -> str:
    comparison = result.comparison
    text = f"{vit(result)}, batch {comparison.batch}: {ratio_text(comparison)}"
    if comparison.floor is None:
        return text
    return f"{text}, floor {floor_text(comparison)}, {comparison.verdict}"


def _equal_text(result: EqualResult, results: Sequence[Result]) -> str:
    """How many models are equal on the machine of this result."""
    same = [r for r in of_kind(results, EqualResult) if machine(r) == machine(result)]
    models = latest(same, lambda result: result.reference)
    error = largest(
        error for r in models for error in (r.equality.output_error, r.equality.gradient_error)
    )
    passed = sum(r.verdict == "equal" for r in models)
    return f"{passed} of {len(models)} models, largest relative error {error:.0e}"
