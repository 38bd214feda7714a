"""Matrix products with fp32 weights against plain float64 ones, forward and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from sambalm.parallel.linear import linear, linear_beside, linear_parts

SIZES = (5, 9)  # of the parts
ROWS = (8, 6)  # of the weights, which end elsewhere


def joined(x, *weights):
    return F.linear(x, torch.cat(weights))


FUNCTIONS = {
    "one weight": (lambda x, w, _: [linear(x, w)], lambda x, w, _: [joined(x, w)]),
    "two weights": (lambda x, *w: [linear(x, *w)], lambda x, *w: [joined(x, *w)]),
    "parts": (lambda x, *w: linear_parts(x, *w, sizes=SIZES), lambda x, *w: joined(x, *w).split(SIZES, dim=-1)),
    "beside": (lambda x, w, _: linear_beside(x, w), lambda x, w, _: [x, joined(x, w)]),
}


def run(function, inputs, weights):
    outputs = function(*inputs)
    sum((output.double() * weight).sum() for output, weight in zip(outputs, weights, strict=True)).backward()
    return [*outputs, *(tensor.grad for tensor in inputs if tensor.grad is not None)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_linear(name, dtype, transposed):
    torch.manual_seed(0)
    function, reference = FUNCTIONS[name]
    # Of values that bf16 holds, so that only sums and outputs are rounded.
    x = torch.randn(7, 3, 11).bfloat16()
    x = x.transpose(0, 1) if transposed else x
    weights = [torch.randn(rows, 11).bfloat16().float() for rows in ROWS]
    inputs = [x.to(dtype), *weights]
    expected_inputs = [tensor.double().requires_grad_() for tensor in inputs]
    factors = [torch.randn(output.shape).bfloat16().double() for output in reference(*expected_inputs)]
    expected = run(reference, expected_inputs, factors)
    actual = run(function, [tensor.detach().requires_grad_() for tensor in inputs], factors)
    assert len(actual) == len(expected)
    outputs = len(factors)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        in_fp32 = dtype == torch.float32 or number > outputs  # a weight's gradient is never rounded
        assert a.dtype == (torch.float32 if in_fp32 else dtype)
        assert (a.double() - e).norm() / e.norm() < (1e-6 if in_fp32 else 4e-3)
