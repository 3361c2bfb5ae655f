"""What is taken as data and weights: each case is made, tried, and its outcome stands in a table.

`python tests/taken.py` writes the table into experiments/README.md; a test compares the two.
"""

import argparse
import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import timm
import torch
from picture_files import folders, picture
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

import vitx
from vitx import data
from vitx.data.config import DataConfig
from vitx.data.images import open_picture

PAGE = Path(__file__).resolve().parent.parent / "experiments" / "README.md"
START, END = "<!-- taken -->\n", "<!-- end of taken -->"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}

Try = Callable[[Path], str]
CASES: list[tuple[str, str, Try]] = []
"""Kind, what is given, and a function that makes it in a folder and says what came out."""


def case(kind: str, given: str) -> Callable[[Try], Try]:
    def add(function: Try) -> Try:
        CASES.append((kind, given, function))
        return function

    return add


def opened(path: Path) -> str:
    shown = open_picture(path)
    return f"taken, {shown.width}×{shown.height}"


def pictures(given: str, name: str, make: Callable[[Path], object]) -> None:
    def attempt(folder: Path) -> str:
        make(folder / name)
        return opened(folder / name)

    case("picture", given)(attempt)


def saved(mode: str, form: str = "") -> Callable[[Path], object]:
    return lambda path: picture().convert(mode).save(path, form or None)


def values(array: np.ndarray) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(array.reshape(8, 8)).save(path)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    picture().save(path, exif=exif)


for mode in ("RGB", "L", "LA", "P", "RGBA", "CMYK", "1"):
    form = "tif" if mode == "CMYK" else "png"
    pictures(f"mode {mode}, {form}", f"x.{form}", saved(mode))
for ending in ("jpg", "gif", "webp", "avif", "bmp", "ppm"):
    pictures(f"{ending} of 40×30", f"x.{ending}", saved("RGB"))
pictures("40×30 with the EXIF orientation 6", "x.png", turned)
pictures("16 bits", "x.png", values(np.arange(64, dtype=np.uint16)))
pictures("32 bits from 0 to 252", "x.tif", values(np.arange(64, dtype=np.int32) * 4))
pictures("32 bits from 0 to 630", "x.tif", values(np.arange(64, dtype=np.int32) * 10))
pictures("floats", "x.tif", values(np.arange(64, dtype=np.float32) / 64))
pictures("no bytes", "x.png", lambda path: path.write_bytes(b""))
pictures("text", "x.jpg", lambda path: path.write_text("a jpg"))
pictures("a pipe", "x.jpg", os.mkfifo)


def loaded(root: Path, name: str = "imagefolder") -> str:
    config = DataConfig(name=name, root=str(root), normalise="half")
    dataset = data.load(config, size=(16, 16))
    counts = [f"{part} {len(getattr(dataset, part))}" for part in ("train", "val", "test")]
    return f"taken: classes {', '.join(dataset.classes)}; {', '.join(counts)}"


def folder(given: str, make: Callable[[Path], object]) -> None:
    def attempt(root: Path) -> str:
        make(root)
        return loaded(root)

    case("folder", given)(attempt)


def splits(*names: str, **more: Any) -> Callable[[Path], object]:
    how = {"classes": ("a", "b"), "each": 2} | more
    return lambda root: folders(root, splits=names, **how)


def then(make: Callable[[Path], object], *more: Callable[[Path], object]) -> Callable[[Path], None]:
    def run(root: Path) -> None:
        for step in (make, *more):
            step(root)

    return run


def links(source: str, target: str) -> Callable[[Path], object]:
    return lambda root: (root / source).symlink_to(root / target)


def unclassed(root: Path) -> None:
    for name in ("Testing", "Training"):
        (root / name).mkdir()
        picture().save(root / name / "0.png")


folder("`CLASS/`", splits("."))
folder("`train/CLASS/`, `val/CLASS/`, `test/CLASS/`", splits("train", "val", "test"))
folder("`Training/CLASS/`, `Testing/CLASS/`", splits("Training", "Testing"))
folder("`archive/train/CLASS/`", splits("archive/train"))
folder("`Training/` and `Testing/` without classes", unclassed)
folder("classes 0, 1, 2, 10", splits("train", classes=("0", "1", "10", "2"), each=1))
folder("`val/` lacks b", then(splits("train"), splits("val", classes=("a",))))
folder("`val/` has c", then(splits("train"), splits("val", classes=("c",))))
folder("a class without pictures", then(splits("train"), lambda root: (root / "train/c").mkdir()))
folder(
    "`.cache/` beside the classes", then(splits("train"), lambda r: (r / "train/.cache").mkdir())
)
folder("a link back", then(splits("train"), links("train/a/again", "train")))
folder(
    "a file in two splits", then(splits("train", "val"), links("val/a/x.png", "train/a/0000.png"))
)
folder("a PDF and a hidden file", then(
    splits("train"), lambda root: (root / "train/a/x.pdf").write_bytes(b""),
    lambda root: (root / "train/a/._x.png").write_bytes(b""),
))  # fmt: skip


def table(given: str, kind: Any, *, name: str = "hf", **labels: list) -> None:
    """A Hugging Face data set with labels per split; `kind` is their feature, or names."""

    def attempt(root: Path) -> str:
        parts = {}
        for split, values in labels.items():
            names = kind.get(split) if isinstance(kind, dict) else kind
            feature = datasets.ClassLabel(names=names) if isinstance(names, list) else names
            features = datasets.Features({"image": datasets.Image(), "label": feature})
            columns = {"image": [picture()] * len(values), "label": values}
            parts[split] = datasets.Dataset.from_dict(columns, features=features)
        datasets.DatasetDict(parts).save_to_disk(str(root))
        return loaded(root, name)

    case("labels", given)(attempt)


AB = ["a", "b"]
table("ClassLabel", AB, train=[0, 1, 1], test=[1])
table(
    "ClassLabel in another order in test", {"train": AB, "test": ["b", "a"]}, train=[0, 1], test=[0]
)
table(
    "ClassLabel with another name in test",
    {"train": AB, "test": ["a", "c"]},
    train=[0, 1],
    test=[0],
)
table("words", datasets.Value("string"), train=["b", "a"], test=["b"])
table("whole numbers", datasets.Value("int64"), train=[7, 2], test=[7])
table("floats", datasets.Value("float32"), train=[0.5, 1.0])
table("-1 in all of test", AB, train=[0, 1], test=[-1, -1])
table("-1 in a row of train", AB, train=[0, -1])


def weights(given: str, make: Callable[[Path], Path], **how: Any) -> None:
    def attempt(root: Path) -> str:
        vit = vitx.load(make(root), **{"heads": 3} | how)
        c = vit.config
        return f"taken: image {c.size[0]}×{c.size[1]}, pool {c.pool}, {vit.dtype}".replace(
            "torch.", ""
        )

    case("weights", given)(attempt)


def state(**options: Any) -> dict[str, torch.Tensor]:
    return timm.create_model("vit_tiny_patch16_224", **SMALL | options).state_dict()


def stored(
    change: Callable[[dict[str, torch.Tensor]], Any], **options: Any
) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        torch.save(change(state(**options)), root / "w.pt")
        return root / "w.pt"

    return make


def beside(config: dict[str, Any], **options: Any) -> Callable[[Path], Path]:
    """A folder with a config.json of timm."""

    def make(root: Path) -> Path:
        torch.save(state(**options), root / "pytorch_model.bin")
        content = {"architecture": "vit_tiny_patch16_224"} | config
        (root / "config.json").write_text(json.dumps(content))
        return root

    return make


def transformers(shard: str = "5GB", change: Any = None, **options: Any) -> Callable[[Path], Path]:
    """A folder of Hugging Face's `save_pretrained`."""

    def make(root: Path) -> Path:
        config = ViTConfig(
            **{"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3,
               "intermediate_size": 96, "image_size": 32, "patch_size": 8} | options
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained(root, max_shard_size=shard)
        path = root / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (change or {})))
        return root

    return make


weights("a state dict of timm, square", stored(dict))
weights("the same without `heads`", stored(dict), heads=0)
weights("of 16×64, with `image=(16, 64)`", stored(dict, img_size=(16, 64)), image=(16, 64))
weights(
    "names with `module._orig_mod.`",
    stored(lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()}),
)
weights(
    "`state_dict` and `state_dict_ema`", stored(lambda s: {"state_dict": s, "state_dict_ema": s})
)
weights(
    "`model` and an argparse.Namespace",
    stored(lambda s: {"model": s, "args": argparse.Namespace(lr=1)}),
)
weights("`model` and a date", stored(lambda s: {"model": s, "date": date(2026, 1, 1)}))
weights("one tensor in float16", stored(lambda s: s | {"norm.bias": s["norm.bias"].half()}))
weights("integers", stored(lambda s: {k: v.to(torch.int8) for k, v in s.items()}))
weights("registers, without config.json", stored(dict, reg_tokens=4))
weights(
    "timm's folder with `global_pool: avg`",
    beside({"global_pool": "avg"}, global_pool="avg", fc_norm=False),
)
weights(
    "timm's folder with registers", beside({"model_args": SMALL | {"reg_tokens": 4}}, reg_tokens=4)
)
weights(
    "timm's folder with `act_layer: quick_gelu`",
    beside({"model_args": SMALL | {"act_layer": "quick_gelu"}}),
)
weights("Hugging Face's folder", transformers())
weights("the same in shards", transformers(shard="20KB"))
weights("the same of 16×32", transformers(image_size=(16, 32)))
weights("`hidden_act: quick_gelu`", transformers(hidden_act="quick_gelu"))
weights("`model_type: dinov2`", transformers(change={"model_type": "dinov2"}))


def outcome(attempt: Try) -> str:
    """What came out: the words of the case, or the sentence of the error, and what was said."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(said):
        root = Path(place, "DIR")
        root.mkdir()
        try:
            words = attempt(root)
        except (ValueError, OSError) as error:
            words = f"refused: {error}"
        notes = [line for line in said.getvalue().splitlines() if line.startswith(("note", "warn"))]
        text = "; ".join([words, *notes]).replace(str(root), "DIR")
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def table_of_cases() -> str:
    lines = ["| kind | given | what comes out |", "| --- | --- | --- |"]
    lines += [f"| {kind} | {given} | {outcome(attempt)} |" for kind, given, attempt in CASES]
    return "\n".join(lines) + "\n"


def filled(page: str) -> str:
    before, _, rest = page.partition(START)
    return before + START + table_of_cases() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf8")), encoding="utf8")
