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
    whole[0, 0], whole[-1, sum(columns) - 1] = math.nan, -1e9
    parts = whole[:, : sum(columns)].split(columns, dim=1)  # with more between their rows
    scale, largest = torch.tensor(2.0), torch.tensor(1.0)
    expected = round_both_ways(parts, scale, largest=None, dtype=dtype)
    poisoned = tuple(torch.full(t.shape, 7.0, device=DEVICE).to(dtype) for t in expected)
    on_gpu = [part.to(DEVICE) if len(parts) == 1 else whole.to(DEVICE)[:, : sum(columns)] for part in parts[:1]]
    parts_there = on_gpu[0].split(columns, dim=1)
    found = largest.to(DEVICE)
    result = round_both_ways(parts_there, scale.to(DEVICE), largest=found, dtype=dtype, out=poisoned)
    for here, there in zip(result, expected, strict=True):
        bits = here.cpu().view(torch.uint8), there.view(torch.uint8)
        assert (bits[0] == bits[1]).logical_or(there.float().isnan()).all()
        assert torch.equal(here.float().isnan().cpu(), there.float().isnan())
    finite = whole[:, : sum(columns)].float()
    assert found.item() == finite[finite.isfinite()].abs().max().item() or found.isnan()


def test_a_product_is_that_of_the_rounded_matrices():
    left, right = torch.randn(64, 128, device=DEVICE), torch.randn(48, 128, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    (l8, _), (r8, _) = (round_both_ways([t], one, largest=None, dtype=FORMATS[0]) for t in (left, right))
    y = product(l8, r8, (one / 2, one / 4), out_dtype=torch.float32)
    torch.testing.assert_close(y.double(), l8.double() @ r8.double().t() / 8, rtol=2e-3, atol=2e-3)
