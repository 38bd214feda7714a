"""The CUDA C++ scan against a loop in float64: outputs, states and every gradient, into poisoned memory."""

import pytest
import torch
import torch.nn.functional as F

from sambalm.model.ops.cuda.scan import TILE_TOKENS, _Shape, cuda_selective_scan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# By the dtype of a result. With 16-bit inputs the states before each tile are rounded, and softplus is approximate.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-3, torch.float16: 4e-4}
NARROW_TOLERANCE = TOLERANCE | {torch.float32: 2e-4}
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Deterministic mode fills what torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def loop(u, dt, A, B, C, D, z, dt_bias, state, resets=None):
    """The definition, in the inputs' own precision."""
    dt = F.softplus(dt + dt_bias)
    outputs = []
    for t in range(u.shape[1]):
        if resets is not None:
            state = state.masked_fill(resets[:, t, None, None], 0.0)
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    y = torch.stack(outputs, dim=1) + D * u
    return (y if z is None else y * F.silu(z)), state


def kernel(u, dt, A, B, C, D, z, dt_bias, state, resets=None):
    return cuda_selective_scan(u, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, initial_state=state, resets=resets)


def inputs_of(batch, length, channels, states, dtype):
    """Activations as the layers give them, views of sequence-first memory, some with gaps; weights in fp32."""

    def activation(width, gap=0):
        return torch.randn(length, batch, width + gap, device="cuda").to(dtype).transpose(0, 1)[..., :width]

    u, dt, z = activation(channels), activation(channels), activation(channels, gap=channels)
    B, C = activation(states, gap=7), activation(states, gap=3)
    A = -torch.exp(torch.randn(channels, states, device="cuda"))
    D, bias = torch.randn(channels, device="cuda"), torch.randn(channels, device="cuda") - 2
    return [u, dt, A, B, C, D, z, bias, torch.randn(batch, channels, states, device="cuda")]


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-6)).item()


def compare(inputs, dtype, resets=None):
    actual_inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    expected_inputs = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    actual, expected = kernel(*actual_inputs, resets), loop(*expected_inputs, resets)
    weights = [torch.randn_like(t) for t in actual]
    found, wanted = (
        torch.autograd.grad(
            sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights, strict=True)),
            [leaf for leaf in leaves if leaf is not None],
        )
        for outputs, leaves in ((actual, actual_inputs), (expected, expected_inputs))
    )
    names = [name for name, t in zip(NAMES, inputs, strict=True) if t is not None]
    tolerance = TOLERANCE if dtype == torch.float32 else NARROW_TOLERANCE
    for name, a, e in zip(("y", "state", *names), (*actual, *found), (*expected, *wanted), strict=True):
        assert a.shape == e.shape, name
        assert relative(a, e) < tolerance[a.dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("batch", "length", "channels", "states"),
    [
        (2, 128, 256, 16),
        (1, 1, 64, 16),
        (3, 77, 104, 16),
        (2, 16, 8, 16),
        (1, 33, 13, 3),  # neither channels nor states fit
        (2, 50, 72, 8),
        (2, 45, 80, 32),
        (1, 70, 88, 64),
        (2, 37, 40, 50),
    ],
)
def test_every_size(dtype, batch, length, channels, states):
    compare(inputs_of(batch, length, channels, states, dtype), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_time_cut_into_segments(dtype):
    inputs = inputs_of(1, 700, 64, 16, dtype)
    assert _Shape.of(inputs[0], inputs[2]).segments > 4
    compare(inputs, dtype)
    compare(inputs, dtype, resets=torch.rand(1, 700, device="cuda") < 0.01)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [45, 700])
def test_without_a_gate(dtype, length):
    inputs = inputs_of(1, length, 72, 16, dtype)
    inputs[NAMES.index("z")] = None
    compare(inputs, dtype, resets=torch.rand(1, length, device="cuda") < 0.01)


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_documents_that_begin_within_the_sequence(share):
    resets = torch.rand(2, 100, device="cuda") < share
    compare(inputs_of(2, 100, 48, 16, torch.float32), torch.float32, resets=resets)


def test_extreme_steps_neither_overflow_nor_lose_the_state():
    inputs = inputs_of(1, 64, 32, 16, torch.float32)
    inputs[1] = torch.where(torch.rand_like(inputs[1]) < 0.5, inputs[1] * 200, inputs[1] - 8)
    compare(inputs, torch.float32)


def test_two_halves_equal_the_whole():
    *sequences, state = inputs_of(2, 100, 32, 16, torch.float32)
    whole, end = kernel(*sequences, state)
    halves = []
    for span in (slice(0, 41), slice(41, None)):
        u, dt, A, B, C, D, z, bias = sequences
        y, state = kernel(u[:, span], dt[:, span], A, B[:, span], C[:, span], D, z[:, span], bias, state)
        halves.append(y)
    torch.testing.assert_close(torch.cat(halves, dim=1), whole)
    torch.testing.assert_close(state, end)


def test_two_runs_give_the_same_bits():
    inputs = [t.requires_grad_() for t in inputs_of(1, 40 * TILE_TOKENS, 64, 16, torch.bfloat16)]
    runs = [torch.autograd.grad(kernel(*inputs)[0].float().square().sum(), inputs) for _ in range(2)]
    for name, first, second in zip(NAMES, *runs, strict=True):
        assert torch.equal(first, second), name
