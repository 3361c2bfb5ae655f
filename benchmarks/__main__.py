"""The main job: vitx against timm in equality, speed and accuracy, with a report.

`python -m benchmarks [--smoke | --full] [--out DIR]`. Rows are on disk as soon as they are found;
the report is written anew after every stage.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import accuracy, calibration, check, mutants, pretrained, render, speed, trials
from benchmarks.report import claims, page, plots
from experiments import cli
from experiments.recipes import DIGITS
from experiments.study import rows as rows_file
from experiments.study.runs import lasting
from vitx import data, pictures
from vitx.measure.compare import TimingConfig
from vitx.measure.equality import Equality
from vitx.model.vit import build
from vitx.registry import nearest
from vitx.settings import flat, override
from vitx.training import parallel, tracking
from vitx.training.config import TrainConfig
from vitx.training.evaluate import predict, svm_accuracy

EQUAL_MODELS = (
    ("vit_tiny_patch16_224", {}),
    ("vit_small_patch16_224", {}),
    ("vit_base_patch16_224", {}),
    ("vit_small_patch32_224", {}),
    ("vit_small_patch14_reg4_dinov2", {}),
    ("deit3_small_patch16_224", {}),
    ("vit_base_patch16_gap_224", {}),
)
"""Compared in `--full`; the quick run compares what it times."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of each stage a run does."""

    name: str
    timed: tuple[tuple[str, dict], ...]
    configurations: tuple[tuple[str, str], ...]
    equal: tuple[tuple[str, dict], ...]
    plan: TimingConfig
    batch: int = 8
    seeds: int = 5
    recipe: TrainConfig = DIGITS
    """What both sides are trained by."""
    trajectory_steps: int = 50
    careful: bool = False
    """Time known cases, score the equality check, run the pilot."""


CPU = torch.device("cpu")
GPU_BATCH = 128
TRAINED = "trained"
"""Folder of the trained models, in the run's."""
TINY = {"img_size": 32, "depth": 2}
EAGER = (("inference", "none"), ("training", "none"))
QUICK = Scale(
    name="quick",
    timed=(("vit_tiny_patch16_224", {}),),
    configurations=(*EAGER, ("inference", "default")),
    equal=(("vit_tiny_patch16_224", {}),),
    plan=TimingConfig(processes=10, pair_s=6.0, warm_up_s=speed.warm_up_s(CPU)),
    batch=2,
)
SMOKE = Scale(
    name="smoke",
    timed=(("vit_tiny_patch16_224", TINY),),
    configurations=EAGER,
    equal=(("vit_tiny_patch16_224", TINY),),
    plan=TimingConfig(processes=1, pair_s=0.1, block_s=0.01, warm_up_s=0.1),
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
    plan=TimingConfig(processes=10, pair_s=20.0, warm_up_s=20.0),
    seeds=10,
    careful=True,
)


@dataclass(frozen=True)
class Settings:
    """Compare vitx with timm: equality, paired speed, accuracy, report.

    The budget is told before the start. --smoke takes about a minute.
    """

    smoke: bool = False
    """Every stage, tiny, no verdicts."""
    full: bool = False
    """The careful run: S/16 too, compiled training, longer timing, 10 seeds, controls."""
    out: Path = tracking.OUT / "benchmarks"
    """Folder; a run makes its own inside, named by time."""
    device: str = ""
    """Device; empty for the accelerator of this machine, else the CPU."""
    wandb: str = ""
    """W&B mode: online, offline or disabled; empty for WANDB_MODE, else offline."""
    cifar10: str = ""
    """Folder of CIFAR-10's images; on a GPU accuracy is then compared on them, else on digits."""
    check: bool = False
    """Whether the device computes what the CPU does, in about a minute; nothing else."""
    calibrate: int | None = None
    """Make so many of the trials that say how often the timing is wrong; nothing else."""
    accuracy: str | None = None
    """A timm name, or a folder or file of timm's weights, whose accuracy is read on --data."""
    data: Path = Path("val")
    """Folder of --accuracy: one of pictures for each class."""
    batch: int = 64
    """Images a batch of --accuracy."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STAGE")] = ()
    """Stages to run: equality, speed, accuracy; in the full run controls and pilot too."""
    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ()
    """Of the models that the scale times, those to time now; all if empty."""


@dataclass
class Job:
    """A run of the main job: its settings, its rows so far, and where things go."""

    scale: Scale
    device: torch.device
    rows: rows_file.Rows
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

    def add(self, kind: str, **fields: object) -> dict:
        """A row, on disk and as numbers in W&B."""
        row = self.rows.add(kind, **fields)
        name = "/".join(str(row[key]) for key in ("mode", "compile") if key in row) or "value"
        model = str(row.get("reference", "")).partition(":")[2]
        model = model or row.get("data", "all")
        values = {
            f"{kind}/{model}/{name}/{key}": row[key]
            for key in ("ratio", "ratio_low", "ratio_high", "noise_floor", "p_equivalence")
            if isinstance(row.get(key), float)
        }
        self.run.log({tracking.ROW: len(self.rows.kept), **values})
        return row


def main(args: list[str]) -> None:
    """Read the settings, tell the budget, run the stages, print the verdicts and the places."""
    settings = cli.parse(Settings, args, prog="python -m benchmarks")
    modes = ("smoke", "full", "check", "calibrate", "accuracy")
    given = {mode: getattr(settings, mode) for mode in modes}
    # --calibrate 0, which equals False, is asked for too.
    asked = [mode for mode, value in given.items() if value is not None and value is not False]
    if len(asked) > 1:
        raise ValueError(f"--{', --'.join(modes)} exclude each other; choose one")
    cli.goes_with(settings, data="accuracy", batch="accuracy")
    for mode, program in (("check", check_device), ("calibrate", calibrate), ("accuracy", read)):
        if mode in asked:
            for name in ("only", "models", "cifar10"):
                if getattr(settings, name):
                    raise ValueError(f"--{name} does not go with --{mode}")
            program(settings)
            return
    scale = SMOKE if settings.smoke else FULL if settings.full else QUICK
    device = parallel.device(settings.device)
    scale = _narrow(grown(scale, device, settings.cifar10), settings.models)
    stages = _stages(scale)
    for name in settings.only:
        if name not in stages:
            raise ValueError(f"stage = {name!r} is not one of this scale; {nearest(name, stages)}")
    stages = {name: stage for name, stage in stages.items() if name in (settings.only or stages)}
    config = {"scale": scale.name, "device": str(device), **flat(scale.plan)}
    with _kept(settings, scale.name, config) as (run, rows):
        job = Job(scale, device, rows, run)
        job.say(f"{scale.name} run on {device}; {run.where}")
        for name, (minutes, _) in stages.items():
            job.say(f"budget: {name} about {minutes:.1f} min")
        for name, (_, stage) in tqdm(stages.items(), unit="stage", disable=not sys.stderr.isatty()):
            job.say(f"{name} …")
            stage(job)
            write_report(job)
        finish(job)
        where = run.where
    print(f"\n{render.headline(job.rows.kept).markdown()}\n")
    print(f"report: {job.folder / 'report.html'} and report.md; rows: {job.rows.path}\n{where}")
    if any(row["verdict"] == "not equal" for row in job.rows.kept if row["kind"] == "equality"):
        raise SystemExit(1)


def grown(scale: Scale, device: torch.device, cifar10: str = "") -> Scale:
    """The scale for the device: a GPU gets a larger model and batch, in its usual dtype.

    And CIFAR-10, where its folder is given. Raises ValueError for that elsewhere.
    """
    if cifar10 and scale is SMOKE:
        raise ValueError(f"cifar10 = {cifar10!r} is not for --smoke, which trains on digits")
    if device.type != "cuda" and cifar10:
        raise ValueError(f"cifar10 = {cifar10!r} is for a GPU; accuracy is compared on digits here")
    if device.type != "cuda" or scale is SMOKE:
        return scale
    recipe = override(accuracy.CIFAR10, **{"data.root": cifar10}) if cifar10 else scale.recipe
    large = (("vit_base_patch16_224", {}),)
    return replace(
        scale,
        timed=large if scale is QUICK else (*scale.timed[1:], *large),
        equal=large if scale is QUICK else scale.equal,
        plan=replace(
            scale.plan,
            dtype=speed.usual(device)[1],
            warm_up_s=max(scale.plan.warm_up_s, speed.warm_up_s(device)),
        ),
        batch=GPU_BATCH,
        recipe=recipe,
    )


def check_device(settings: Settings) -> None:
    """Print whether the device computes what the CPU does; exit 1 if not."""
    device = parallel.device(settings.device)
    with _kept(settings, "check", {"device": str(device)}) as (_, rows):
        row = rows.add("check", **check.run(device))
        print(f"{check.text(row)}\nrow: {rows.path}")
    if not all(row["within"].values()):
        raise SystemExit(1)


def read(settings: Settings) -> None:
    """Print the accuracy of weights in timm and in vitx."""
    cli.at_least(settings, batch=1)
    device, model = parallel.device(settings.device), settings.accuracy or ""
    values = {"model": model, "device": str(device)}
    fields = pretrained.measure(model, settings.data, batch=settings.batch, device=device)
    with _kept(settings, "accuracy", values) as (_, rows):
        row = rows.add("pretrained", **fields)
        print(f"{pretrained.text(row)}\nrow: {rows.path}")


def calibrate(settings: Settings) -> None:
    """Make the next trials of the calibration, and print what all of them say so far."""
    count = settings.calibrate or 0
    if count < 1:
        raise ValueError(f"calibrate = {count} must be at least 1")
    device = parallel.device(settings.device)
    scale = grown(QUICK, device)
    kept = [*render.RESULTS.glob("*.jsonl"), *settings.out.glob("*-calibration/rows.jsonl")]
    name, batch = scale.timed[0][0], scale.batch
    before = calibration.made(
        kept, scale.plan, reference=f"timm:{name}", batch=batch, device=device
    )
    done = {row["trial"] for row in before}
    left = [number for number in range(len(trials.shares())) if number not in done]
    with _kept(settings, "calibration", flat(scale.plan)) as (run, rows):
        job = Job(scale, device, rows, run)
        make = partial(speed.make_pair, name, batch=batch, device=device)
        numbers = left[:count]
        calibration.run(numbers, make, scale.plan, run.folder, job.add, job.say)
        print(f"{calibration.table([*before, *rows.kept]).markdown()}\nrows: {rows.path}")


@contextmanager
def _kept(
    settings: Settings, name: str, values: Mapping[str, Any]
) -> Iterator[tuple[tracking.Run, rows_file.Rows]]:
    """A run folder, named by time, and its rows."""
    folder = settings.out / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    with tracking.Run(settings.out, "benchmarks", folder.name, values, mode=settings.wandb or None,
                      folder=folder) as run:  # fmt: skip
        yield run, rows_file.Rows(folder)


def check_equality(job: Job) -> None:
    """float64 outputs and all gradients; the mutation score in the full run."""
    for name, options in job.scale.equal:
        pair = speed.make_pair(name, batch=2, device=job.device, **options)
        result, fields = speed.check(pair)
        job.checked[name] = result
        job.add("equality", **fields)
        job.say(f"{name}: {result}")
    if job.scale.careful:
        scores = mutants.score()
        caught = {
            "caught": sum(score.caught for score in scores),
            "caught_by_common_check": sum(score.caught_by_common_check for score in scores),
            "planted": len(scores),
        }
        job.add("calibration", what="mutants", reference="timm", candidate="vitx", **caught)
        job.say(f"planted bugs caught: {caught}")


def time_speed(job: Job) -> None:
    """Every configuration of every timed model, in pairs."""
    for name, options in job.scale.timed:
        pair = speed.make_pair(name, batch=job.scale.batch, device=job.device, **options)
        checked = job.checked.get(name) or speed.check(pair)[0]
        for mode, compiled in job.scale.configurations:
            plan = replace(job.scale.plan, mode=mode, compile=compiled)
            measure = partial(speed.time_pair, pair, plan, checked=checked, say=job.say)
            _time(job, measure, f"{name} {mode}, compile {compiled}")


def time_controls(job: Job) -> None:
    """Known cases: a slowdown of counted size, which must be found, and none, which must not.

    And the first configuration once more without `machine.keep_memory`, which shows what that does.
    """
    name, options = job.scale.timed[0]
    pair = speed.make_pair(name, batch=job.scale.batch, device=job.device, **options)
    for control, what in (
        (speed.plant, f"planted slowdown of {speed.PLANTED:.0%}"),
        (speed.null, "timm against itself"),
    ):
        _time(job, partial(control, pair, job.scale.plan, say=job.say), what)
    plan = replace(job.scale.plan, keep_memory=False)
    measure = partial(speed.time_pair, pair, plan, say=job.say)
    _time(job, measure, f"{name} {plan.mode}, freed memory as by default")


def train_both(job: Job) -> None:
    """Trajectory, then both sides over seeds; beside digits a support vector machine."""
    config = job.scale.recipe
    apart = accuracy.trajectory(config, job.scale.trajectory_steps)
    job.say(f"same weights and batches, float64: losses of {job.scale.trajectory_steps} steps "
            f"differ by {apart:.1e} (relative)")  # fmt: skip
    dataset = data.load(config.data, size=config.model.size)
    svm = svm_accuracy(dataset) if config.data.name == DIGITS.data.name else None
    folder = job.folder / TRAINED
    seeds = list(range(max(job.scale.seeds, job.seeds_needed)))
    results = accuracy.train_all(seeds, folder, config, device=job.device, say=job.say)
    labels = {
        "data": config.data.name,
        "device": str(job.device),
        "reference": "timm:VisionTransformer(weight_init='jax')",
        "candidate": "vitx:build(init='xavier')",
    }
    if _failed(job, results, labels):
        return
    fields = accuracy.row_fields(results)
    if job.scale.name == "smoke":
        fields["verdict"] = claims.NO_VERDICT
    row = job.add(
        "accuracy",
        **labels,
        trajectory_error=apart,
        trajectory_steps=job.scale.trajectory_steps,
        svm=svm,
        test_images=len(dataset.test),
        config=lasting(config),
        **fields,
    )
    job.say(f"{row['verdict']}: difference {row['difference']:+.2%}, margin {row['margin']:.0%}")
    _draw_accuracy(job, dataset, results, svm)
    columns = ("side", "seed", "accuracy", "loss", "seconds")
    job.run.table(config.data.name, columns, [[found[key] for key in columns] for found in results])


def pilot(job: Job) -> None:
    """A few seeds that no other result uses, read on validation, to fix the number of seeds."""
    seeds, config = list(accuracy.PILOT_SEEDS), job.scale.recipe
    results = accuracy.train_all(
        seeds, job.folder / "pilot", config, device=job.device, say=job.say, split="validation"
    )
    labels = {"what": "pilot", "data": config.data.name, "reference": "timm", "candidate": "vitx"}
    if _failed(job, results, labels):
        return
    row = job.add("calibration", **labels, **accuracy.pilot_fields(results, config.data.val))
    job.seeds_needed = row["seeds_needed"]
    job.say(f"seeds a side that the margin needs: {row['seeds_needed']}")


def _failed(job: Job, results: list[dict], labels: dict) -> bool:
    """A row for the first training that failed, if one did."""
    failures = [found["failure"] for found in results if "failure" in found]
    if failures:
        job.add("failure", **labels, reason=failures[0])
        job.say(f"accuracy failed: {failures[0]}")
    return bool(failures)


def write_report(job: Job) -> None:
    """report.md and report.html from the rows so far."""
    if not job.rows.kept:
        return
    if any(row["ratio"] is not None for row in render.claimed(job.rows.kept)):
        job.figures["speed"] = _save(job, "speed", render.speed_figure(job.rows.kept))
    title = f"vitx against timm, {job.scale.name} run"
    page.write(job.folder, title, page.sections_of(job.rows.kept, job.figures))


def finish(job: Job) -> None:
    """Tables, figures and final values to W&B."""
    timed = render.speed_rows(job.rows.kept)
    columns = ("reference", "mode", "compile", "ratio", "ratio_low", "ratio_high",
               "noise_floor", "verdict")  # fmt: skip
    job.run.table("speed", columns, [[row[key] for key in columns] for row in timed])
    for name, path in job.figures.items():
        job.run.figure(name, path.with_suffix(".png"))
    rates = [row["images_per_s"]["candidate"]["median"] for row in timed if row["images_per_s"]]
    # The first configuration's, so that runs of one scale can be compared.
    job.run.summarise({tracking.ROW: len(job.rows.kept)}
                      | ({tracking.IMAGES_PER_S: rates[0]} if rates else {}))  # fmt: skip


def _stages(scale: Scale) -> dict[str, tuple[float, Callable[[Job], None]]]:
    """Each stage's minutes on two cores, by its counts, and its function."""
    # Seconds on two cores: a process takes about 1.5 beside its blocks, the two models alone and
    # the first imports about 30 for each configuration, and a training step of digits 0.032 / 2, as
    # two train at a time.
    process_s = 1.5 + scale.plan.warm_up_s + scale.plan.pair_s
    per_configuration = 30 + scale.plan.processes * process_s
    configurations = len(scale.timed) * len(scale.configurations)
    training = scale.recipe.steps * 0.032 / 60
    stages = {
        "equality": (0.1 + 0.3 * (len(scale.equal) - 1), check_equality),
        "speed": (configurations * per_configuration / 60, time_speed),
        "controls": (3 * per_configuration / 60, time_controls),
        "pilot": (0.1 + len(accuracy.PILOT_SEEDS) * training, pilot),
        "accuracy": (0.1 + scale.seeds * training, train_both),
    }
    left_out = set() if scale.careful else {"controls", "pilot"}
    return {name: stage for name, stage in stages.items() if name not in left_out}


def _narrow(scale: Scale, models: tuple[str, ...]) -> Scale:
    """The scale with only the named models timed, so that a long run can be made in pieces."""
    timed = dict(scale.timed)
    for name in models:
        if name not in timed:
            raise ValueError(f"model = {name!r} is not timed here; {nearest(name, timed)}")
    return replace(scale, timed=tuple((n, timed[n]) for n in models)) if models else scale


def _time(job: Job, measure: Callable, what: str) -> None:
    """One timed configuration: its row, and a line for people; smoke rows carry no verdict."""
    job.say(f"{what} …")
    number = len(job.rows.kept)
    kind, fields = measure(folder=job.folder / f"job-{number}", cache=job.folder / "cache")
    if job.scale.name == "smoke" and kind == "speed":
        fields["verdict"] = claims.NO_VERDICT
    row = job.add(kind, **fields)
    job.say(f"{what}: {render.ratio_text(row)}, floor {render.floor_text(row)}: {row['verdict']}")
    for path in (job.folder / f"job-{number}").rglob("*.pt"):
        path.unlink()


def _draw_accuracy(job: Job, dataset: data.Dataset, results: list[dict], svm: float | None) -> None:
    sides = {side: [r for r in results if r["side"] == side] for side in ("timm", "vitx")}
    accuracies = {side: [r["accuracy"] for r in found] for side, found in sides.items()}
    counts = sum(torch.tensor(r["confusion"]) for r in sides["vitx"]).numpy()
    title = f"{len(sides['vitx'])} seeds of vitx, {counts.sum():,} predictions"
    drawn = {
        "accuracy": plots.accuracies(accuracies, reading=svm, label="RBF SVM"),
        "curves": plots.curves(
            {side: [r["curve"] for r in found] for side, found in sides.items()},
            metric=tracking.VAL_ACCURACY,
        ),
        "confusion": pictures.confusion(counts, dataset.classes, title=title),
        "attention": _attention(job, dataset, sides["vitx"][0]["seed"]),
    }
    for name, figure in drawn.items():
        job.figures[name] = _save(job, name, figure)
    for step_number, event in _mean_curve(sides, job.scale.recipe.data.name):
        job.run.log({tracking.STEP: step_number, **event})


def _mean_curve(sides: dict[str, list[dict]], name: str) -> Iterator[tuple[int, dict[str, float]]]:
    """Mean validation accuracy of each side, step by step."""
    for position, event in enumerate(sides["vitx"][0]["curve"]):
        yield (
            event[tracking.STEP],
            {
                f"{name}/{side}/{tracking.VAL_ACCURACY}": statistics.mean(
                    [r["curve"][position][tracking.VAL_ACCURACY] for r in found]
                )
                for side, found in sides.items()
            },
        )


def _save(job: Job, name: str, figure: Figure) -> Path:
    """The figure as SVG for the report and as PNG for W&B; the SVG's path."""
    pictures.save(figure, job.run.figures / f"{name}.png")
    return pictures.save(figure, job.run.figures / f"{name}.svg")


def _attention(job: Job, dataset: data.Dataset, seed: int) -> Figure:
    config = job.scale.recipe.model
    vit = build(config)
    vit.load_state_dict(torch.load(job.folder / TRAINED / f"vitx-{seed}.pt", weights_only=True))
    vit.eval()
    test = dataset.test
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


if __name__ == "__main__":
    cli.run(main)
