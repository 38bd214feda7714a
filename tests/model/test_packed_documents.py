"""Packed documents against each of them alone, in float64: operations, then whole models, outputs and every gradient.

`MISTAKES` drops the documents at one place each and shows that the comparison sees it.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from sambalm.model.config import ModelConfig
from sambalm.model.ops.documents import Documents
from sambalm.model.ops.implementations import KernelRequirements
from sambalm.model.ops.reference import selective_scan as scan_module
from sambalm.model.ops.reference.causal_conv import causal_conv_silu
from sambalm.model.ops.reference.selective_scan import gated_selective_scan
from sambalm.model.ops.reference.window_attention import window_attention
from sambalm.model.ops.registry import TORCH_KERNELS, why_unavailable
from sambalm.model.samba import Samba
from sambalm.parallel.sharding import initialize_parameters

# Lengths of each row's documents: of one token, of a whole row, beginning and ending anywhere.
ROWS = [[5, 1, 1, 14, 19], [40], [39, 1]]
BATCH, LENGTH = len(ROWS), sum(ROWS[0])


def starts_of(rows):
    return torch.tensor([[sum(row[:i]) for i, n in enumerate(row) for _ in range(n)] for row in rows])


CPU = torch.device("cpu")
DOCUMENTS = Documents(starts_of(ROWS), first=0, device=CPU)


def spans():
    """Row and tokens of each document."""
    for row, lengths in enumerate(ROWS):
        start = 0
        for length in lengths:
            yield row, slice(start, start + length)
            start += length


def check(packed, alone, inputs, *, tolerance=1e-12):
    """packed(*inputs) against alone(*inputs of a document) for each; inputs of 3 dimensions are cut, others whole."""
    packed_inputs, alone_inputs = ([t.detach().clone().requires_grad_() for t in inputs] for _ in range(2))
    actual, weights = packed(*packed_inputs), torch.randn(BATCH, LENGTH, inputs[0].shape[-1], dtype=torch.float64)
    (actual * weights).sum().backward()
    for row, span in spans():
        expected = alone(*(t[row : row + 1, span] if t.dim() == 3 else t for t in alone_inputs))
        torch.testing.assert_close(actual[row : row + 1, span], expected, rtol=tolerance, atol=tolerance)
        (expected * weights[row : row + 1, span]).sum().backward()
    for number, (a, b) in enumerate(zip(packed_inputs, alone_inputs, strict=True)):
        assert torch.isfinite(a.grad).all()
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance, msg=lambda m, n=number: f"{n}: {m}")


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("chunk_elements", [1, 1 << 9, 1 << 18])
def test_scan(chunk_elements, monkeypatch):
    monkeypatch.setattr(scan_module, "CHUNK_ELEMENTS", {"cpu": chunk_elements})
    channels, states = 5, 4

    def scan(u, dt, B, C, z, a_log, D, bias, **more):
        return gated_selective_scan(u, dt, -torch.exp(a_log), B, C, D=D, z=z, dt_bias=bias, **more)[0]

    sequences = [normal(BATCH, LENGTH, width) for width in (channels, channels, states, states, channels)]
    inputs = [*sequences, normal(channels, states), normal(channels), normal(channels)]
    check(partial(scan, resets=DOCUMENTS.resets), scan, inputs)


def test_scan_forgets_its_initial_state_at_a_first_token_alone():
    u, dt, B, C, z = (normal(BATCH, LENGTH, width) for width in (5, 5, 4, 4, 5))
    state = normal(BATCH, 5, 4).requires_grad_()
    resets = DOCUMENTS.resets.clone()
    resets[1, 0] = False  # this row goes on from the state, the others begin
    y, _ = gated_selective_scan(
        u, dt, -normal(5, 4).exp(), B, C, D=normal(5), z=z, dt_bias=normal(5), initial_state=state, resets=resets
    )
    y.sum().backward()
    assert state.grad.flatten(1).abs().amax(1).gt(0).tolist() == [False, True, False]


@pytest.mark.parametrize("taps", [2, 4])
def test_convolution(taps):
    inputs = (normal(BATCH, LENGTH, 5), normal(5, taps), normal(5))
    check(partial(causal_conv_silu, resets=DOCUMENTS.resets), causal_conv_silu, inputs)


@pytest.mark.parametrize("window", [1, 3, 12, 64])
@pytest.mark.parametrize("block", [7, 512])
def test_attention(window, block, monkeypatch):
    from sambalm.model.ops.reference import window_attention as module

    monkeypatch.setattr(module, "MIN_BLOCK_QUERIES", min(block, 64))
    monkeypatch.setattr(module, "MAX_BLOCK_QUERIES", block)

    def attend(q, k, v, **more):
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
        return window_attention(q, k, v, window=window, **more).transpose(1, 2).flatten(2)

    inputs = [normal(BATCH, LENGTH, width) for width in (8, 4, 4)]
    documents = DOCUMENTS.attention(range(LENGTH), keys_before=0)
    check(partial(attend, documents=documents), attend, inputs)


def variable_length_attention(q, k, v, *, window, documents):
    """What a variable-length kernel makes of its arguments: every sequence alone, aligned at its end."""
    lengths, outputs = documents.variable_lengths, []
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    borders_q, borders_k = lengths.cu_seqlens_q.tolist(), lengths.cu_seqlens_k.tolist()
    for i in range(len(borders_q) - 1):
        queries, keys = slice(*borders_q[i : i + 2]), slice(*borders_k[i : i + 2])
        assert 0 <= queries.stop - queries.start <= lengths.max_seqlen_q
        assert 0 <= keys.stop - keys.start <= lengths.max_seqlen_k
        if queries.start < queries.stop:
            one = (t.transpose(0, 1).unsqueeze(0) for t in (q[queries], k[keys], v[keys]))
            outputs.append(window_attention(*one, window=window)[0].transpose(0, 1))
    return torch.cat(outputs).unflatten(0, (documents.given_first_keys.shape[0], -1)).transpose(1, 2)


@pytest.mark.parametrize(("queries", "keys_before"), [((0, 40), 0), ((7, 40), 7), ((6, 11), 2), ((30, 40), 30)])
def test_variable_lengths_say_the_same_as_first_keys(queries, keys_before):
    queries = range(*queries)
    documents = DOCUMENTS.attention(queries, keys_before=keys_before)
    assert documents is DOCUMENTS.attention(queries, keys_before=keys_before)  # made once
    lengths = documents.variable_lengths
    assert lengths.cu_seqlens_q.dtype == lengths.cu_seqlens_k.dtype == torch.int32
    assert lengths.cu_seqlens_q[-1] == BATCH * len(queries)
    assert lengths.cu_seqlens_k[-1] == BATCH * documents.keys
    assert lengths.cu_seqlens_q.diff().max() == lengths.max_seqlen_q
    assert lengths.cu_seqlens_k.diff().max() == lengths.max_seqlen_k
    q, k, v = normal(BATCH, 2, len(queries), 4), *(normal(BATCH, 1, documents.keys, 4) for _ in range(2))
    expected = window_attention(q, k, v, window=12, documents=documents)
    torch.testing.assert_close(variable_length_attention(q, k, v, window=12, documents=documents), expected)


@pytest.mark.parametrize("keys_before", [0, 7])
def test_nothing_is_read_from_the_device(keys_before):
    """Which would wait for it. A meta tensor has no values to read."""
    there = Documents(DOCUMENTS.starts, first=0, device=torch.device("meta"))
    queries = range(keys_before, LENGTH)
    here, lengths = (d.attention(queries, keys_before=keys_before).variable_lengths for d in (DOCUMENTS, there))
    assert (lengths.max_seqlen_q, lengths.max_seqlen_k) == (here.max_seqlen_q, here.max_seqlen_k)
    assert lengths.cu_seqlens_k.shape == here.cu_seqlens_k.shape
    made = (lengths.cu_seqlens_q, there.positions, there.resets, there.resets_from(2))
    assert {tensor.device.type for tensor in made} == {"meta"}


CONFIG = ModelConfig(
    pattern="M-*-M", hidden_size=16, num_query_heads=4, num_kv_heads=2, mlp_size=24, window=6, vocab_size=32
)


def model(kernels=TORCH_KERNELS):
    made = Samba(CONFIG, kernels=kernels, dtype=torch.float64).double()
    initialize_parameters(made, seed=3)
    return made


def logits_and_gradients(*, packed, kernels=TORCH_KERNELS):
    """Logits [batch, sequence, vocabulary], and the gradient of every parameter, of a sum over all documents."""
    made, tokens = model(kernels), torch.randint(0, 32, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    weights = torch.randn(BATCH, LENGTH, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    logits = torch.empty(BATCH, LENGTH, 32, dtype=torch.float64)
    if packed:
        logits = made(tokens, document_starts=DOCUMENTS.starts)
    else:
        for row, span in spans():
            logits[row, span] = made(tokens[row : row + 1, span])[0]
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in made.named_parameters()}


def largest_differences(packed, alone):
    """Largest differences of logits, and of gradients over their norms."""
    (logits, gradients), (expected, expected_gradients) = packed, alone
    relative = [(gradients[name] - g).norm() / g.norm() for name, g in expected_gradients.items()]
    return (logits - expected).abs().max().item(), max(relative).item()


def test_a_packed_sequence_has_the_logits_and_gradients_of_its_documents_alone():
    logits, gradients = largest_differences(logits_and_gradients(packed=True), logits_and_gradients(packed=False))
    assert logits < 1e-6  # rotary tables are fp32
    assert gradients < 1e-6


def test_without_documents_the_sequence_is_one():
    tokens = torch.randint(0, 32, (1, LENGTH))
    one = torch.zeros(1, LENGTH, dtype=torch.int64)
    torch.testing.assert_close(model()(tokens, document_starts=one), model()(tokens))


MISTAKES = {
    "scan": lambda *args, resets, **more: gated_selective_scan(*args, **more),
    "conv": lambda *args, resets: causal_conv_silu(*args),
    "attention": lambda *args, window, documents: window_attention(*args, window=window),
}


@pytest.mark.parametrize("place", MISTAKES)
def test_documents_dropped_at_one_place_are_seen(place):
    kernels = replace(TORCH_KERNELS, **{place: MISTAKES[place]})
    alone, packed = logits_and_gradients(packed=False), logits_and_gradients(packed=True, kernels=kernels)
    logits, gradients = largest_differences(packed, alone)
    assert logits > 1e-4
    assert gradients > 1e-2


def test_positions_are_counted_from_a_documents_start_on_every_part():
    whole = Documents(starts_of(ROWS), first=0, device=CPU).positions
    assert whole[0].tolist() == [i for n in ROWS[0] for i in range(n)]
    part = Documents(starts_of(ROWS)[:, 20:], first=20, device=CPU)
    assert torch.equal(part.positions, whole[:, 20:])
    assert torch.equal(part.resets_from(0), part.resets)
    assert part.resets_from(3)[:, 3:].equal(part.resets)


def test_a_kernel_that_cannot_reset_is_refused_in_a_sentence():
    packed = KernelRequirements("cuda", "bf16", resets=True)
    assert "data.reset_at_document" in why_unavailable("scan", "mamba-ssm", packed)
    assert "data.reset_at_document" not in (why_unavailable("scan", "mamba-ssm", replace(packed, resets=False)) or "")
