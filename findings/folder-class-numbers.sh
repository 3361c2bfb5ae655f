#!/usr/bin/env bash
# Three readers of the same folder of pictures number its classes in two ways. timm sorts the names
# of the folders naturally (1, 2, 10), torchvision and datasets by character (1, 10, 2). Weights
# trained with the one and scored with the other name the wrong class wherever the two numbers
# differ, with no error.
# Seen with torch==2.14.1, torchvision==0.29.1, timm==1.0.31, datasets==5.2.0 on Python 3.11, Linux, CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 timm==1.0.31 datasets==5.2.0
cd "$work"
"$work/venv/bin/python" >output <<'PYTHON'
import pathlib

from datasets import disable_progress_bars, load_dataset
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

disable_progress_bars()
folder = pathlib.Path("pictures").absolute()
for name in ("1", "2", "10"):
    (folder / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / name / "picture.png")
print("torchvision", list(ImageFolder(folder).class_to_idx))
print("timm", sorted((k := create_dataset("", root=str(folder)).reader.class_to_idx), key=k.get))
made = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir="cache")
print("datasets", made.features["label"].names)
PYTHON
cat output
diff - output <<'SEEN'
torchvision ['1', '10', '2']
timm ['1', '2', '10']
datasets ['1', '10', '2']
SEEN
