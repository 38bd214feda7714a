"""Linear attention with decays against a loop over tokens in float64, forward and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from sambalm.model.ops.reference import linear_attention as module
from sambalm.model.ops.reference.linear_attention import linear_attention
from tests.model.test_ops import check, leaves, relative

HEADS, KEY, VALUE = 3, 10, 7
DECAYS = ("of a channel", "of a head", "fixed")


def inputs(batch: int, length: int, *, decays: str):
    """q, k, v, decays and a state."""
    shape = {"of a channel": (batch, length, HEADS, KEY), "of a head": (batch, length, HEADS), "fixed": (HEADS,)}
    return (
        torch.randn(batch, length, HEADS, KEY),
        torch.randn(batch, length, HEADS, KEY),
        torch.randn(batch, length, HEADS, VALUE),
        F.logsigmoid(torch.randn(shape[decays])) / 4,
        torch.randn(batch, HEADS, KEY, VALUE),
    )


def loop(q, k, v, log_decays, state, resets=None):
    """Token by token, by the formula of the papers."""
    if log_decays.dim() == 1:
        log_decays = log_decays.expand(q.shape[:3])
    if log_decays.dim() == 3:
        log_decays = log_decays[..., None]
    outputs = []
    for t in range(q.shape[1]):
        if resets is not None:
            state = torch.where(resets[:, t, None, None, None], 0, state)
        written = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        state = log_decays[:, t, ..., None].exp() * state + written
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) / q.shape[-1] ** 0.5)
    return torch.stack(outputs, 1), state


def run(*tensors, resets=None):
    *sequences, state = tensors
    return linear_attention(*sequences, initial_state=state, resets=resets)


@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("length", [1, 37, 64, 147])
def test_it_equals_the_loop(length, decays):
    check(run, loop, inputs(2, length, decays=decays), tolerance=1e-5)


@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 64])
def test_documents_begin_anywhere_in_a_chunk(chunk_tokens, decays, monkeypatch):
    """States carried in and out; first tokens at borders of chunks, behind each other and nowhere."""
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk_tokens)
    resets = torch.rand(4, 70) < 0.1
    resets[0, [0, 5, 64]] = resets[1, 20:23] = True
    resets[1, 0] = resets[2] = resets[3, 64:] = False
    arguments = inputs(4, 70, decays=decays)
    check(lambda *t: run(*t, resets=resets), lambda *t: loop(*t, resets), arguments, tolerance=1e-5)


@pytest.mark.parametrize("decays", DECAYS)
def test_it_forgets_and_remembers_over_extreme_decays(decays):
    """Decays down to e^-3000 a token beside almost none: nothing overflows, and what remains is right."""
    arguments = list(inputs(2, 100, decays=decays))
    arguments[3] = torch.where(torch.rand_like(arguments[3]) < 0.2, -3000.0, -1e-4)
    check(run, loop, arguments, tolerance=1e-5)


@pytest.mark.parametrize("decays", DECAYS)
def test_it_is_exact_in_float64_and_rounds_its_output_alone_in_bf16(decays):
    arguments = leaves(*inputs(2, 70, decays=decays), dtype=torch.float64)
    for actual, expected in zip(run(*arguments), loop(*arguments), strict=True):
        assert relative(actual, expected) < 1e-13
    halves = [t.detach().bfloat16() for t in arguments[:3]]
    others = [t.detach().float() for t in arguments[3:]]
    y, state = run(*halves, *others)
    expected, expected_state = loop(*(t.double() for t in (*halves, *others)))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert relative(state, expected_state) < 1e-6
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5)


def test_it_keeps_its_inputs_and_the_states_between_chunks_and_no_gradient_that_nobody_wants():
    arguments = leaves(*inputs(1, 640, decays="fixed"), dtype=torch.float32)
    arguments[3].requires_grad_(False)
    kept: dict[int, int] = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        y, _ = run(*arguments)
    given = sum(t.untyped_storage().nbytes() for t in arguments)
    assert sum(kept.values()) == given + 9 * arguments[-1].untyped_storage().nbytes()
    y.sum().backward()
    assert [t.grad is not None for t in arguments] == [True, True, True, False, True]
