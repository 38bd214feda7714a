"""flash-linear-attention's GLA and retention against the PyTorch reference in float64: forward and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from sambalm.model.ops.config import KernelConfig
from sambalm.model.ops.implementations import KernelRequirements
from sambalm.model.ops.reference.linear_attention import linear_attention, retention_log_decays
from sambalm.model.ops.registry import build_kernels, why_unavailable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TOLERANCE = 2e-2  # of bf16 inputs and outputs


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-3)).item()


def decays_of(kind: str, batch: int, length: int, heads: int, key: int) -> torch.Tensor:
    if kind == "retention":  # a tensor-parallel rank's, which are not the first heads'
        return retention_log_decays(heads + 2, device=torch.device("cuda"))[2:]
    shape = (heads, key) if kind == "gated" else (heads,)
    return F.logsigmoid(torch.randn(batch, length, *shape, device="cuda")) / 16


@pytest.mark.parametrize("kind", ["gated", "retention"])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(("batch", "length", "heads", "key", "value"), [(2, 257, 3, 64, 128), (1, 1000, 2, 192, 384)])
def test_fla_is_the_reference(batch, length, heads, key, value, documents, kind):
    requirements = KernelRequirements("cuda", "bf16", resets=documents, operations=("linear_attention",))
    if reason := why_unavailable("linear_attention", "fla", requirements):
        pytest.skip(f"fla: {reason}")
    kernel = build_kernels(KernelConfig(linear_attention="fla"), requirements).linear_attention
    torch.manual_seed(0)
    sequences = [torch.randn(batch, length, heads, width) for width in (key, key, value)]
    inputs = [t.cuda().bfloat16().requires_grad_() for t in sequences]
    decays = decays_of(kind, batch, length, heads, key).requires_grad_(kind == "gated")
    inputs += [decays, torch.randn(batch, heads, key, value, device="cuda", requires_grad=True)]
    resets = None
    if documents:
        resets = torch.rand(batch, length, device="cuda") < 0.02
        resets[:, 70], resets[0, 0] = True, batch > 1

    def run(function, inputs):
        *sequences, state = inputs
        return function(*sequences, initial_state=state, resets=resets)

    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    results, expected = run(kernel, inputs), run(linear_attention, exact)
    weights = [torch.randn_like(e) for e in expected]
    sum((a * w.to(a.dtype)).sum() for a, w in zip(results, weights, strict=True)).backward()
    sum((e * w).sum() for e, w in zip(expected, weights, strict=True)).backward()
    errors = [relative(a, e) for a, e in zip(results, expected, strict=True)]
    errors += [relative(a.grad, e.grad) for a, e in zip(inputs, exact, strict=True) if a.requires_grad]
    assert max(errors) < TOLERANCE, errors


def test_flas_generation_takes_decays_of_every_token():
    """Of padded rows, whose padding decays no state. Nothing trains with them."""
    requirements = KernelRequirements("cuda", "bf16", operations=("linear_attention",))
    if reason := why_unavailable("linear_attention", "fla", requirements):
        pytest.skip(f"fla: {reason}")
    kernel = build_kernels(KernelConfig(linear_attention="fla"), requirements).linear_attention
    torch.manual_seed(0)
    inputs = [torch.randn(2, 130, 3, width, device="cuda").bfloat16() for width in (64, 64, 128)]
    inputs.append(decays_of("a head's", 2, 130, 3, 64))
    with torch.no_grad():
        results, expected = kernel(*inputs), linear_attention(*(t.double() for t in inputs))
    assert max(relative(a, e) for a, e in zip(results, expected, strict=True)) < TOLERANCE
