"""Check timm models against vitx in float64: `python -m benchmarks.equality MODEL …`."""

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from benchmarks import mutants, speed
from benchmarks.report.tables import mutant_table
from experiments import cli


@dataclass(frozen=True)
class Settings:
    """Compare outputs and all gradients of timm's models with vitx's in float64."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ("vit_tiny_patch16_224",)
    """timm's names."""
    image: int = 0
    """Image size in pixels; 0 for the model's own."""
    mutants: bool = False
    """Plant thirty one-token bugs too, and count how many two checks catch."""


def main(args: list[str]) -> None:
    """One line per model; exit 1 if one is not equal."""
    settings = cli.parse(Settings, args, prog="python -m benchmarks.equality")
    options = {"img_size": settings.image} if settings.image else {}
    passed = True
    for name in settings.models:
        pair = speed.make_pair(name, batch=1, device=torch.device("cpu"), **options)
        result = speed.check(pair)
        passed &= result.passed
        print(f"{name}: {result}", flush=True)
    if settings.mutants:
        scores = mutants.score()
        passed &= all(score.caught for score in scores)
        print(mutant_table(scores).markdown())
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    cli.run(main)
