"""The gated delta rule against a loop over tokens in float64, forward and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from sambalm.model.ops.reference import delta_rule
from sambalm.model.ops.reference.delta_rule import gated_delta_rule
from tests.model.test_ops import check, leaves, relative

HEADS, KEY, VALUE = 3, 10, 7


def inputs(batch: int, length: int, *, channels: bool, strength: float = 1.0):
    """q, k, v, gate, beta, A_log, dt_bias and a state."""
    gates = (HEADS, KEY) if channels else (HEADS,)
    return (
        torch.randn(batch, length, HEADS, KEY),
        torch.randn(batch, length, HEADS, KEY),
        torch.randn(batch, length, HEADS, VALUE),
        torch.randn(batch, length, *gates) - 2,
        torch.randn(batch, length, HEADS),
        torch.randn(HEADS) * 0.5 + strength,
        torch.randn(gates),
        torch.randn(batch, HEADS, KEY, VALUE),
    )


def loop(q, k, v, gate, beta, A_log, dt_bias, state, resets=None):
    """Token by token, by the formula of the papers."""
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    rates = A_log.exp()
    if gate.dim() == 4:
        decay = (-rates[:, None] * F.softplus(gate + dt_bias)).exp()
    else:
        decay = (-rates * F.softplus(gate + dt_bias)).exp()[..., None]
    outputs = []
    for t in range(q.shape[1]):
        if resets is not None:
            state = torch.where(resets[:, t, None, None, None], 0, state)
        state = decay[:, t, ..., None] * state
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t].sigmoid(), k[:, t], error)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) / q.shape[-1] ** 0.5)
    return torch.stack(outputs, 1), state


def rule(*tensors, resets=None):
    *sequences, A_log, dt_bias, state = tensors
    return gated_delta_rule(*sequences, A_log=A_log, dt_bias=dt_bias, initial_state=state, resets=resets)


@pytest.mark.parametrize("channels", [False, True], ids=["decay a head", "decay a channel"])
@pytest.mark.parametrize("length", [1, 37, 64, 147])
def test_it_equals_the_loop(length, channels):
    check(rule, loop, inputs(2, length, channels=channels), tolerance=1e-5)


@pytest.mark.parametrize("channels", [False, True], ids=["decay a head", "decay a channel"])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 64])
def test_documents_begin_anywhere_in_a_chunk(chunk_tokens, channels, monkeypatch):
    """States carried in and out; first tokens at borders of chunks, behind each other and nowhere."""
    monkeypatch.setattr(delta_rule, "CHUNK_TOKENS", chunk_tokens)
    resets = torch.rand(4, 70) < 0.1
    resets[0, [0, 5, 64]] = resets[1, 20:23] = True
    resets[1, 0] = resets[2] = resets[3, 64:] = False
    arguments = inputs(4, 70, channels=channels)
    check(lambda *t: rule(*t, resets=resets), lambda *t: loop(*t, resets), arguments, tolerance=1e-5)


@pytest.mark.parametrize("channels", [False, True], ids=["decay a head", "decay a channel"])
def test_it_forgets_and_remembers_over_extreme_decays(channels):
    """Decays down to e^-3000 a token beside almost none: nothing overflows, and what remains is right."""
    arguments = list(inputs(2, 100, channels=channels))
    arguments[3] = torch.where(torch.rand_like(arguments[3]) < 0.2, 1000.0, -9.0)
    check(rule, loop, arguments, tolerance=1e-5)


@pytest.mark.parametrize("channels", [False, True], ids=["decay a head", "decay a channel"])
def test_it_is_exact_in_float64_and_rounds_its_output_alone_in_bf16(channels):
    arguments = leaves(*inputs(2, 70, channels=channels), dtype=torch.float64)
    for actual, expected in zip(rule(*arguments), loop(*arguments), strict=True):
        assert relative(actual, expected) < 1e-13
    halves = [t.detach().bfloat16() for t in arguments[:5]]
    others = [t.detach().float() for t in arguments[5:]]
    y, state = rule(*halves, *others)
    expected, expected_state = loop(*(t.double() for t in (*halves, *others)))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert relative(state, expected_state) < 1e-6
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5)


def test_it_keeps_its_inputs_and_the_states_between_chunks():
    arguments = leaves(*inputs(1, 640, channels=True), dtype=torch.float32)
    kept: dict[int, int] = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        rule(*arguments)
    given = sum(t.untyped_storage().nbytes() for t in arguments)
    assert sum(kept.values()) == given + 9 * arguments[-1].untyped_storage().nbytes()
