"""Peak rates: counted products and bytes, data sheets, and where utilisation is quoted."""

import pytest
import torch
from torch import nn

from vitx.measure import peak, timing
from vitx.model.cost import step_macs


def test_fused_attention_reads_and_writes_what_a_kernel_does():
    class Mixing(nn.Module):
        def forward(self, q):
            return nn.functional.scaled_dot_product_attention(q, q, q)

    work = peak.work(Mixing(), torch.randn(2, 3, 50, 8), torch.float32)
    assert work.bytes == 4 * 4 * 2 * 3 * 50 * 8


def test_a_models_products_and_bytes_are_counted():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    assert peak.work(model, torch.randn(10, 8), torch.bfloat16).bytes == 2 * 652
    work = peak.work(model, torch.randn(10, 8), torch.float32)
    assert work.products == [(10, 8, 16), (10, 16, 4)]
    values = [10 * 8, 8 * 16, 16, 10 * 16, 10 * 16, 16 * 4, 4, 10 * 4]
    assert work.bytes == 4 * sum(values)
    assert step_macs(model, torch.randn(10, 8)) == 10 * (8 * 16 * 2 + 16 * 4 * 3)


def test_utilisation_is_quoted_only_where_it_can_be():
    low, high = peak.Peak(1e9, (1, 1, 1), 1e9), peak.Peak(1.1e9, (1, 1, 1), 2e9)
    used = peak.utilisation(0.55e9, low, high)
    assert used.mfu == pytest.approx(0.5)
    assert used.bandwidth == 2e9
    far = peak.Peak(2e9, (1, 1, 1), 1e9)
    assert peak.utilisation(0.5e9, low, far).why == "unsteady"
    above = peak.utilisation(1.2e9, low, high)
    assert (above.mfu, above.why) == (None, "above the peak")


@pytest.fixture
def tf32():
    """Off at first, and afterwards as it was before the test."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    "name",
    ["NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "GRID A100-10C", "NVIDIA L40S",
     "NVIDIA GeForce RTX 4090 Laptop GPU"],
)  # fmt: skip
def test_a_part_or_a_relative_of_a_gpu_has_no_data_sheet(name):
    assert peak.data_sheet(name, torch.float16) is None


def test_a_data_sheets_peak_is_that_of_the_dtype_and_gpu(tf32):
    assert peak.data_sheet("NVIDIA H200", torch.bfloat16) == 989e12
    assert peak.data_sheet("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    torch.backends.cuda.matmul.allow_tf32 = True
    assert peak.data_sheet("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
    assert peak.data_sheet("Tesla T4", torch.bfloat16) is None
    assert peak.data_sheet(None, torch.float32) is None


def test_peaks_are_those_of_this_machine():
    left, right = torch.randn(512, 512), torch.randn(512, 512)

    def once() -> float:
        return timing.time_block(lambda: left @ right, 20, torch.device("cpu")) / 20

    before, fastest = once(), peak.peak(torch.float32, torch.device("cpu"), [(64, 32, 64)])
    slower = max(before, once())
    assert fastest.flops > 0.3 * 2 * 512**3 / slower  # on a machine that others use too
    assert fastest.bytes > 1e8
    assert fastest.shape in {(side,) * 3 for side in peak.SQUARES["cpu"]} | {(64, 32, 64)}
