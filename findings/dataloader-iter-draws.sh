#!/usr/bin/env bash
# iter() of a DataLoader draws a number from torch's global generator, even if it shuffles nothing
# and has no workers. So an evaluation between two training steps changes all later random numbers:
# dropout, augmentation, initial weights. A generator of its own keeps the global one as it was.
# Seen with torch==2.14.1, numpy==2.4.6 on Python 3.11, Linux, CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" >output <<'PYTHON'
import torch
from torch.utils.data import DataLoader


def after(loader):
    """The next random number, with the loader iterated over or not."""
    torch.manual_seed(0)
    if loader is not None:
        list(loader)
    return torch.rand(1).item()


print(f"no loader                {after(None):.4f}")
print(f"loader                   {after(DataLoader(range(4))):.4f}")
print(f"with its own generator   {after(DataLoader(range(4), generator=torch.Generator())):.4f}")
PYTHON
cat output
diff - output <<'SEEN'
no loader                0.4963
loader                   0.0885
with its own generator   0.4963
SEEN
