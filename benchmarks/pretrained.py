"""Accuracy of a timm model's weights in timm and in vitx, on a folder of pictures.

Pictures are read once, prepared as timm's configuration of the weights says, and given to both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vitx.data.images import open_picture
from vitx.files import UNREADABLE
from vitx.interop.timm import from_timm, live_model
from vitx.measure.equality import largest
from vitx.measure.machine import now


@dataclass
class Count:
    """What one side has got right so far, and how long it took."""

    top1: int = 0
    top5: int = 0
    seconds: float = 0.0


def load(name: str) -> nn.Module:
    """A timm model with its weights: by timm's name, or from a folder or file of `save_pretrained`.

    Such a folder holds config.json, which says what the weights are of. Raises ValueError.
    """
    path = Path(name)
    folder = path if path.is_dir() else path.parent if path.is_file() else None
    if folder is None:
        return live_model(name, {"pretrained": True})
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json beside the weights, as timm writes it")
    import timm
    from safetensors import SafetensorError

    given = {"checkpoint_path": name} if path.is_file() else {"pretrained": True}
    try:
        return timm.create_model(f"local-dir:{folder}", **given)
    except (*UNREADABLE, SafetensorError) as error:
        raise ValueError(f"timm can't read {name}: {error}") from error


def measure(name: str, folder: Path, *, batch: int, device: torch.device) -> dict[str, Any]:
    """The fields of a row: top-1 and top-5 of both, how many predictions are identical, images/s.

    `folder` holds a folder of pictures for each class, which sorted by name are the outputs in
    order. Raises ValueError where that does not fit, and for a picture that can't be decoded.
    """
    import timm.data
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise ValueError(f"data = {str(folder)!r} is no folder")
    model: Any = load(name).to(device).eval()
    settings = timm.data.resolve_model_data_config(model)
    try:
        transform = timm.data.create_transform(**settings)
        pictures = ImageFolder(str(folder), transform, loader=open_picture)
    except FileNotFoundError as error:
        raise ValueError(f"data = {str(folder)!r}: {error}") from None
    if len(pictures.classes) != model.num_classes:
        raise ValueError(
            f"{folder} has {len(pictures.classes)} class folders, the model {model.num_classes} "
            "outputs"
        )
    sides: dict[str, Callable[[Tensor], Tensor]] = {
        "reference": model,
        "candidate": from_timm(model),
    }
    counts, same, apart = {side: Count() for side in sides}, 0, 0.0
    loader = DataLoader(pictures, batch_size=batch)
    first = torch.zeros(min(batch, len(pictures)), *settings["input_size"], device=device)
    target = torch.zeros(len(first), dtype=torch.long, device=device)
    for run in sides.values():  # what a first call does once is no part of the time
        _score(run, first, target, Count())
    for number, (image, target) in enumerate(tqdm(loader, unit="batch", leave=False)):
        turns = list(sides) if number % 2 else list(sides)[::-1]
        found = {
            side: _score(sides[side], image.to(device), target.to(device), counts[side])
            for side in turns
        }
        one, other = found["reference"], found["candidate"]
        same += int((one.argmax(dim=1) == other.argmax(dim=1)).sum())
        apart = largest((apart, float((one - other).abs().max() / one.abs().max())))
    images = len(pictures)
    local = Path(name).exists()
    model_name = model.pretrained_cfg["architecture"] if local else name
    return {
        "reference": f"timm:{model_name}",
        "candidate": f"vitx:from_timm({model_name})",
        "weights": Path(name).name if local else "timm's",
        "data": folder.resolve().name,
        "device": str(device),
        "images": images,
        "classes": len(pictures.classes),
        "top1": {side: count.top1 / images for side, count in counts.items()},
        "top5": {side: count.top5 / images for side, count in counts.items()},
        "identical": same,
        "logits_apart": apart,
        "seconds": {side: count.seconds for side, count in counts.items()},
        "images_per_s": {side: images / count.seconds for side, count in counts.items()},
        "preprocessing": {
            key: list(v) if isinstance(v, tuple) else v for key, v in settings.items()
        },
    }


def _score(run: Callable[[Tensor], Tensor], image: Tensor, target: Tensor, count: Count) -> Tensor:
    """The logits of a batch, counted."""
    start = now(image.device)
    with torch.inference_mode():
        logits = run(image)
    count.seconds += now(image.device) - start
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == target[:, None]
    count.top1 += int(hits[:, 0].sum())
    count.top5 += int(hits.any(dim=1).sum())
    return logits


def text(row: dict[str, Any]) -> str:
    """A row for people."""
    lines = [
        f"predictions identical: {row['identical']:,} of {row['images']:,}; logits apart by "
        f"{float(row['logits_apart']):.1e} of a batch's largest at most"
    ]
    for side, label in (("reference", "timm"), ("candidate", "vitx")):
        lines.append(
            f"{label}: top-1 {accuracy_text(row, side)} (standard error), top-5 "
            f"{row['top5'][side]:.2%}; {row['seconds'][side]:.1f} s, "
            f"{row['images_per_s'][side]:,.1f} images/s"
        )
    return "\n".join(lines)


def accuracy_text(row: dict[str, Any], side: str) -> str:
    """Top-1 with its binomial standard error."""
    top1 = row["top1"][side]
    return f"{top1:.2%} ± {(top1 * (1 - top1) / row['images']) ** 0.5:.2%}"
