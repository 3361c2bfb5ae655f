"""Whether a device computes what the CPU does, in about a minute: `python -m benchmarks --check`.

Facts of the device, the attention kernel for the timed model, logits beside a float64 run on the
CPU, and a short training beside one that was made on a CPU and is kept with the results:
`python -m benchmarks.check --replace` makes it anew.
"""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kinds import Check
from benchmarks.speed import usual
from experiments import cli
from experiments.recipes import DIGITS
from vitx import data
from vitx.measure.equality import largest, randomise
from vitx.model.config import size
from vitx.model.vit import build
from vitx.registry import UserError
from vitx.settings import override
from vitx.training.provenance import environment
from vitx.training.state import init, step
from vitx.training.trainer import batches

STEPS = 50
CONFIG = override(DIGITS, seed=0)
TRAJECTORY = Path(__file__).parent / "results" / "trajectory.json"
"""Losses of `STEPS` float32 steps of the digits recipe on a CPU."""
BAND = 1e-2
"""Largest relative deviation from them; rounding grows from step to step."""
LOGITS = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest relative root-mean-square error of logits to float64."""
MODEL, BATCH = "Ti/16", 8
"""Of the logits."""


def facts(device: torch.device) -> dict[str, str | float | None]:
    """What there is to know of the device."""
    if device.type != "cuda":
        return {"device": str(device), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }


def kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Which fused attention PyTorch chooses for the model that is timed on the device, in a batch
    of `BATCH` images."""
    from torch.nn.attention import SDPBackend

    config = size(usual(device)[0])
    tokens = config.grid[0] * config.grid[1] + config.prefix
    shape = (BATCH, config.heads, tokens, config.width // config.heads)
    q = torch.randn(shape, device=device, dtype=dtype)
    return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower()  # type: ignore[attr-defined]


def logits_error(device: torch.device, dtype: torch.dtype) -> float:
    """Relative root-mean-square error of a randomised model's logits to float64 on the CPU.

    Without TF32, which is off in products by default and on in convolutions.
    """
    torch.manual_seed(0)
    exact = build(size(MODEL)).double().eval()
    randomise(exact)
    image = torch.randn(BATCH, 3, *exact.config.size, dtype=torch.float64)
    there = deepcopy(exact).to(device=device, dtype=dtype)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = exact(image)
        logits = there(image.to(device=device, dtype=dtype)).cpu().double()
    return ((logits - expected).square().mean() / expected.square().mean()).sqrt().item()


def trajectory(device: torch.device) -> list[float]:
    """Losses of the first steps of the digits recipe, its batches drawn on the CPU; no TF32."""
    state = init(CONFIG, device=device)
    dataset = data.load(CONFIG.data)
    on_cpu = init(CONFIG)
    stream = batches(CONFIG, dataset, on_cpu)
    losses: list[Tensor] = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for _ in range(STEPS):
            image, target = next(stream)
            losses.append(step(state, (image.to(device), target.to(device)), CONFIG)["loss"])
    return [loss.item() for loss in losses]


def apart(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference of two trajectories."""
    return largest(abs(a - b) / b for a, b in zip(losses, expected, strict=True))


def run(device: torch.device) -> dict[str, Any]:
    """The fields of a `Check`: every deviation and its band."""
    dtypes = [torch.float32]
    if device.type != "cpu":
        dtypes += [torch.float16]
        if facts(device).get("bfloat16", True):
            dtypes += [torch.bfloat16]
    losses = trajectory(device)
    on_cpu = json.loads(TRAJECTORY.read_text(encoding="utf8"))["losses"]
    return {
        "facts": facts(device),
        "kernels": {_name(dtype): kernel(device, dtype) for dtype in dtypes},
        "logits_error": {_name(dtype): logits_error(device, dtype) for dtype in dtypes},
        "bands": LOGITS | {"trajectory": BAND},
        "trajectory_apart": apart(losses, on_cpu),
        "losses": tuple(losses),
        "device": str(device),
    }


@dataclass(frozen=True)
class Settings:
    """Make anew, on this CPU, the training that `python -m benchmarks --check` compares with."""

    replace: bool = False
    """Do so though there is one."""


def main(args: list[str]) -> None:
    """Make the kept training."""
    settings = cli.parse(Settings, args, prog="python -m benchmarks.check")
    if TRAJECTORY.exists() and not settings.replace:
        raise UserError(
            f"{TRAJECTORY.name} is there already; --replace makes it anew, and a device is checked "
            "by python -m benchmarks --check"
        )
    losses = trajectory(torch.device("cpu"))
    kept = {"steps": STEPS, "losses": losses, "environment": asdict(environment())}
    TRAJECTORY.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf8")
    print(TRAJECTORY)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def text(result: Check) -> str:
    """A result for people."""
    lines = [f"{name}: {value}" for name, value in result.facts.items()]
    lines += [f"attention in {name}: {kernel}" for name, kernel in result.kernels.items()]
    lines += [f"{name}: {apart}, band {band}" for name, apart, band, _ in result.deviations()]
    return "\n".join([*lines, result.verdict])


if __name__ == "__main__":
    cli.run(main)
