"""cuDNN's window attention beyond test_kernels.py: windows, layouts, memory filled with NaN, recomputation."""

import pytest
import torch

from sambalm.model.ops.attention.cudnn import Call, cudnn_window, declines
from sambalm.model.ops.config import KernelConfig
from sambalm.model.ops.errors import DeclinedError, KernelError
from sambalm.model.ops.implementations import AttentionCall, KernelRequirements
from sambalm.model.ops.reference.window_attention import window_attention
from sambalm.model.ops.registry import build_kernels, why_unavailable
from sambalm.parallel.layers.recompute import recomputed

DEVICE = torch.device("cuda")
TOLERANCE = 1e-2  # of bf16, relative to the norm


@pytest.fixture(autouse=True)
def _available():
    reason = why_unavailable("attention", "cudnn", KernelRequirements("cuda", "bf16"))
    if not torch.cuda.is_available() or reason:
        pytest.skip(f"cudnn: {reason}")


@pytest.fixture
def poisoned():
    """Memory from torch.empty holds NaN, so that what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def inputs(*, queries, before=0, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16, batch=2):
    """As the layers give them: views of sequence-first memory, keys with a neighbour's before them."""
    sizes = ((queries, heads), *2 * [(queries + before, kv_heads)])
    return [
        torch.randn(length, batch, n, head_dim, device=DEVICE, dtype=dtype).permute(1, 2, 0, 3) for length, n in sizes
    ]


def run(function, tensors, *, window):
    """Output and gradients of q, k and v, for a gradient of the output that is the same for every function."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, window=window)
    torch.manual_seed(1)
    weight = torch.randn(out.shape, device=DEVICE, dtype=torch.float32).to(tensors[0].dtype).to(out.dtype)
    return out, torch.autograd.grad(out, leaves, weight)


def check(tensors, *, window, tolerance=TOLERANCE):
    assert Call.of(*tensors, window=window).refusal(training=True) is None
    out, gradients = run(cudnn_window, tensors, window=window)
    expected, expected_gradients = run(window_attention, [t.double() for t in tensors], window=window)
    for name, a, e in zip(("output", "q", "k", "v"), (out, *gradients), (expected, *expected_gradients), strict=True):
        assert (a.double() - e).norm() / e.norm() < tolerance, name
    return out, gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [2, 63, 64, 65, 200, 299, 300, 301, 2048])
def test_windows_around_block_borders_and_the_length(window, dtype, poisoned):
    check(inputs(queries=300, dtype=dtype), window=window)


def test_a_window_of_one_is_the_value_itself(poisoned):
    q, k, v = inputs(queries=77)
    out, (grad_q, grad_k, grad_v) = run(cudnn_window, (q, k, v), window=1)
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=1), rtol=0, atol=0)
    assert grad_q.abs().max() < 1e-2
    assert grad_k.abs().max() < 1e-2
    assert grad_v.isfinite().all()


@pytest.mark.parametrize("length", [2, 17, 128, 255, 1025])
def test_lengths_that_no_block_divides(length, poisoned):
    check(inputs(queries=length, heads=3, kv_heads=3, head_dim=128), window=100)


@pytest.mark.parametrize(("queries", "before", "window"), [(130, 1, 256), (130, 255, 256), (96, 500, 64), (1, 63, 64)])
def test_keys_from_before_the_first_query(queries, before, window, poisoned):
    _, (_, grad_k, grad_v) = check_cropped(queries, before, window)
    unseen = max(0, before - window + 1)
    assert not grad_k[:, :, :unseen].any()
    assert not grad_v[:, :, :unseen].any()


def check_cropped(queries, before, window):
    q, k, v = inputs(queries=queries, before=before)
    unseen = max(0, before - window + 1)
    assert Call.of(q, k[:, :, unseen:], v[:, :, unseen:], window=window).refusal(training=True) is None
    out, gradients = run(cudnn_window, (q, k, v), window=window)
    expected, expected_gradients = run(window_attention, [t.double() for t in (q, k, v)], window=window)
    for a, e in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert (a.double() - e).norm() < TOLERANCE * e.norm() + 1e-3
    return out, gradients


def test_any_layout_and_gradients_in_the_same():
    batch_first = [t.contiguous() for t in inputs(queries=200)]
    fused = torch.randn(200, 2, 8, 64, device=DEVICE, dtype=torch.bfloat16).permute(1, 2, 0, 3).split((4, 2, 2), dim=1)
    shifted = [torch.randn(t.numel() + 1, device=DEVICE, dtype=torch.bfloat16)[1:].view(t.shape) for t in batch_first]
    for tensors in (batch_first, fused, inputs(queries=200)):
        out, gradients = check(tensors, window=64)
        assert out.stride() == torch.empty_like(tensors[0]).stride()
        assert [g.stride() for g in gradients] == [torch.empty_like(t).stride() for t in tensors]
    out, _ = run(cudnn_window, shifted, window=64)  # not aligned, so copied first
    expected = window_attention(*(t.double() for t in shifted), window=64)
    assert (out.double() - expected).norm() / expected.norm() < TOLERANCE


def test_inference_and_recomputation_give_what_training_does():
    tensors = inputs(queries=300, head_dim=128)
    out, gradients = run(cudnn_window, tensors, window=100)
    with torch.no_grad():
        inference = cudnn_window(*tensors, window=100)
    again, recomputed_gradients = run(
        lambda *t, window: recomputed(cudnn_window, *t, window=window), tensors, window=100
    )
    assert (out.double() - inference.double()).norm() / out.double().norm() < 1e-3
    assert torch.equal(out, again)
    for gradient, other in zip(gradients, recomputed_gradients, strict=True):  # the queries' are summed in any order
        assert (gradient.double() - other.double()).norm() / gradient.double().norm() < 1e-3


def test_another_stream():
    tensors = inputs(queries=300, head_dim=128)
    expected, _ = run(cudnn_window, tensors, window=100)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            out, _ = run(cudnn_window, tensors, window=100)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


def test_a_shape_that_cudnn_declines_is_known_before_a_run_and_in_a_call():
    tensors = inputs(queries=300, head_dim=512)
    with pytest.raises(DeclinedError, match=r"cuDNN \S+ declines the \w+ of window attention .* 512"):
        run(cudnn_window, tensors, window=100)
    call = AttentionCall(batch=2, query_heads=4, kv_heads=2, queries=300, keys=300, head_dim=512, window=100)
    requirements = KernelRequirements("cuda", "bf16", attention_calls=(call,))
    with pytest.raises(KernelError, match=r"kernels\.attention is 'cudnn', .* declines the \w+ of .* 512"):
        build_kernels(KernelConfig(attention="cudnn"), requirements)
    assert "attention=cudnn" not in build_kernels(KernelConfig(), requirements).names


@pytest.mark.parametrize(("queries", "before", "window"), [(300, 0, 100), (130, 255, 256), (96, 500, 64), (1, 63, 64)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(12, 12, 128), (11, 1, 256), (32, 4, 64)])
def test_what_is_known_before_a_run_is_what_the_call_finds(queries, before, window, heads, kv_heads, head_dim):
    call = AttentionCall(2, heads, kv_heads, queries=queries, keys=queries + before, head_dim=head_dim, window=window)
    known = declines(call, precision="bf16")
    tensors = inputs(queries=queries, before=before, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    unseen = max(0, before - window + 1)
    q, k, v = tensors[0], *(t[:, :, unseen:] for t in tensors[1:])
    found = Call.of(q, k, v, window=window)
    assert found == Call.sequence_first(call, dtype=torch.bfloat16, device=found.device)
    assert known == found.refusal(training=True)
