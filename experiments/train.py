"""Train one model: `python -m experiments.train RECIPE [--model.depth=6] [--dry-run]`."""

from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments import cli
from experiments.recipes import RECIPES
from vitx import tracking
from vitx.config import DATA, TrainConfig, delta, flat
from vitx.cost import cost
from vitx.registry import nearest

PROG = "python -m experiments.train"


@dataclass(frozen=True)
class Switches:
    """Train one model and keep its curve, summary and W&B run in a run folder."""

    dry_run: bool = False
    """Print configuration, parameters, MACs and steps; train nothing."""
    out: Path = Path("runs")
    """Folder of run folders."""
    wandb: str = ""
    """W&B mode: online, offline or disabled; empty for WANDB_MODE, else offline."""
    device: str = ""
    """Device; empty for the accelerator of this machine, else the CPU."""


def main(args: list[str]) -> None:
    """Read the recipe's name, then its settings; print the plan; train."""
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: {PROG} RECIPE [--setting=value …]\n\nrecipes: {', '.join(RECIPES)}")
        print(f"\nsettings of a recipe: {PROG} digits --help")
        raise SystemExit(0 if args else 2)
    name, *flags = args
    if name not in RECIPES:
        raise ValueError(f"recipe = {name!r} is not known; {nearest(name, RECIPES)}")
    config, switches = read(name, flags)
    describe(name, config)
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
    found, images = cost(config.model), DATA[config.data.name].train
    for key, value in flat(config).items():
        print(f"  {key} = {value}")
    print(
        f"{name}: {found.parameters:,} parameters, {found.macs:,} MACs an image forward, "
        f"{config.steps:,} steps of {config.batch} images "
        f"({config.steps * config.batch / images:.1f} epochs of {images:,})"
    )


def train(name: str, config: TrainConfig, switches: Switches) -> None:
    """Train with a run folder and W&B; print the test accuracy with its standard error."""
    from vitx.train import train

    changed = delta(config, RECIPES[name])
    # A folder's name has a limit; the whole difference stands in config.json.
    label = ",".join(f"{key}={value}" for key, value in changed.items())[:100] or "base"
    device = str(tracking.device(switches.device))
    values = {"recipe": name, "device": device} | flat(config)
    with tracking.Run(switches.out, name, label, values, mode=switches.wandb or None) as run:
        print(run.where)
        _, result = train(config, run, device=device)
        where = run.where
    test = result.test
    print(
        f"test accuracy {test.accuracy:.2%} ± {test.standard_error:.2%} (standard error of "
        f"{test.images} images), test loss {test.loss:.4f}, {result.seconds:.1f} s"
    )
    print(f"run: {run.folder}\n{where}")


if __name__ == "__main__":
    cli.run(main)
