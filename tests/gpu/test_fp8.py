"""Rounding to FP8 on a GPU against the CPU's, bit by bit."""

import math

import pytest
import torch

from sambalm.parallel.layers.fp8 import FORMATS, product
from sambalm.parallel.layers.fp8_rounding import round_both_ways

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a CUDA device with FP8"
)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, [16]), (128, [64]), (200, [48, 16, 80]), (1000, [257, 1])])
def test_a_matrix_is_rounded_as_on_the_cpu(rows, columns, dtype):
    torch.manual_seed(rows)
    whole = torch.randn(rows, sum(columns) + 8).to(torch.bfloat16) * 30
    whole[-1, sum(columns) - 1] = -1e9
    matrix = whole[:, : sum(columns)]  # with more between its rows
    scale, largest = torch.tensor(2.0), torch.tensor(1.0, device=DEVICE)
    expected = round_both_ways(matrix.split(columns, dim=1), scale, largest=None, dtype=dtype)
    poisoned = tuple(torch.full(t.shape, 7.0, device=DEVICE).to(dtype) for t in expected)
    there = whole.to(DEVICE)[:, : sum(columns)].split(columns, dim=1)
    result = round_both_ways(there, scale.to(DEVICE), largest=largest, dtype=dtype, out=poisoned)
    for on_gpu, on_cpu in zip(result, expected, strict=True):
        assert torch.equal(on_gpu.cpu().view(torch.uint8), on_cpu.view(torch.uint8))
    assert largest.item() == matrix.abs().max().item()


@pytest.mark.parametrize("dtype", FORMATS)
def test_nan_stays_nan(dtype):
    values = torch.full((16, 16), math.nan, device=DEVICE, dtype=torch.bfloat16)
    one = torch.ones((), device=DEVICE)
    assert all(t.float().isnan().all() for t in round_both_ways([values], one, largest=None, dtype=dtype))


def test_a_product_is_that_of_the_rounded_matrices():
    left, right = torch.randn(64, 128, device=DEVICE), torch.randn(48, 128, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    (l8, _), (r8, _) = (round_both_ways([t], one, largest=None, dtype=FORMATS[0]) for t in (left, right))
    y = product(l8, r8, (one / 2, one / 4), out_dtype=torch.float32)
    torch.testing.assert_close(y.double(), l8.double() @ r8.double().t() / 8, rtol=2e-3, atol=2e-3)
