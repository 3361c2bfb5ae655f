#!/usr/bin/env bash
# einops keeps a dictionary of the tensor types that it has met. If torch.compile traces the first
# call that meets a type, the number of its entries becomes a guard, and a second type met later in
# the same trace breaks that guard. So the second call, with the same shapes, compiles everything
# again, though one expects it to compile nothing. A call of einops with each type before compiling
# avoids it.
# Seen with torch==2.14.1, einops==0.8.2, numpy==2.4.6 on Python 3.11, Linux, CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 einops==0.8.2 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" >output <<'PYTHON'
import torch
from einops import rearrange
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        split = rearrange(x, "b i (h e) -> b h i e", h=2)
        return split.sum() + rearrange(self.token, "(h e) -> h e", h=2).sum()


def compilations():
    torch.compiler.reset()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(Net(), fullgraph=True, backend=backend)
    for _ in range(3):
        compiled(torch.ones(2, 3, 4))
    return len(graphs)


print("graphs of three equal calls:", compilations())
print("the same once einops knows both types:", compilations())
PYTHON
cat output
diff - output <<'SEEN'
graphs of three equal calls: 2
the same once einops knows both types: 1
SEEN
