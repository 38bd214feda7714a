"""A step of one token a row by the GPU's kernels, which Triton's interpreter runs on the CPU here."""

import pytest
import torch

from sambalm.model.hf import Stream
from tests.hf.test_modeling import model_of
from tests.support.hf import random_tokens

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_decoding.py runs them on a GPU")

SIZES = {
    "small": {},
    "odd": {"hidden_size": 48, "num_query_heads": 3, "num_kv_heads": 1, "mlp_size": 1040, "window": 20},
    "split": {"hidden_size": 320, "num_query_heads": 10, "num_kv_heads": 5, "mlp_size": 300, "d_state": 8},
}


def stream_of(model, *, rows: int = 1) -> Stream:
    """A stream that steps by the decoder, as it would on a GPU."""
    stream = Stream(model, rows=rows)
    stream._may_decode = True
    return stream


def close(given: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(given, expected, atol=2e-4, rtol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        ("M", "small"),
        ("M-*-", "small"),
        pytest.param("M-*-", "odd", marks=pytest.mark.slow),
        pytest.param("M-*-M*", "split", marks=pytest.mark.long),
    ],
)
def test_steps_are_those_of_the_layers(pattern, sizes):
    model = model_of(pattern, tie_embeddings=False, **SIZES[sizes])
    full = model.config.sliding_window
    tokens = random_tokens(3, full + 6)
    expected = model(tokens).logits
    stream = stream_of(model, rows=3)
    stream.read(tokens[:, : full - 2])
    for place in range(full - 2, full + 2):
        close(stream.step(tokens[:, place]), expected[:, place])
    assert stream._decoder is not None
    assert stream.seen_tokens == [full + 2] * 3
    # By the layers again, which go on from the decoder's state.
    close(stream.read(tokens[:, full + 2 :]), expected[:, -1])
    assert stream._decoder is None


@torch.no_grad()
def test_a_window_of_one_token_and_the_first_token():
    model, tokens = model_of("*-*-", window=1), random_tokens(2, 3)
    expected, stream = model(tokens).logits, stream_of(model, rows=2)
    for place in range(3):
        close(stream.step(tokens[:, place]), expected[:, place])


@torch.no_grad()
def test_states_leave_the_decoder_and_come_back(tmp_path):
    model, tokens = model_of(), random_tokens(1, 20)
    expected = model(tokens).logits[0]
    streams = [stream_of(model), stream_of(model)]
    for stream, length in zip(streams, (3, 11), strict=True):
        stream.read(tokens[:, :length])
        stream.step(tokens[:, length])
    streams[1].save(tmp_path / "state")
    joined = Stream.join([streams[0], Stream.load(model, tmp_path / "state"), streams[1].fork([0])])
    for step in range(3):
        logits = joined.step(torch.stack([tokens[0, 4 + step], tokens[0, 12 + step], tokens[0, 12 + step]]))
        close(logits, expected[[4 + step, 12 + step, 12 + step]])
    assert joined._decoder is not None
    for stream, place in zip(streams, (4, 12), strict=True):  # which the copies have not changed
        close(stream.step(tokens[:, place])[0], expected[place])


@pytest.mark.slow
@torch.no_grad()
def test_streams_of_one_origin_take_turns_with_one_decoder():
    model, tokens = model_of(), random_tokens(1, 8)
    expected = model(tokens).logits[0]
    one = stream_of(model)
    one.read(tokens[:, :3])
    other = one.fork()
    for place in range(3, 5):
        for stream in (one, other):
            close(stream.step(tokens[:, place])[0], expected[place])
    assert one._decoder is None, "the other one took it"
    assert one._decoders is other._decoders


def test_a_model_that_is_not_as_it_was_made_is_stepped_by_its_layers():
    model, tokens = model_of("M-"), random_tokens(1, 6)
    expected = model(tokens).logits
    model.backbone.layers[0].mixer.in_proj.register_forward_hook(lambda *_: None)
    stream = stream_of(model)
    stream.read(tokens[:, :5])
    close(stream.step(tokens[:, 5]), expected[:, 5].detach())
    assert stream._decoder is None
