"""flash-linear-attention's delta rules against the PyTorch reference in float64: forward and every gradient."""

import pytest
import torch

from sambalm.model.ops.config import KernelConfig
from sambalm.model.ops.implementations import KernelRequirements
from sambalm.model.ops.reference.delta_rule import gated_delta_rule
from sambalm.model.ops.registry import build_kernels, why_unavailable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TOLERANCE = 2e-2  # of bf16 inputs and outputs; triangular systems add to their rounding


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-3)).item()


@pytest.mark.parametrize("channels", [False, True], ids=["decay a head", "decay a channel"])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(("batch", "length", "heads", "key", "value"), [(2, 257, 3, 64, 128), (1, 1000, 2, 128, 384)])
def test_fla_is_the_reference(batch, length, heads, key, value, documents, channels):
    requirements = KernelRequirements(
        "cuda", "bf16", resets=documents, operations=("delta_rule",), delta_key_dims=(key,)
    )
    if reason := why_unavailable("delta_rule", "fla", requirements):
        pytest.skip(f"fla: {reason}")
    kernel = build_kernels(KernelConfig(delta_rule="fla"), requirements).delta_rule
    torch.manual_seed(0)
    gates = (heads, key) if channels else (heads,)
    sequences = [
        torch.randn(batch, length, heads, key),
        torch.randn(batch, length, heads, key),
        torch.randn(batch, length, heads, value),
        torch.randn(batch, length, *gates) - 3,
        torch.randn(batch, length, heads),
    ]
    sequences = [t.cuda().bfloat16().requires_grad_() for t in sequences]
    others = [torch.rand(heads), torch.randn(gates) - 1, torch.randn(batch, heads, key, value)]
    others = [t.cuda().requires_grad_() for t in others]
    resets = None
    if documents:
        resets = torch.rand(batch, length, device="cuda") < 0.02
        resets[:, 70], resets[0, 0] = True, batch > 1

    def run(function, sequences, others):
        A_log, dt_bias, state = others
        return function(*sequences, A_log=A_log, dt_bias=dt_bias, initial_state=state, resets=resets)

    results = run(kernel, sequences, others)
    exact = [[t.detach().double().requires_grad_() for t in given] for given in (sequences, others)]
    expected = run(gated_delta_rule, *exact)
    weights = [torch.randn_like(e) for e in expected]
    sum((a * w.to(a.dtype)).sum() for a, w in zip(results, weights, strict=True)).backward()
    sum((e * w).sum() for e, w in zip(expected, weights, strict=True)).backward()
    errors = [relative(a, e) for a, e in zip(results, expected, strict=True)]
    errors += [relative(a.grad, e.grad) for a, e in zip((*sequences, *others), (*exact[0], *exact[1]), strict=True)]
    assert max(errors) < TOLERANCE, errors
