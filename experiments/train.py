"""Train one model: `python -m experiments.train RECIPE [--model.depth=6] [--dry-run]`."""

import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from experiments import cli
from experiments.recipes import RECIPES
from vitx.data.loader import steps_per_epoch
from vitx.files import read_json
from vitx.model.cost import cost
from vitx.registry import UserError, choose
from vitx.settings import delta, flat
from vitx.training import parallel, tracking
from vitx.training.checkpoint import BEFORE, LAST
from vitx.training.config import FREE, TrainConfig, identity, warm_up_warning

if TYPE_CHECKING:
    from vitx.training.prepare import Training

PROG = "python -m experiments.train"


@dataclass(frozen=True)
class Switches:
    """Train one model and keep its curve, summary and W&B run in a run folder."""

    dry_run: bool = False
    """Print configuration, parameters, MACs and steps; train nothing."""
    resume: bool = False
    """Go on with the last run of the same recipe and settings. With --folder, go on with the run
    in that folder, or start one in it if it holds no checkpoint yet."""
    out: Path = tracking.OUT
    """Folder of run folders; by default VITX_OUT, or runs."""
    folder: Path | None = None
    """Folder of this run; if not given, one of its own under --out."""
    wandb: str = ""
    """W&B mode: online, offline or disabled; empty for WANDB_MODE, else offline."""
    device: str = ""
    """Device; empty for the accelerator of this machine, else the CPU."""


def main(args: list[str]) -> None:
    """Read the recipe's name, then its settings; print what will be trained; train."""
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: {PROG} RECIPE [--setting=value …]\n\nrecipes: {', '.join(RECIPES)}")
        print(f"\nsettings of a recipe: {PROG} digits --help")
        raise SystemExit(0 if args else 2)
    name, *flags = args
    config, switches = read(choose("recipe", name, RECIPES), flags)
    place = parallel.launched()
    if place is None or place["RANK"] == 0:  # of torchrun's processes one talks
        describe(name, config)
        if warning := warm_up_warning(config):
            print(f"warning: {warning}", file=sys.stderr)
    if not switches.dry_run:
        train(name, config, switches)


def read(name: str, flags: list[str]) -> tuple[TrainConfig, Switches]:
    """The recipe with its fields overridden by flags, and the program's own switches."""
    field = Annotated[TrainConfig, tyro.conf.FlagConversionOff, tyro.conf.arg(name="")]
    kind = make_dataclass(
        "Settings", [("config", field, RECIPES[name])], bases=(Switches,), frozen=True
    )
    kind.__doc__ = Switches.__doc__
    settings = cli.parse(kind, flags, prog=f"{PROG} {name}")
    return settings.config, settings


def describe(name: str, config: TrainConfig) -> None:
    """Print what will be trained and what it costs; needs no data."""
    of_image, images = cost(config.model), config.data.train_images
    for key, value in flat(config).items():
        print(f"  {key} = {value}")
    epochs = "an unknown number of epochs"
    if images:
        per_epoch = steps_per_epoch(images, config.batch, drop_last=config.data.drop_last)
        epochs = f"{config.steps / per_epoch:.1f} epochs of {images:,}"
    print(
        f"{name}: {of_image.parameters:,} parameters, {of_image.macs:,} MACs an image forward, "
        f"{config.steps:,} steps of {config.batch} images ({epochs})"
    )


def train(name: str, config: TrainConfig, switches: Switches) -> None:
    """Train, in one process or as one of torchrun's; the first one writes and talks."""
    from vitx.training.parallel import gathered, processes, wait
    from vitx.training.prepare import prepare
    from vitx.training.state import Diverged
    from vitx.training.trainer import Stopped, train

    label = name_run(config, RECIPES[name])
    folder = switches.folder or (_last(switches.out / name, config) if switches.resume else None)
    if folder and not switches.resume and (folder / "run.json").exists():
        raise UserError(f"{folder} holds a run; add --resume to go on with it, or choose another")
    resume = folder if switches.resume and folder and _checkpoints(folder) else None
    with processes(parallel.device(switches.device)) as (part, device):
        if switches.resume and not resume and part.first:
            print(f"{folder} holds no checkpoint yet: the run starts at its first step")
        training = prepare(config, device=device, part=part, resume=resume)
        try:
            if part.first:
                values = {"recipe": name, "device": str(device)} | flat(config)
                mode, out = switches.wandb or None, switches.out
                with tracking.Run(out, name, label, values, mode=mode, folder=folder) as run:
                    record(training, run)
            else:
                train(training, folder=gathered(None, part)[0])
        except (Diverged, Stopped):  # raised in all processes after the same step
            wait(part)
            raise


def record(training: "Training", run: tracking.Run) -> None:
    """Train with a run folder and W&B; print the final scores with their standard errors."""
    from vitx.training.parallel import gathered
    from vitx.training.trainer import Stopped, train

    where = run.where  # as long as W&B runs
    print(where)
    try:
        result = train(training, run, folder=gathered(run.folder, training.state.part)[0])
    except Stopped as stopped:
        print(f"{stopped}; go on with: --resume --folder {run.folder}", file=sys.stderr)
        raise
    for split, score in (("validation", result.val), ("test", result.test)):
        if score.images:
            print(
                f"{split} accuracy {score.accuracy:.2%} ± {score.standard_error:.2%} (standard "
                f"error of {score.images:,} images), loss {score.loss:.4f}"
            )
    print(f"{result.seconds:.1f} s, {result.cpu_seconds:.1f} s of CPU\nrun: {run.folder}\n{where}")


def name_run(config: TrainConfig, recipe: TrainConfig) -> str:
    """The differences that matter, short enough for a folder; all of them stand in config.json."""
    changed = {k: v for k, v in delta(config, recipe).items() if k not in FREE}
    return cli.label(changed, most=100) or "base"


def _last(group: Path, config: TrainConfig) -> Path:
    """The newest run folder with a checkpoint and these settings; those that may change count only
    if all else is the same."""
    from experiments.study.runs import configuration, lasting

    found: list[tuple[bool, float, Path]] = []
    for folder in group.glob("*"):
        checkpoints, values = _checkpoints(folder), read_json(folder / "config.json")
        if not (checkpoints and values):
            continue
        try:
            earlier = configuration(values)
        except (UserError, TypeError):  # of another program or version
            continue
        if lasting(earlier) == lasting(config):
            newest = max(path.stat().st_mtime for path in checkpoints)
            found.append((identity(earlier) == identity(config), newest, folder))
    if not found:
        raise UserError(f"{group} holds no run of these settings with a checkpoint to resume")
    return max(found)[2]


def _checkpoints(folder: Path) -> list[Path]:
    """The files to resume from in a run folder."""
    return [folder / name for name in (LAST, BEFORE) if (folder / name).exists()]


if __name__ == "__main__":
    cli.run(main)
