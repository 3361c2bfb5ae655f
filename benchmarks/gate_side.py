"""One side of a gate: times the model of the vitx that it imports, a block whenever it is asked.

It is started by `benchmarks.gate` with the path of one checkout or another, and takes nothing else
from either. It reads a JSON line a request: first what to build, then `{"block": iterations}`.
"""

import json
import sys
import time
from pathlib import Path

import torch

import vitx
from vitx.data.config import DataConfig
from vitx.model.config import size
from vitx.model.vit import build
from vitx.training.config import OptimConfig, TrainConfig
from vitx.training.state import init, step


def answer(value: dict) -> None:
    print(json.dumps(value), flush=True)


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    torch.manual_seed(0)
    model = build(size(asked["model"]), device=asked["device"])
    # Of draws of its own: another commit may draw more or less for its weights.
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(asked["batch"], 3, *model.config.size, generator=generator)
    weights = Path(asked["weights"])
    if not weights.exists():
        torch.save({name: randomised(name, p) for name, p in model.named_parameters()}, weights)
    model.load_state_dict(torch.load(weights, weights_only=True))
    image = image.to(asked["device"])
    answer({"file": vitx.__file__, "values": values(model, image[:2])})
    act = training(model, image) if asked["mode"] == "training" else inference(model, image)
    for line in sys.stdin:
        iterations = json.loads(line)["block"]
        wait(image)
        start = time.perf_counter()
        for _ in range(iterations):
            act()
        wait(image)
        answer({"seconds": (time.perf_counter() - start) / iterations})


def inference(model, image):
    model.eval()

    def infer() -> None:
        with torch.inference_mode():
            model(image)

    return infer


def training(model, image):
    """The step of the checkout's own trainer."""
    config = TrainConfig(
        model=model.config, data=DataConfig(name="fake"), batch=len(image), steps=2**40,
        optim=OptimConfig(lr=1e-5, clip=1.0),
    )  # fmt: skip
    state = init(config, model=model, device=image.device)
    target = torch.zeros(len(image), dtype=torch.long, device=image.device)
    return lambda: step(state, (image, target), config)


def randomised(name, parameter):
    """Values with which every parameter matters: initial ones hide what zeros and ones do."""
    noise = torch.randn_like(parameter)
    if parameter.ndim > 1 and name.endswith("weight"):
        return noise / parameter[0].numel() ** 0.5
    return 0.3 * noise + float(name.endswith("weight"))


def values(model, image):
    """Logits in float64, and the norm of every parameter's gradient."""
    exact = torch.device("cpu") if image.device.type == "mps" else image.device
    twin = build(model.config, device=exact, dtype=torch.float64).eval()
    twin.load_state_dict(model.state_dict())
    logits = twin(image.to(exact).double())
    gradients = torch.autograd.grad(logits.square().sum(), list(twin.parameters()))
    return logits.flatten().tolist() + [gradient.norm().item() for gradient in gradients]


def wait(image) -> None:
    if image.device.type != "cpu":
        torch.accelerator.synchronize(image.device)


if __name__ == "__main__":
    main()
