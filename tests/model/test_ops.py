"""The PyTorch operations against float64 references written as plainly as possible, forward and every gradient."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from sambalm.model.ops.cuda.scan import cuda_selective_scan
from sambalm.model.ops.errors import KernelError
from sambalm.model.ops.reference import selective_scan as scan_module
from sambalm.model.ops.reference.causal_conv import causal_conv_silu
from sambalm.model.ops.reference.rms_norm import add_rms_norm, rms_norm
from sambalm.model.ops.reference.selective_scan import gated_selective_scan, selective_scan
from sambalm.model.ops.reference.window_attention import apply_rotary, rotary_tables, window_attention
from sambalm.parallel.layers.recompute import recomputed


def relative(actual, expected):
    """Error over norm, but over 0.01 where the expectation is smaller."""
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=0.01)).item()


def leaves(*tensors, dtype):
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


def check(function, reference, inputs, *, tolerance, zero_gradients=()):
    """Outputs and gradients of function on fp32 inputs against reference on the same values in fp64.

    The gradients of some inputs may be given as zero: for them the tolerance is absolute.
    """
    actual_inputs, expected_inputs = leaves(*inputs, dtype=torch.float32), leaves(*inputs, dtype=torch.float64)
    actual, expected = function(*actual_inputs), reference(*expected_inputs)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert relative(a, e) < tolerance
    weights = [torch.randn_like(e) for e in expected]
    sum((a * w).sum() for a, w in zip(actual, weights, strict=True)).backward()
    sum((e * w).sum() for e, w in zip(expected, weights, strict=True)).backward()
    for number, (a, e) in enumerate(zip(actual_inputs, expected_inputs, strict=True)):
        error = a.grad.abs().max().item() if number in zero_gradients else relative(a.grad, e.grad)
        assert error < tolerance, f"gradient of input {number}"


def loop_scan(u, dt, A, B, C, state):
    outputs = []
    for t in range(u.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1), state


def scan_inputs(batch, length, channels, states):
    return (
        torch.randn(batch, length, channels),
        F.softplus(torch.randn(batch, length, channels) - 1),
        -torch.exp(torch.randn(channels, states)),
        torch.randn(batch, length, states),
        torch.randn(batch, length, states),
        torch.randn(batch, channels, states),
    )


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 129, 5, 16), (3, 37, 7, 3), (1, 300, 24, 16)])
def test_scan_equals_the_loop(shape):
    check(selective_scan, loop_scan, scan_inputs(*shape), tolerance=1e-5)


def test_scan_equals_the_loop_in_chunks_of_one_token(monkeypatch):
    monkeypatch.setattr(scan_module, "CHUNK_ELEMENTS", {"cpu": 1})
    check(selective_scan, loop_scan, scan_inputs(2, 9, 5, 4), tolerance=1e-5)


def test_scan_forgets_and_remembers_over_extreme_steps():
    """Decays of e^-1000 and of almost one, side by side: nothing overflows, nothing is lost."""
    u, dt, A, B, C, state = scan_inputs(1, 64, 4, 8)
    dt = torch.where(torch.rand_like(dt) < 0.5, dt * 1000, dt * 1e-4)
    check(selective_scan, loop_scan, (u, dt, A, B, C, state), tolerance=1e-5)


def test_scan_in_two_pieces_equals_one():
    inputs = leaves(*scan_inputs(2, 50, 6, 4), dtype=torch.float64)
    *sequences, state = inputs
    whole, final = selective_scan(*inputs)
    halves = []
    for span in (slice(0, 19), slice(19, None)):
        u, dt, A, B, C = (t if t.dim() == 2 else t[:, span] for t in sequences)
        y, state = selective_scan(u, dt, A, B, C, state)
        halves.append(y)
    torch.testing.assert_close(torch.cat(halves, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def loop_scan_of_documents(u, dt, A, B, C, state, resets):
    outputs = []
    for t in range(u.shape[1]):
        state = torch.where(resets[:, t, None, None], 0, state)
        y, state = loop_scan(u[:, t : t + 1], dt[:, t : t + 1], A, B[:, t : t + 1], C[:, t : t + 1], state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("chunk_tokens", [1, 4, 37])
@pytest.mark.parametrize("time_first", [False, True])
def test_scan_of_documents_from_a_state_equals_the_loop(chunk_tokens, time_first, monkeypatch):
    """Chunks that do not divide the length, resets at their borders and elsewhere, states carried in and out."""
    batch, length, channels, states = 3, 37, 7, 5
    monkeypatch.setattr(scan_module, "CHUNK_ELEMENTS", {"cpu": chunk_tokens * batch * channels * states})
    resets = torch.rand(batch, length) < 0.15
    resets[0, 0] = resets[1, 4] = True
    resets[1, 0] = resets[2] = False

    def scan(u, dt, A, B, C, state):
        if time_first:
            u, dt, B, C = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (u, dt, B, C))
        return selective_scan(u, dt, A, B, C, state, resets=resets)

    inputs = scan_inputs(batch, length, channels, states)
    check(scan, lambda *t: loop_scan_of_documents(*t, resets), inputs, tolerance=1e-5)


def test_recomputed_scan_and_conv_give_the_same_gradients():
    inputs = leaves(*scan_inputs(2, 9, 5, 4), torch.randn(5, 4), torch.randn(5), dtype=torch.float32)

    def scan_of_conv(u, dt, A, B, C, state, weight, bias):
        y, final = selective_scan(causal_conv_silu(u, weight, bias), dt, A, B, C, state)
        return y.sum() + final.sum()

    expected = torch.autograd.grad(scan_of_conv(*inputs), inputs)
    actual = torch.autograd.grad(recomputed(scan_of_conv, *inputs), inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_scan_keeps_only_border_states_for_the_backward():
    u, dt, A, B, C, state = leaves(*scan_inputs(1, 2048, 64, 16), dtype=torch.float32)
    saved_bytes = 0

    def count(tensor):
        nonlocal saved_bytes
        saved_bytes += tensor.untyped_storage().nbytes()  # also what the tensor is a view of
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        selective_scan(u, dt, A, B, C, state)
    every_state_bytes = 4 * 2048 * 64 * 16
    assert saved_bytes < every_state_bytes / 4


def test_gated_scan_equals_the_loop():
    def reference(u, dt, A, B, C, state, D, z, bias):
        y, state = loop_scan(u, F.softplus(dt + bias), A, B, C, state)
        return (y + D * u) * F.silu(z), state

    def function(u, dt, A, B, C, state, D, z, bias):
        return gated_selective_scan(u, dt, A, B, C, D=D, z=z, dt_bias=bias, initial_state=state)

    inputs = (*scan_inputs(2, 33, 6, 4), torch.randn(6), torch.randn(2, 33, 6), torch.randn(6))
    check(function, reference, inputs, tolerance=1e-5)


def test_gated_scan_of_bf16_inputs_rounds_its_output_alone():
    """The state, which stays in fp32, is that of the same values in fp64."""
    u, dt, A, B, C, state = scan_inputs(2, 33, 6, 4)
    D, z, bias = torch.randn(6), torch.randn(2, 33, 6), torch.randn(6)
    u, dt, B, C, z = (t.bfloat16() for t in (u, dt, B, C, z))
    y, final = gated_selective_scan(u, dt, A, B, C, D=D, z=z, dt_bias=bias, initial_state=state)
    u, dt, A, B, C, state, D, z, bias = (t.double() for t in (u, dt, A, B, C, state, D, z, bias))
    expected, expected_final = loop_scan(u, F.softplus(dt + bias), A, B, C, state)
    expected = (expected + D * u) * F.silu(z)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert relative(final, expected_final) < 1e-6
    # To half a unit of bf16's last place and a little.
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 4), (17, 4), (17, 2)])
def test_conv_equals_the_definition(length, taps):
    def reference(x, weight, bias, state):
        padded = torch.cat((state, x), 1)
        y = torch.stack([(padded[:, t : t + taps] * weight.t()).sum(1) + bias for t in range(length)], 1)
        return [F.silu(y)]

    inputs = (torch.randn(2, length, 5), torch.randn(5, taps), torch.randn(5), torch.randn(2, taps - 1, 5))
    check(lambda *t: [causal_conv_silu(*t)], reference, inputs, tolerance=1e-5)


@pytest.mark.parametrize("length", [1, 2, 23])
def test_conv_of_documents_from_a_state_equals_the_definition(length):
    batch, taps, channels = 3, 4, 5
    resets = torch.rand(batch, length) < 0.2
    resets[0, 0], resets[1, 0] = True, False

    def reference(x, weight, bias, state):
        padded, outputs = torch.cat((state, x), 1), []
        for t in range(length):
            output = bias
            for back in range(taps):
                cut = resets[:, max(0, t - back + 1) : t + 1].any(1) if back else torch.zeros(batch, dtype=torch.bool)
                seen = torch.where(cut[:, None], 0, padded[:, taps - 1 + t - back])
                output = output + seen * weight[:, taps - 1 - back]
            outputs.append(F.silu(output))
        return [torch.stack(outputs, 1)]

    inputs = (torch.randn(batch, length, channels), torch.randn(channels, taps), torch.randn(channels))
    state = torch.randn(batch, taps - 1, channels)
    check(lambda *t: [causal_conv_silu(*t, resets=resets)], reference, (*inputs, state), tolerance=1e-5)


def test_conv_of_one_token_leaves_its_arguments_as_they_are():
    """Where a copy of the bias for every token has the bias's own shape."""
    inputs = [torch.randn(1, 1, 5), torch.randn(5, 4), torch.randn(5)]
    before = [t.clone() for t in inputs]
    causal_conv_silu(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def dense_attention(q, k, v, *, window):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    position = torch.arange(keys - queries, keys)[:, None]
    seen = (torch.arange(keys) <= position) & (torch.arange(keys) > position - window)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "window"),
    [
        (1, 1, 1, 1, 1),
        (70, 70, 2, 2, 200),
        (200, 200, 11, 1, 65),
        (150, 150, 4, 2, 3),
        (33, 60, 4, 4, 20),
        (1, 40, 4, 1, 16),
        (5, 8, 2, 2, 100),
        (16, 16, 2, 1, 16),
        (17, 17, 2, 1, 16),
        # Where the first key that a block of 64 queries sees is the last one of a block, and one further on each side.
        *((130, 130 + before, 2, 1, window) for window in (1, 2, 3, 63, 64) for before in (0, 1, 70)),
    ],
)
def test_window_attention_equals_dense(queries, keys, heads, kv_heads, window):
    inputs = (torch.randn(2, heads, queries, 8), *(torch.randn(2, kv_heads, keys, 8) for _ in range(2)))
    check(
        lambda q, k, v: [window_attention(q, k, v, window=window)],
        lambda q, k, v: [dense_attention(q, k, v, window=window)],
        inputs,
        tolerance=1e-5,
        zero_gradients=(0, 1)
        if keys == 1 or window == 1
        else (),  # a query of one key gives it all its weight, whatever they are
    )


def test_window_attention_never_holds_a_square_of_the_length():
    length, window = 4096, 64
    q, k, v = (torch.randn(1, 1, length, 8) for _ in range(3))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        window_attention(q, k, v, window=window)
    assert length * 8 <= largest < length * window


def elements_computed_by_attention(length, *, window):
    """Elements of every result in a forward and backward."""
    elements = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal elements
            out = func(*args, **(kwargs or {}))
            elements += sum(t.numel() for t in (out if isinstance(out, tuple | list) else (out,)) if t is not None)
            return out

    q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    with Count():
        window_attention(q, k, v, window=window).sum().backward()
    return elements


def test_window_attention_and_its_backward_grow_with_the_length_alone():
    short, long = (elements_computed_by_attention(length, window=64) for length in (4096, 8192))
    assert long < 2.1 * short


@pytest.mark.parametrize("first", [0, 10**6, 16_777_217, 10**9 - 50])
def test_rotary_tables_are_exact_up_to_a_billion_positions(first):
    rates = [Fraction(10000.0 ** (-pair / 8)) for pair in range(8)]
    angles = [[float((first + i) * rate % Fraction(math.tau)) for rate in rates] for i in range(50)]
    exact = torch.tensor(angles, dtype=torch.float64)
    cos, sin = rotary_tables(torch.arange(first, first + 50), head_dim=16, base=10000.0)
    assert (cos - exact.cos()).abs().max() < 1e-6
    assert (sin - exact.sin()).abs().max() < 1e-6
    assert cos.dtype == sin.dtype == torch.float32


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 16, dtype=torch.float64)
    cos, sin = rotary_tables(torch.arange(50), head_dim=16, base=10000.0)
    q, k = (apply_rotary(t.expand(50, 16), cos.double(), sin.double()) for t in (q, k))
    scores = q @ k.t()
    torch.testing.assert_close(scores[10:, 10:], scores[:-10, :-10], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[0, 1], scores[0, 2], rtol=1e-3)


def test_add_rms_norm_equals_the_definition():
    def reference(x, branch, w):
        total = x + branch
        return [total, total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w]

    inputs = (torch.randn(3, 7, 33), torch.randn(3, 7, 33), torch.randn(33))
    check(lambda x, branch, w: add_rms_norm(x, branch, w, eps=1e-5), reference, inputs, tolerance=1e-5)


def test_rms_norm_equals_the_definition():
    def reference(x, weight):
        return [x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight]

    check(lambda x, w: [rms_norm(x, w, eps=1e-5)], reference, (torch.randn(3, 7, 33), torch.randn(33)), tolerance=1e-5)


def test_the_cuda_scan_says_how_many_states_it_holds():
    u, dt, A, B, C, _ = scan_inputs(1, 2, 8, 65)
    with pytest.raises(KernelError, match=r"model\.d_state is 65 .* at most 64: set kernels\.scan to"):
        cuda_selective_scan(u, dt, A, B, C, D=A[:, 0], z=u, dt_bias=A[:, 0])
