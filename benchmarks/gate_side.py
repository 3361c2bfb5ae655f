"""One side of a gate: times the model of the vitx that it imports, block by block.

`benchmarks.gate` starts it with the path of one checkout or another, and it takes nothing else from
either. Each line that it reads is a request in JSON: first what to build, then
`{"block": iterations}`.
"""

import json
import sys
import time
from pathlib import Path

import torch

import vitx

try:
    from vitx.data.config import DataConfig
    from vitx.model.config import size
    from vitx.model.vit import build
    from vitx.training.config import OptimConfig, TrainConfig
    from vitx.training.state import init, step
except ModuleNotFoundError:  # commits up to 04a8099 have one flat package
    from vitx.config import DataConfig, OptimConfig, TrainConfig, size  # type: ignore[import]
    from vitx.train import init, step  # type: ignore[import]

    from vitx.model import build  # type: ignore[attr-defined]


def answer(value: dict) -> None:
    print(json.dumps(value), flush=True)


def main() -> None:
    request = json.loads(sys.stdin.readline())
    torch.manual_seed(0)
    model = build(size(request["model"]), device=request["device"])
    # Of draws of its own: another commit may draw more or less for its weights.
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(request["batch"], 3, *model.config.size, generator=generator)
    weights = Path(request["weights"])
    if not weights.exists():
        torch.save({name: randomised(name, p) for name, p in model.named_parameters()}, weights)
    model.load_state_dict(torch.load(weights, weights_only=True))
    image = image.to(request["device"])
    answer({"file": vitx.__file__, "values": values(model, image[:2])})
    act = training(model, image) if request["mode"] == "training" else inference(model, image)
    for line in sys.stdin:
        iterations = json.loads(line)["block"]
        wait(image)
        start = time.perf_counter()
        for _ in range(iterations):
            act()
        wait(image)
        answer({"seconds": time.perf_counter() - start})


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
