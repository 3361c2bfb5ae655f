"""One side of a gate: times the model of the vitx that it imports, a block whenever it is asked.

It is started by `benchmarks.gate` with the path of one checkout or another, and reads a JSON line a
request: first what to build, then `{"block": iterations}`.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import vitx
from vitx.config import size
from vitx.model import build


def answer(value: dict) -> None:
    print(json.dumps(value), flush=True)


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    torch.manual_seed(0)
    model = build(size(asked["model"]), device=asked["device"])
    image = torch.randn(asked["batch"], 3, *model.config.size)
    weights = Path(asked["weights"])
    if not weights.exists():
        torch.save(model.state_dict(), weights)
    model.load_state_dict(torch.load(weights, weights_only=True))
    image = image.to(asked["device"])
    exact = torch.device("cpu") if image.device.type == "mps" else image.device
    with torch.no_grad():
        twin = build(size(asked["model"]), device=exact, dtype=torch.float64).eval()
        twin.load_state_dict(model.state_dict())
        logits = twin(image[:2].to(exact).double())
    answer({"file": vitx.__file__, "logits": logits.flatten().tolist()})
    step = training(model, image) if asked["mode"] == "training" else inference(model, image)
    for line in sys.stdin:
        iterations = json.loads(line)["block"]
        wait(image)
        start = time.perf_counter()
        for _ in range(iterations):
            step()
        wait(image)
        answer({"seconds": (time.perf_counter() - start) / iterations})


def inference(model, image):
    model.eval()

    def step() -> None:
        with torch.inference_mode():
            model(image)

    return step


def training(model, image):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    target = torch.zeros(len(image), dtype=torch.long, device=image.device)

    def step() -> None:
        F.cross_entropy(model(image), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def wait(image) -> None:
    if image.device.type != "cpu":
        torch.accelerator.synchronize()


if __name__ == "__main__":
    main()
