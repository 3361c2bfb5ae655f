#!/usr/bin/env bash
# ModelEmaV3 of timm takes use_warmup=True, which is to make the decay small in the first updates.
# It does so only if each update is given its step. Without step= the decay is the full one from the
# first update on, and no warning says so.
# Seen with torch==2.14.1, torchvision==0.29.1, timm==1.0.31 on Python 3.11, Linux, CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$work"
"$work/venv/bin/python" >output <<'PYTHON'
import torch
from timm.utils import ModelEmaV3


def averaged(warmup, steps):
    """The average after ten updates with a weight that went from 0 to 1."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = ModelEmaV3(model, decay=0.999, use_warmup=warmup)
    torch.nn.init.ones_(model.weight)
    for number in range(1, 11):
        average.update(model, step=number if steps else None)
    return average.module.weight.item()


print(f"no warm-up                 {averaged(False, steps=False):.3f}")
print(f"warm-up without step=      {averaged(True, steps=False):.3f}")
print(f"warm-up with step=         {averaged(True, steps=True):.3f}")
PYTHON
cat output
diff - output <<'SEEN'
no warm-up                 0.010
warm-up without step=      0.010
warm-up with step=         1.000
SEEN
