"""Classify pictures with a finished run: `python -m experiments.predict RUN IMAGE…`."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

import vitx
from experiments import cli
from vitx.data import transforms
from vitx.data.folders import Passed, pictures
from vitx.data.images import MAX_PIXELS, BadImage, open_picture
from vitx.files import shown
from vitx.interop import weights
from vitx.model.preprocessing import Preprocessing
from vitx.registry import UserError
from vitx.training import evaluate, parallel

PROG = "python -m experiments.predict"


@dataclass(frozen=True)
class Settings:
    """Print the likeliest classes of pictures, and their probabilities."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or a file of weights with class names and preprocessing."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures, or folders of them."""
    top: int = 3
    """How many classes of each picture."""
    batch: int = 64
    max_pixels: int = MAX_PIXELS
    """Larger pictures are refused before they are decoded."""
    device: str = ""
    """Device; empty for the accelerator of this machine, else the CPU."""


def main(args: list[str]) -> None:
    """One line per picture: its path, then classes with probabilities."""
    settings = cli.parse(Settings, args, prog=PROG)
    cli.at_least(settings, top=1, batch=1, max_pixels=1)
    about = weights.describe(settings.run)
    if about.preprocessing is None:
        raise UserError(f"{settings.run} does not say how pictures are prepared for it")
    device = parallel.device(settings.device)
    vit = vitx.load(settings.run).to(device).eval()
    if not vit.config.classes:
        raise UserError(f"{settings.run} has no head, so it can't tell classes")
    names = about.classes or tuple(str(number) for number in range(vit.config.classes))
    if len(names) != vit.config.classes:
        raise UserError(f"{settings.run} names {len(names)} classes, its head has "
                        f"{vit.config.classes}")  # fmt: skip
    paths, bad = list(listed(settings.images)), 0
    for start in range(0, len(paths), settings.batch):
        good: list[tuple[Path, Tensor]] = []
        for path in paths[start : start + settings.batch]:
            try:
                good.append((path, prepare(path, about.preprocessing, vit, settings.max_pixels)))
            except BadImage as error:
                if len(paths) == 1:
                    raise
                print(f"error: {error}", file=sys.stderr)
                bad += 1
        if not good:
            continue
        chosen, image = zip(*good, strict=True)
        with torch.inference_mode():
            logits = vit(torch.stack(image).to(next(vit.parameters()))).float()
        evaluate.check_finite(logits)
        for path, chance in zip(chosen, logits.softmax(dim=1).cpu(), strict=True):
            best = chance.topk(min(settings.top, len(names)))
            words = (f"{names[k]} {p:.1%}" for p, k in zip(*map(Tensor.tolist, best), strict=True))
            print(f"{shown(path)}: {', '.join(words)}")
    if bad:
        raise UserError(f"{bad} of {len(paths)} pictures are not classified")


def listed(paths: Sequence[Path]) -> Iterator[Path]:
    """The pictures, and in their order those of folders; a folder without any is refused."""
    passed = Passed()
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        inside = [Path(name) for name, _ in pictures(path, passed)]
        if not inside:
            raise UserError(
                f"{shown(path)} holds no picture" + (f", but {passed}" if passed else "")
            )
        yield from inside
    if passed:
        print(f"note: passed over {passed}", file=sys.stderr)


def prepare(path: Path, how: Preprocessing, vit: vitx.Vit, max_pixels: int) -> Tensor:
    """A picture as the model takes it, (c, h, w). Raises BadImage naming what can't be decoded."""
    from torchvision.transforms.functional import pil_to_tensor

    picture = open_picture(path, max_pixels=max_pixels)
    if vit.config.channels == 1:
        picture = picture.convert("L")
    way = transforms.evaluation(how.resize, vit.config.size, filter=how.filter, centre=how.centre)
    image = pil_to_tensor(way(picture)) / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (how.mean, how.std))
    return (image - mean) / std


if __name__ == "__main__":
    cli.run(main)
