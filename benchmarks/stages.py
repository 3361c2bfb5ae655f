"""The stages of the main job: equality, speed, controls, pilot, accuracy; each adds its results."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import accuracy, kinds, mutants, speed
from benchmarks.accuracy import SeedRun
from benchmarks.report import page, plots
from benchmarks.report.tables import claimed, speed_table, speeds
from benchmarks.report.verdicts import speed_figure
from experiments.recipes import DIGITS
from experiments.study.pages import floor_text, ratio_text
from experiments.study.results import AnyResult, Result, Results
from experiments.study.runs import lasting
from vitx import data, pictures
from vitx.data.images import Files
from vitx.measure.comparison import NO_VERDICT, Comparison
from vitx.measure.equality import Equality
from vitx.measure.timing import TimingConfig
from vitx.model.vit import build
from vitx.registry import UserError, nearest
from vitx.settings import override
from vitx.training import tracking
from vitx.training.config import TrainConfig
from vitx.training.evaluate import predict, svm_accuracy

CPU = torch.device("cpu")
GPU_BATCH = 128
TRAINED = "trained"
"""Folder of the trained models, in the run's."""
TINY = {"img_size": 32, "depth": 2}
EAGER = (("inference", "none"), ("training", "none"))
Models = tuple[tuple[str, dict[str, int]], ...]
"""timm's names, with the options that a model is made with."""
EQUAL_MODELS: Models = tuple(
    (name, {})
    for name in (
        "vit_tiny_patch16_224",
        "vit_small_patch16_224",
        "vit_base_patch16_224",
        "vit_small_patch32_224",
        "vit_small_patch14_reg4_dinov2",
        "deit3_small_patch16_224",
        "vit_base_patch16_gap_224",
    )
)
"""Compared in `--full`; the quick run compares what it times."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of each stage a run does."""

    name: str
    timed: Models
    configurations: tuple[tuple[str, str], ...]
    """Mode and compile mode of each."""
    equal: Models
    config: TimingConfig
    batch: int = 8
    seeds: int = 5
    recipe: TrainConfig = DIGITS
    """What both sides are trained by."""
    trajectory_steps: int = 50
    careful: bool = False
    """Time known cases, score the equality check, run the pilot."""


QUICK = Scale(
    name="quick",
    timed=(("vit_tiny_patch16_224", {}),),
    configurations=(*EAGER, ("inference", "default")),
    equal=(("vit_tiny_patch16_224", {}),),
    config=TimingConfig(processes=10, pair_s=6.0, warm_up_s=speed.warm_up_s(CPU)),
    batch=2,
)
SMOKE = Scale(
    name="smoke",
    timed=(("vit_tiny_patch16_224", TINY),),
    configurations=EAGER,
    equal=(("vit_tiny_patch16_224", TINY),),
    config=TimingConfig(processes=1, pair_s=0.1, block_s=0.01, warm_up_s=0.1),
    batch=2,
    seeds=2,
    recipe=override(DIGITS, steps=4),
    trajectory_steps=3,
)
FULL = Scale(
    name="full",
    timed=(("vit_tiny_patch16_224", {}), ("vit_small_patch16_224", {})),
    configurations=(*EAGER, ("inference", "default"), ("training", "default")),
    equal=EQUAL_MODELS,
    config=TimingConfig(processes=10, pair_s=20.0, warm_up_s=20.0),
    seeds=10,
    careful=True,
)


def grown(scale: Scale, device: torch.device, cifar10: str = "") -> Scale:
    """The scale for the device: a GPU gets a larger model and batch, in its usual dtype.

    And CIFAR-10, where its folder is given. Raises ValueError for that elsewhere.
    """
    if cifar10 and scale is SMOKE:
        raise UserError(f"cifar10 = {cifar10!r} is not for --smoke, which trains on digits")
    if device.type != "cuda" and cifar10:
        raise UserError(f"cifar10 = {cifar10!r} is for a GPU; accuracy is compared on digits here")
    if device.type != "cuda" or scale is SMOKE:
        return scale
    recipe = override(accuracy.CIFAR10, **{"data.root": cifar10}) if cifar10 else scale.recipe
    large: Models = (("vit_base_patch16_224", {}),)
    warm_up_s = max(scale.config.warm_up_s, speed.warm_up_s(device))
    return replace(
        scale,
        timed=large if scale is QUICK else (*scale.timed[1:], *large),
        equal=large if scale is QUICK else scale.equal,
        config=replace(scale.config, dtype=speed.usual(device)[1], warm_up_s=warm_up_s),
        batch=GPU_BATCH,
        recipe=recipe,
    )


def narrow(scale: Scale, models: Sequence[str]) -> Scale:
    """The scale with only the named models timed, so that a long run can be made in pieces."""
    timed = dict(scale.timed)
    for name in models:
        if name not in timed:
            raise UserError(f"model = {name!r} is not timed here; {nearest(name, timed)}")
    return replace(scale, timed=tuple((n, timed[n]) for n in models)) if models else scale


@dataclass
class Job:
    """A run of the main job: its settings, its results so far, and where things go."""

    scale: Scale
    device: torch.device
    results: Results
    run: tracking.Run
    figures: dict[str, Path] = field(default_factory=dict)
    checked: dict[str, Equality] = field(default_factory=dict)
    seeds_needed: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def folder(self) -> Path:
        return self.run.folder

    def say(self, line: str) -> None:
        """A line with the minutes since the start; it does not tear a progress bar."""
        minutes, seconds = divmod(int(time.perf_counter() - self.started), 60)
        tqdm.write(f"[{minutes:02d}:{seconds:02d}] {line}", file=sys.stdout)
        sys.stdout.flush()

    def add(self, kind: type[AnyResult], **values: Any) -> AnyResult:
        """A result, on disk and as numbers in W&B."""
        result = self.results.add(kind, **values)
        self.run.log({tracking.ROW: len(self.results.kept), **_numbers(result)})
        return result

    def save(self, name: str, figure: Figure) -> None:
        """Keep a figure as SVG for the report and as PNG for W&B."""
        pictures.save(figure, self.run.figures / f"{name}.png")
        self.figures[name] = pictures.save(figure, self.run.figures / f"{name}.svg")


def _numbers(result: Result) -> dict[str, float]:
    """What goes to W&B of a result, under names that say of what."""
    if isinstance(result, kinds.Accuracy):
        return {f"accuracy/{result.data}/p_equivalence": result.p_equivalence}
    if not isinstance(result, kinds.Timed) or (ratio := result.comparison.ratio) is None:
        return {}
    comparison, model = result.comparison, result.reference.partition(":")[2]
    config = comparison.config
    values = {"ratio": ratio.value}
    if comparison.floor is not None:
        values |= {"ratio_low": ratio.low, "ratio_high": ratio.high}
        values |= {"noise_floor": comparison.floor}
    place = f"{result.kind}/{model}/{config.mode}/{config.compile}"
    return {f"{place}/{name}": value for name, value in values.items()}


def check_equality(job: Job) -> None:
    """float64 outputs and all gradients; the mutation score in the full run."""
    for name, options in job.scale.equal:
        pair = speed.make_pair(name, batch=2, device=job.device, **options)
        checked = job.checked[name] = speed.check(pair)
        verdict = "equal" if checked.passed else "not equal"
        job.add(kinds.EqualResult, **pair.labels, batch=2, equality=checked, verdict=verdict)
        job.say(f"{name}: {checked}")
    if job.scale.careful:
        scores = mutants.score()
        result = job.add(
            kinds.Mutants,
            reference="timm",
            candidate="vitx",
            caught=sum(score.caught for score in scores),
            caught_by_common_check=sum(score.caught_by_common_check for score in scores),
            planted=len(scores),
        )
        common = result.caught_by_common_check
        job.say(f"planted bugs caught: {result.caught} of {result.planted}; commonly: {common}")


def time_speed(job: Job) -> None:
    """Every configuration of every timed model, in pairs."""
    for name, options in job.scale.timed:
        pair = speed.make_pair(name, batch=job.scale.batch, device=job.device, **options)
        checked = job.checked.get(name) or speed.check(pair)
        for mode, compiled in job.scale.configurations:
            config = replace(job.scale.config, mode=mode, compile=compiled)
            what = f"{name} {mode}, compile {compiled}"
            add_speed(job, pair, config, what, checked)


def add_speed(
    job: Job, pair: speed.Pair, config: TimingConfig, what: str, checked: Equality | None = None
) -> None:
    """One timed configuration: its result, and a line for people; a smoke run gives no verdict."""
    with timing(job, what) as places:
        comparison = speed.time_pair(pair, config, checked=checked, say=job.say, **places)
        if job.scale.name == "smoke" and not comparison.untimed:
            comparison = replace(comparison, verdict=NO_VERDICT)
        job.add(kinds.Speed, **pair.labels, comparison=comparison)
    say_ratio(job, what, comparison)


def time_controls(job: Job) -> None:
    """Known cases: a slowdown of counted size, which must be found, and none, which must not.

    And the first configuration once more without `machine.keep_memory`, which shows what that does.
    """
    name, options = job.scale.timed[0]
    pair = speed.make_pair(name, batch=job.scale.batch, device=job.device, **options)
    for share in (speed.PLANTED, 0.0):
        what = f"planted slowdown of {share:.0%}" if share else "timm against itself"
        with timing(job, what) as places:
            values = speed.control(pair, job.scale.config, share, say=job.say, **places)
            result = job.add(kinds.Control, **values)
        say_ratio(job, what, result.comparison)
    config = replace(job.scale.config, keep_memory=False)
    add_speed(job, pair, config, f"{name} {config.mode}, freed memory as by default")


@contextmanager
def timing(job: Job, what: str) -> Iterator[dict[str, Path]]:
    """The folders of a timing, whose large files are removed after it."""
    job.say(f"{what} …")
    folder = job.folder / f"job-{len(job.results.kept)}"
    yield {"folder": folder, "cache": job.folder / "cache"}
    for path in folder.rglob("*.pt"):
        path.unlink()


def say_ratio(job: Job, what: str, comparison: Comparison) -> None:
    """A line for people."""
    ratio, floor = ratio_text(comparison), floor_text(comparison)
    reason = f", {comparison.reason}" if comparison.reason else ""
    job.say(f"{what}: {ratio}, floor {floor}: {comparison.verdict}{reason}")


def train_both(job: Job) -> None:
    """Trajectory, then both sides over seeds; beside digits a support vector machine."""
    config, steps = job.scale.recipe, job.scale.trajectory_steps
    apart = accuracy.trajectory(config, steps)
    job.say(
        f"same weights and batches, float64: losses of {steps} steps differ by {apart:.1e} "
        "(relative)"
    )
    dataset = data.load(config.data, size=config.model.size)
    svm = svm_accuracy(dataset) if config.data.name == DIGITS.data.name else None
    labels = {
        "data": config.data.name,
        "device": str(job.device),
        "reference": "timm:VisionTransformer(weight_init='jax')",
        "candidate": "vitx:build(init='xavier')",
    }
    seeds = range(max(job.scale.seeds, job.seeds_needed))
    runs = train_seeds(job, seeds, TRAINED, labels)
    if not runs:
        return
    fields = accuracy.equivalence_fields(runs)
    if job.scale.name == "smoke":
        fields["verdict"] = NO_VERDICT
    result = job.add(
        kinds.Accuracy,
        **labels,
        trajectory_error=apart,
        trajectory_steps=steps,
        svm=svm,
        test_images=len(dataset.test),
        config=lasting(config),
        **fields,
    )
    margin = f"margin {result.margin:.0%}"
    job.say(f"{result.verdict}: difference {result.difference:+.2%}, {margin}")
    draw_accuracy(job, dataset, runs, svm)
    lines = [[run.side, run.seed, run.accuracy, run.loss, run.seconds] for run in runs]
    job.run.table(result.data, ("side", "seed", "accuracy", "loss", "seconds"), lines)


def pilot(job: Job) -> None:
    """A few seeds that no other result uses, read on validation, to fix the number of seeds."""
    config = job.scale.recipe
    labels = {"data": config.data.name, "reference": "timm", "candidate": "vitx"}
    runs = train_seeds(job, accuracy.PILOT_SEEDS, "pilot", labels, split="validation")
    if not runs:
        return
    result = job.add(kinds.Pilot, **labels, **accuracy.pilot_fields(runs, config.data.val))
    job.seeds_needed = result.seeds_needed
    job.say(f"seeds per side that the margin needs: {result.seeds_needed}")


def train_seeds(
    job: Job, seeds: Sequence[int], folder: str, labels: dict[str, str], *, split: str = "test"
) -> list[SeedRun]:
    """Both sides for every seed; none, and a `Failure`, if a training failed."""
    where, device = job.folder / folder, job.device
    try:
        return accuracy.train_all(
            seeds, where, job.scale.recipe, device=device, say=job.say, split=split
        )
    except accuracy.Failed as failure:
        job.add(kinds.Failure, **labels, reason=str(failure))
        job.say(f"accuracy failed: {failure}")
        return []


def draw_accuracy(
    job: Job, dataset: data.Dataset, runs: Sequence[SeedRun], svm: float | None
) -> None:
    """The figures of the accuracy stage, and the mean curve of each side in W&B."""
    sides = {side: accuracy.of_side(runs, side) for side in ("timm", "vitx")}
    counts = torch.tensor([run.confusion for run in sides["vitx"]]).sum(dim=0).numpy()
    title = f"{len(sides['vitx'])} seeds of vitx, {counts.sum():,} predictions"
    accuracies = {side: [run.accuracy for run in of] for side, of in sides.items()}
    curves = {side: [run.curve for run in of] for side, of in sides.items()}
    job.save("accuracy", plots.accuracies(accuracies, other=svm, label="RBF SVM"))
    job.save("curves", plots.curves(curves, label="validation accuracy"))
    job.save("confusion", pictures.confusion(counts, dataset.classes, title=title))
    job.save("attention", attention(job, dataset, sides["vitx"][0].seed))
    name = job.scale.recipe.data.name
    for position, (step, _) in enumerate(sides["vitx"][0].curve):
        means = {
            f"{name}/{side}/{tracking.VAL_ACCURACY}": statistics.mean(
                curve[position][1] for curve in of
            )
            for side, of in curves.items()
        }
        job.run.log({tracking.STEP: step, **means})


def attention(job: Job, dataset: data.Dataset, seed: int) -> Figure:
    """Test images, two of them classified wrongly if there are, and what the class token reads."""
    config, test = job.scale.recipe.model, dataset.test
    assert not isinstance(test, Files)
    vit = build(config)
    weights = job.folder / TRAINED / f"vitx-{seed}.pt"
    vit.load_state_dict(torch.load(weights, weights_only=True))
    vit.eval()
    logits, *_ = predict(vit, dataset, test)
    guess = logits.argmax(dim=1)
    wrong = (guess != test.target).nonzero().flatten()[:2].tolist()
    first = [int((test.target == label).nonzero()[0]) for label in range(10 - len(wrong))]
    shown = [*first, *wrong]
    with torch.no_grad():
        maps = vit.attention_maps(dataset.normalise(test.image[shown].float()))
    read = pictures.class_attention(maps, grid=config.grid, prefix=config.prefix, size=config.size)
    names = dataset.classes
    return pictures.attention_grid(
        test.image[shown] / dataset.peak,
        {"read": read},
        [names[int(test.target[k])] for k in shown],
        [names[int(guess[k])] for k in shown],
    )


def write_report(job: Job) -> None:
    """report.md and report.html from the results so far."""
    results = job.results.kept
    if not results:
        return
    if any(result.comparison.ratio for result in claimed(results)):
        job.save("speed", speed_figure(results))
    page.write(job.folder, f"vitx against timm, {job.scale.name} run", results, job.figures)


def finish(job: Job) -> None:
    """Tables, figures and final values to W&B."""
    shown = speed_table(job.results.kept)
    job.run.table("speed", shown.header, shown.body)
    timed = [result for result in speeds(job.results.kept) if result.comparison.ratio]
    for name, path in job.figures.items():
        job.run.figure(name, path.with_suffix(".png"))
    values: dict[str, float] = {tracking.ROW: len(job.results.kept)}
    rates = [rate.median for result in timed if (rate := result.comparison.candidate.rate)]
    if rates:  # the first configuration's, so that runs of one scale can be compared
        values[tracking.IMAGES_PER_S] = rates[0]
    job.run.summarise(values)


def stages(scale: Scale) -> dict[str, tuple[float, Callable[[Job], None]]]:
    """Each stage's minutes on two cores, by its counts, and its function."""
    # Seconds on two cores: a process takes about 1.5 beside its blocks, the two models alone and
    # the first imports about 30 for each configuration, and a training step of digits 0.032 / 2, as
    # two train at a time.
    process_s = 1.5 + scale.config.warm_up_s + scale.config.pair_s
    per_configuration = 30 + scale.config.processes * process_s
    configurations = len(scale.timed) * len(scale.configurations)
    training = scale.recipe.steps * 0.032 / 60
    every: dict[str, tuple[float, Callable[[Job], None]]] = {
        "equality": (0.1 + 0.3 * (len(scale.equal) - 1), check_equality),
        "speed": (configurations * per_configuration / 60, time_speed),
        "controls": (3 * per_configuration / 60, time_controls),
        "pilot": (0.1 + len(accuracy.PILOT_SEEDS) * training, pilot),
        "accuracy": (0.1 + scale.seeds * training, train_both),
    }
    left_out = set() if scale.careful else {"controls", "pilot"}
    return {name: stage for name, stage in every.items() if name not in left_out}
