"""Accuracy of a timm model's weights in timm and in vitx, on a folder of pictures.

Pictures are read once, prepared as timm's configuration of the weights says, and given to both.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.kinds import Accurate, Pretrained
from vitx.data.folders import Passed, listed, read_split
from vitx.data.images import BadImage, Files
from vitx.files import UNREADABLE
from vitx.interop.timm import from_timm, live_model
from vitx.measure.equality import largest
from vitx.measure.machine import now
from vitx.registry import UserError
from vitx.training.evaluate import check_finite


@dataclass
class Count:
    """How many labels one side has got right so far, and how long it took."""

    run: Callable[[Tensor], Tensor]
    top1: int = 0
    top5: int = 0
    seconds: float = 0.0

    def score(self, image: Tensor, target: Tensor) -> Tensor:
        """The logits of a batch, counted."""
        start = now(image.device)
        with torch.inference_mode():
            logits = self.run(image)
        self.seconds += now(image.device) - start
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == target[:, None]
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.any(dim=1).sum())
        return logits

    def of(self, images: int) -> Accurate:
        """The shares of so many images."""
        return Accurate(top1=self.top1 / images, top5=self.top5 / images, seconds=self.seconds)


def load(name: str) -> nn.Module:
    """A timm model with its weights: by timm's name, or from a folder or file of `save_pretrained`.

    Such a folder holds config.json, which says what the weights are of. Raises ValueError.
    """
    path = Path(name)
    folder = path if path.is_dir() else path.parent if path.is_file() else None
    if folder is None:
        return live_model(name, {"pretrained": True})
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json beside the weights, as timm writes it")
    import timm
    from safetensors import SafetensorError

    given: dict[str, Any] = {"checkpoint_path": name} if path.is_file() else {"pretrained": True}
    try:
        return timm.create_model(f"local-dir:{folder}", **given)
    except (*UNREADABLE, SafetensorError) as error:
        raise UserError(f"timm can't read {name}: {error}") from error


class Pictures(Dataset):
    """Pictures prepared by timm, with their class numbers."""

    def __init__(self, files: Files, transform: Any):
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = self.files.read(self.files.items[index])
        if max(picture.size) > MOST_ASPECT * min(picture.size):
            raise BadImage(
                f"{self.files.items[index]} is {picture.width}×{picture.height}: timm would resize "
                "all of it to the model's shorter side"
            )
        return self.transform(picture), int(self.files.target[index])


MOST_ASPECT = 64
"""Longer side of a picture over the shorter one, at most: the memory grows with it."""


def open_folder(folder: Path, settings: dict[str, Any], classes: int) -> Pictures:
    """The pictures of a folder, prepared as timm's settings say; ValueError where it does not fit
    a model of that many classes."""
    from timm.data.transforms_factory import create_transform

    transform: Any = create_transform(**settings)
    passed = Passed()
    split = read_split(folder, passed, {})
    names = split.classes
    if passed:
        print(f"note: {folder}: passed over {passed}", file=sys.stderr)
    if len(names) != classes:
        raise UserError(f"{folder} has {len(names)} class folders, the model {classes} outputs")
    if all(name.isdecimal() for name in names) and names != tuple(map(str, range(classes))):
        raise UserError(
            f"{folder}: its classes are the numbers {listed(names)}, the model's outputs 0 to "
            f"{classes - 1}"
        )
    return Pictures(split.images, transform)


def measure(name: str, folder: Path, *, batch: int, device: torch.device) -> dict[str, Any]:
    """The fields of a `Pretrained`: top-1 and top-5 of both, how many predictions are identical.

    `folder` holds a folder of pictures for each class. In the order of their names, numbers by
    value, they are the outputs. Raises ValueError where that does not fit, for a picture that can't
    be decoded, and for outputs that are not finite.
    """
    from timm.data.config import resolve_model_data_config

    if not folder.is_dir():  # before a model is loaded
        raise UserError(f"data = {str(folder)!r} is no folder")
    model: Any = load(name).to(device).eval()
    settings = resolve_model_data_config(model)
    pictures = open_folder(folder, settings, model.num_classes)
    first = torch.zeros(min(batch, len(pictures)), *settings["input_size"], device=device)
    target = torch.zeros(len(first), dtype=torch.long, device=device)
    sides = (Count(model), Count(from_timm(model)))
    for side in sides:  # what a first call does once is no part of the time
        Count(side.run).score(first, target)
    same, apart = 0, 0.0
    loader = tqdm(DataLoader(pictures, batch_size=batch), unit="batch", leave=False)
    for number, (image, label) in enumerate(loader):
        order = (0, 1) if number % 2 else (1, 0)
        logits = {k: sides[k].score(image.to(device), label.to(device)) for k in order}
        for one in logits.values():
            check_finite(one)
        same += int((logits[0].argmax(dim=1) == logits[1].argmax(dim=1)).sum())
        difference = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
        apart = largest((apart, float(difference)))
    images, local = len(pictures), Path(name).exists()
    architecture = model.pretrained_cfg["architecture"] if local else name
    return {
        "reference": f"timm:{architecture}",
        "candidate": f"vitx:from_timm({architecture})",
        "weights": Path(name).name if local else "timm's",
        "data": folder.resolve().name,
        "device": str(device),
        "images": images,
        "classes": model.num_classes,
        "of_reference": sides[0].of(images),
        "of_candidate": sides[1].of(images),
        "identical": same,
        "logits_apart": apart,
        "preprocessing": settings,
    }


def text(result: Pretrained) -> str:
    """A result for people."""
    lines = [
        f"predictions identical: {result.identical:,} of {result.images:,}; logits apart by "
        f"{result.logits_apart:.1e} of a batch's largest at most"
    ]
    for label, side in (("timm", result.of_reference), ("vitx", result.of_candidate)):
        lines.append(
            f"{label}: top-1 {side.top1_text(result.images)} (standard error), top-5 "
            f"{side.top5:.2%}; {side.seconds:.1f} s, {result.images / side.seconds:,.1f} images/s"
        )
    return "\n".join(lines)
