"""Peak rates of this machine, and what a model's rate is beside them.

A model's utilisation (MFU) is its counted work per second over the fastest matrix product here,
in the same dtype with the same threads, before and after the model was timed.
"""

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitx.measure.comparison import Utilisation
from vitx.measure.timing import Step, time_block

SQUARES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
"""Sides of the square products that are tried beside a model's own."""
OWN = 4
"""A model's own products that are tried: those with most work."""
BLOCK_S = 0.05
BLOCKS = 5
UNSTEADY = 0.15
"""Peaks before and after that differ by more say nothing of a model between them."""
ABOVE = 1.05
"""A rate higher than this times the peak was counted wrongly."""
ABOVE_PEAK = "above the peak"
CACHES = 4
"""Arrays that are copied for the bandwidth are so many times the last cache."""
DATA_SHEET = {
    r"NVIDIA (H200|H100 80GB HBM3)": (989e12, 494e12, 67e12),
    r"NVIDIA H100 PCIe": (756e12, 378e12, 51e12),
    r"NVIDIA A100(-SXM4-\d+GB|-PCIE-40GB| 80GB PCIe)": (312e12, 156e12, 19.5e12),
    r"NVIDIA L4": (121e12, 60e12, 30e12),
    r"NVIDIA GeForce RTX 4090": (165e12, 82.6e12, 82.6e12),
    r"Tesla V100-SXM2-\d+GB": (125e12, 15.7e12, 15.7e12),
    r"Tesla T4": (65e12, 8.1e12, 8.1e12),
}
"""By a GPU's whole name: FLOP/s that NVIDIA's data sheets give for dense products of 16 bits with
sums of 32, of float32 as TF32, and of float32."""
Shape = tuple[int, int, int]
"""Rows, inner size and columns of a matrix product."""


@dataclass(frozen=True)
class Peak:
    """The fastest matrix product and the fastest copy."""

    flops: float
    """Floating-point operations per second, a multiplication and an addition counted as two."""
    shape: Shape
    bytes: float
    """Bytes read and written per second."""


class _Work(TorchDispatchMode):
    """Notes the sizes of matrix products, and the bytes of what operations read and write."""

    def __init__(self):
        super().__init__()
        self.products: Counter[Shape] = Counter()
        self.bytes = 0
        self.within = False
        """Whether fused attention is at work, which counts what it reads and writes itself."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm"):
            left, right = args[-2:] if name == "aten::mm" else args[1:3]
            self.products[left.shape[0], left.shape[1], right.shape[1]] += 1
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or self.within):
            self.count(args, kwargs, result)
        return result

    def count(self, *values: object) -> None:
        """Add the bytes of the tensors among these values."""
        tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Fused(TorchFunctionMode):
    """Counts fused attention as one operation: on `meta` it is made of parts that a device's
    kernel keeps to itself."""

    def __init__(self, seen: _Work):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.seen.within = True
        result = func(*args, **(kwargs or {}))
        self.seen.within = False
        self.seen.count(args, kwargs, result)
        return result


@dataclass(frozen=True)
class Work:
    """What a call is made of."""

    products: list[Shape]
    """The matrix products that do most of its work."""
    bytes: int
    """What its operations read and write, each by itself: more than what fused ones do."""


def work(model: nn.Module, image: Tensor, dtype: torch.dtype) -> Work:
    """The work of `model(image)` in inference in that dtype, counted on `meta`."""
    twin = deepcopy(model).to(device="meta", dtype=dtype).eval()
    image = image.to(device="meta", dtype=dtype)
    with _Work() as seen, _Fused(seen), torch.no_grad():
        twin(image)
    done = {(m, k, n): m * k * n * count for (m, k, n), count in seen.products.items()}
    return Work(sorted(done, key=lambda shape: -done[shape])[:OWN], seen.bytes)


def peak(dtype: torch.dtype, device: torch.device, own: Sequence[Shape] = ()) -> Peak:
    """Both peaks now: the highest of the median rates of each product, and that of a copy."""
    sides = SQUARES.get(device.type, SQUARES["cuda"])
    shapes = [*((side, side, side) for side in sides), *own]
    rates = {shape: _product_rate(shape, dtype, device) for shape in shapes}
    best = max(rates, key=lambda shape: rates[shape])
    return Peak(rates[best], best, _copy_rate(device))


def _product_rate(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    m, k, n = shape
    left, right = (torch.randn(*size, device=device).to(dtype) for size in ((m, k), (k, n)))
    out = torch.empty(m, n, device=device, dtype=dtype)
    return 2 * m * k * n / _seconds(lambda: torch.mm(left, right, out=out), device)


def _copy_rate(device: torch.device) -> float:
    size = max(CACHES * last_cache(device), 2**26)
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _seconds(act: Step, device: torch.device) -> float:
    """Seconds of one call: the median over blocks, each long enough to be read."""
    once = time_block(act, 1, device)
    once = min(once, time_block(act, 1, device))
    iterations = max(1, round(BLOCK_S / max(once, 1e-9)))
    return statistics.median(
        time_block(act, iterations, device) / iterations for _ in range(BLOCKS)
    )


def last_cache(device: torch.device) -> int:
    """Bytes of the device's last caches together; 32 MiB where that can't be read."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    bytes_by_level: dict[int, dict[str, int]] = {}
    for path in Path("/sys/devices/system/cpu").glob("cpu*/cache/index*/size"):
        if (text := path.read_text().strip()).endswith("K"):
            level = int(path.with_name("level").read_text())
            cores = path.with_name("shared_cpu_list").read_text()
            bytes_by_level.setdefault(level, {})[cores] = int(text.removesuffix("K")) * 2**10
    return sum(bytes_by_level[max(bytes_by_level)].values()) if bytes_by_level else 2**25


def data_sheet(gpu: str | None, dtype: torch.dtype) -> float | None:
    """FLOP/s that a GPU's maker gives for products in a dtype, as PyTorch is set; None if unknown.

    The T4 and V100 have no products in bfloat16.
    """
    known = next((name for name in DATA_SHEET if re.fullmatch(name, gpu or "")), None)
    if known is None or (known.startswith("Tesla") and dtype == torch.bfloat16):
        return None
    half, tf32, single = DATA_SHEET[known]
    if dtype == torch.float32:
        return tf32 if torch.backends.cuda.matmul.allow_tf32 else single
    return half if dtype in (torch.bfloat16, torch.float16) else None


def utilisation(flops: float, before: Peak, after: Peak) -> Utilisation:
    """A rate in FLOP per second beside the peaks around it.

    `mfu` is None, and `why` says so, where the peaks differ too much ("unsteady") or the rate lies
    above them, so that one of the two was counted or measured wrongly (`ABOVE_PEAK`).
    """
    low, high = sorted((before.flops, after.flops))
    why = ""
    if flops > ABOVE * high:
        why = ABOVE_PEAK
    elif high > (1 + UNSTEADY) * low:
        why = "unsteady"
    bandwidth = max(before.bytes, after.bytes)
    return Utilisation(flops, low, high, bandwidth, None if why else flops / high, why)
