"""Mamba-2's scan by mamba-ssm against the PyTorch reference in float64: forward, states and every gradient."""

import pytest
import torch

from sambalm.model.ops.reference.ssd_scan import ssd_scan
from tests.gpu.test_kernels import DEVICE, TOLERANCE, kernel, relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NAMES = ("x", "dt", "A_log", "B", "C", "D", "dt_bias", "initial_state")
HEADS, HEAD_DIM, GROUPS, STATES = 8, 64, 2, 128


def inputs_of(batch, length):
    """bf16 x, dt, B and C, and the others in fp32, as a layer has them."""
    sequences = [(HEADS, HEAD_DIM), (HEADS,), (GROUPS, STATES), (GROUPS, STATES)]
    x, dt, B, C = (torch.randn(batch, length, *shape, device=DEVICE).bfloat16() for shape in sequences)
    A_log, D, dt_bias = (torch.randn(HEADS, device=DEVICE) for _ in range(3))
    state = torch.randn(batch, HEADS, HEAD_DIM, STATES, device=DEVICE)
    return x, dt, A_log, B, C, D, dt_bias - 3, state


def run(scan, inputs, **options):
    x, dt, A_log, B, C, D, dt_bias, state = inputs
    return scan(x, dt, -torch.exp(A_log), B, C, D=D, dt_bias=dt_bias, initial_state=state, **options)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(2, 512), (1, 1000), (3, 77)])
def test_mamba_ssm_is_the_reference(batch, length, documents):
    scan, given = kernel("ssd", "mamba-ssm", operations=("ssd",)), inputs_of(batch, length)
    resets = torch.rand(batch, length, device=DEVICE) < 0.01
    resets[0, 0] = resets[-1, 5] = True
    options = {"resets": resets} if documents else {}
    actual_inputs = [t.detach().requires_grad_() for t in given]
    expected_inputs = [t.detach().double().requires_grad_() for t in given]
    actual, expected = run(scan, actual_inputs, **options), run(ssd_scan, expected_inputs, **options)
    weights = [torch.randn_like(t).to(a.dtype) for t, a in zip(expected, actual, strict=True)]
    for a, e in zip(actual, expected, strict=True):
        assert relative(a, e) < TOLERANCE
    assert actual[1].dtype == torch.float32
    sum((a * w).sum() for a, w in zip(actual, weights, strict=True)).backward()
    sum((e * w.double()).sum() for e, w in zip(expected, weights, strict=True)).backward()
    for name, a, e in zip(NAMES, actual_inputs, expected_inputs, strict=True):
        assert relative(a.grad, e.grad) < TOLERANCE, f"gradient of {name}"
