"""Mamba-2's scan in plain PyTorch against a float64 loop over tokens, forward and every gradient."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from sambalm.model.ops.reference import ssd_scan as module
from sambalm.model.ops.reference.ssd_scan import ssd_scan
from sambalm.parallel.layers.recompute import recomputed
from tests.model.test_ops import check, leaves

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


def scan(*inputs, resets=None):
    return ssd_scan(*inputs[:5], **dict(zip(NAMES[5:], inputs[5:], strict=True)), resets=resets)


def loop(x, dt, A, B, C, D, dt_bias, state, *, resets=None):
    outputs, steps = [], F.softplus(dt + dt_bias)
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
    for t in range(x.shape[1]):
        if resets is not None:
            state = torch.where(resets[:, t, None, None, None], 0, state)
        state = torch.exp(steps[:, t] * A)[..., None, None] * state
        state = state + (steps[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1), state


def inputs_of(batch, length, heads, head_dim, groups, states):
    return (
        torch.randn(batch, length, heads, head_dim),
        torch.randn(batch, length, heads) - 2,
        -torch.exp(torch.randn(heads)),
        torch.randn(batch, length, groups, states),
        torch.randn(batch, length, groups, states),
        torch.randn(heads),
        torch.randn(heads),
        torch.randn(batch, heads, head_dim, states),
    )


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2, 1, 1), (2, 129, 4, 5, 2, 7), (3, 37, 6, 3, 3, 5), (1, 200, 3, 8, 1, 16)]
)
def test_it_equals_the_loop(shape):
    check(scan, loop, inputs_of(*shape), tolerance=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 37])
def test_documents_from_a_state_equal_the_loop(chunk_tokens, monkeypatch):
    """Chunks that do not divide the length, resets at their borders and elsewhere, states carried in and out."""
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk_tokens)
    resets = torch.rand(3, 37) < 0.15
    resets[0, 0] = resets[1, 4] = True
    resets[1, 0] = resets[2] = False
    given = inputs_of(3, 37, 4, 3, 2, 5)
    check(partial(scan, resets=resets), partial(loop, resets=resets), given, tolerance=1e-5)


def test_it_forgets_and_remembers_over_extreme_steps():
    """Decays of e^-1000 and of almost one, side by side: nothing overflows, nothing is lost."""
    x, dt, *others = inputs_of(1, 64, 4, 4, 2, 8)
    dt = torch.where(torch.rand_like(dt) < 0.5, dt.abs() * 300, dt - 9)
    check(scan, loop, (x, dt, *others), tolerance=1e-5)


def test_two_pieces_equal_one():
    *inputs, initial = leaves(*inputs_of(2, 90, 4, 3, 2, 4), dtype=torch.float64)
    whole, final = scan(*inputs, initial)
    halves, state = [], initial
    for span in (slice(0, 71), slice(71, None)):
        y, state = scan(*(t if t.dim() == 1 else t[:, span] for t in inputs), state)
        halves.append(y)
    torch.testing.assert_close(torch.cat(halves, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(scan(*inputs, initial)[0], whole)


def test_recomputed_it_gives_the_same_gradients():
    inputs = leaves(*inputs_of(2, 70, 4, 3, 2, 4), dtype=torch.float32)

    def total(*inputs):
        return sum(t.sum() for t in scan(*inputs))

    expected = torch.autograd.grad(total(*inputs), inputs)
    actual = torch.autograd.grad(recomputed(total, *inputs), inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_states_are_computed_in_fp32_whatever_the_inputs():
    inputs = inputs_of(1, 80, 4, 3, 2, 4)
    x, dt, A, B, C, *others = inputs
    narrow = [t.bfloat16() for t in (x, dt, B, C)]
    y, state = scan(narrow[0], narrow[1], A, narrow[2], narrow[3], *others)
    exact, final = loop(*(t.double() for t in (narrow[0], narrow[1], A, narrow[2], narrow[3], *others)))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(state.double(), final, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)
