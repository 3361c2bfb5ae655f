#!/usr/bin/env bash
# The same table of positions, resized from 16 x 16 to 20 x 20 patches, becomes two different tables
# in timm and in transformers. Both are bicubic. timm smooths before sampling (antialias), ViT and
# DINOv2 of transformers do not; one expects that to matter only when a table shrinks.
# Seen with torch==2.14.1, torchvision==0.29.1, timm==1.0.31, transformers==5.24.0 on Python 3.11, Linux, CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0
cd "$work"
"$work/venv/bin/python" >output <<'PYTHON'
import torch
from timm.layers import resample_abs_pos_embed
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

torch.manual_seed(0)
table = torch.randn(1, 1 + 16 * 16, 8)
sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
smooth, plain = (resample_abs_pos_embed(table, (20, 20), antialias=on) for on in (True, False))
for config, kind in ((ViTConfig, ViTModel), (Dinov2Config, Dinov2Model)):
    model = kind(config(**sizes, image_size=64, patch_size=4)).eval()
    with torch.no_grad():
        model.embeddings.position_embeddings.copy_(table)
        other = model.embeddings.interpolate_pos_encoding(torch.zeros(1, 401, 8), 80, 80)
    for name, own in (("timm", smooth), ("timm without antialias", plain)):
        apart = ((other - own).norm() / own.norm()).item()
        print(f"{kind.__name__} beside {name}: {apart:.1%}")
PYTHON
cat output
diff - output <<'SEEN'
ViTModel beside timm: 8.5%
ViTModel beside timm without antialias: 0.0%
Dinov2Model beside timm: 8.5%
Dinov2Model beside timm without antialias: 0.0%
SEEN
