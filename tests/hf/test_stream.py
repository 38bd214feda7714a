"""Streams: what they read and step equals generate(), their states can be saved, copied and joined, nothing grows."""

import pytest
import torch

from sambalm.model.hf import HFError, Stream
from sambalm.model.hf import stream as stream_file
from sambalm.model.hf.generate import model_of_state
from tests.hf.test_modeling import PATTERNS
from tests.support.hf import RandomState, hf_model, random_tokens, tiny_config


def model_of(pattern: str, *, seed: int = 0, **changes):
    config = tiny_config(pattern, tie_embeddings=False, **changes)
    return hf_model(config, RandomState(config, seed=seed))


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces of 5 tokens, so that short prompts take several."""
    monkeypatch.setattr(stream_file, "PIECE_TOKENS", 5)


def greedy(stream: Stream, tokens: int) -> torch.Tensor:
    """The likeliest tokens, int64 [B, tokens], each read by the stream."""
    found = []
    for _ in range(tokens):
        found.append(stream.logits.argmax(-1))
        stream.step(found[-1])
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_stream_continues_as_generate_does(pattern, short_pieces):
    model, prompt = model_of(pattern), random_tokens(2, 17)
    expected = model.generate(prompt, max_new_tokens=20, do_sample=False)[:, 17:]
    assert len(set(expected[0].tolist())) > 1, "a constant continuation proves nothing"
    stream, told = Stream(model, rows=2), []
    logits = stream.read(prompt, progress=lambda done, total: told.append((done, total)))
    torch.testing.assert_close(logits, model(prompt).logits[:, -1], atol=1e-5, rtol=1e-5)
    assert told == [(5, 17), (10, 17), (15, 17), (17, 17)]
    assert torch.equal(greedy(stream, 20), expected)
    assert stream.seen_tokens == [37, 37]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("logits_at_once", [3, 1000])
def test_scores_are_those_of_one_forward(pattern, logits_at_once, short_pieces, monkeypatch):
    """Over pieces and over calls, whatever part of a piece's logits is made at once."""
    model, ids = model_of(pattern), random_tokens(2, 23)
    monkeypatch.setattr(stream_file, "_LOGIT_BYTES", logits_at_once * 4 * 2 * model.config.vocab_size)
    logits = model(ids).logits
    ids[:, 5::4] = logits.argmax(-1)[:, 4:-1:4]  # some of the likeliest, which changes what follows
    logits = model(ids).logits
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    stream, told, at_once = Stream(model, rows=2), [], []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: at_once.append(inputs[0].shape[1]))
    first = stream.score(ids[:, :12], progress=lambda done, total: told.append((done, total)))
    parts = zip(first, stream.score(ids[:, 12:13]), stream.score(ids[:, 13:]), strict=True)
    scores, is_likeliest = (torch.cat(part, dim=1) for part in parts)
    assert scores[:, 0].isnan().all()
    assert torch.equal(is_likeliest[:, 1:], logits.argmax(-1)[:, :-1] == ids[:, 1:])
    assert is_likeliest.any()
    assert not is_likeliest[:, 0].any()
    torch.testing.assert_close(scores[:, 1:], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stream.logits, logits[:, -1], atol=1e-5, rtol=1e-5)
    assert told == [(5, 12), (10, 12), (12, 12)]
    assert stream.seen_tokens == [23, 23]
    assert max(at_once) == min(logits_at_once, 5)  # of each of the two rows


@pytest.mark.parametrize("pattern", [*PATTERNS, "M"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_with_the_same_bits(pattern, dtype, tmp_path):
    model = model_of(pattern).to(dtype)
    stream = Stream(model)
    stream.read(random_tokens(1, 11))
    stream.save(tmp_path / "state", {"known": torch.tensor([3, 4])})
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    loaded = Stream.load(model, tmp_path / "state")
    assert (loaded.seen_tokens, loaded.extras["known"].tolist()) == ([11], [3, 4])
    assert loaded._cache.get_seq_length() == 11  # for whoever goes on with transformers' generate()
    more = random_tokens(1, 3, seed=5)
    for one in (stream, loaded):
        one.read(more)
    assert torch.equal(loaded.logits, stream.logits)
    assert torch.equal(greedy(loaded, 12), greedy(stream, 12))
    assert torch.equal(loaded.logits, stream.logits)


def test_a_state_of_another_model_is_refused(tmp_path):
    state, model = tmp_path / "state", model_of("M-*-")
    stream = Stream(model)
    with pytest.raises(HFError, match=r"nothing to save in .*state: no token has been read"):
        stream.save(state)
    stream.read(random_tokens(1, 4))
    stream.save(state)
    for other in (model_of("M-*-", seed=1), model_of("M-"), model_of("M-*-").bfloat16()):
        with pytest.raises(HFError, match="state is of a model with other weights or another dtype"):
            Stream.load(other, state)
    (tmp_path / "text").write_text("no tensors")
    (tmp_path / "folder").mkdir()
    for name in ("text", "nothing", "folder"):
        with pytest.raises(HFError, match=f"the state .*{name} cannot be read"):
            Stream.load(model, tmp_path / name)
    with pytest.raises(HFError, match=r"cannot be written to .*nowhere"):
        stream.save(tmp_path / "nowhere" / "state")
    names = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(HFError, match=r"cannot be written to .*folder"):
        stream.save(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == names  # nothing half-written stays


def test_any_changed_weight_changes_the_fingerprint():
    model = model_of("M-*-")
    before = stream_file.fingerprint(model)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter *= 1.001
            assert stream_file.fingerprint(model) != before, name
            before = stream_file.fingerprint(model)
        with torch.no_grad():  # about a thousand places of each are read, and all of a small one
            parameter.view(-1)[5 * max(1, parameter.numel() // 1024)] += 1
            assert stream_file.fingerprint(model) != before, name
            before = stream_file.fingerprint(model)


@pytest.mark.parametrize("pattern", [*PATTERNS, "M"])
def test_forks_go_their_own_ways(pattern):
    model = model_of(pattern)
    stream = Stream(model)
    stream.read(random_tokens(1, 11))
    samples, before = stream.fork([0, 0, 0]), stream.logits.clone()
    samples.read(random_tokens(3, 6, seed=4))
    assert torch.equal(stream.logits, before)
    for row in range(3):
        alone = stream.fork()
        alone.read(random_tokens(3, 6, seed=4)[row : row + 1])
        torch.testing.assert_close(alone.logits[0], samples.logits[row], atol=1e-5, rtol=1e-5)
    assert samples.fork([2, 0]).seen_tokens == [17, 17]
    assert torch.equal(samples.fork([2, 0]).logits, samples.logits[[2, 0]])


@pytest.mark.parametrize("pattern", [*PATTERNS, "M"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_different_lengths_are_as_if_alone(pattern, attention):
    """Prompts shorter than the window, as long, and longer; each is stepped and read on until the window is full."""
    model = model_of(pattern)
    model.set_attn_implementation(attention)
    lengths = [2, 7, 8, 20]
    alone = [Stream(model) for _ in lengths]
    for stream, length in zip(alone, lengths, strict=True):
        stream.read(random_tokens(1, length, seed=length))
    together = Stream.join(alone)
    for number, count in enumerate((1, 1, 4, 1, 3, 1)):
        ids = random_tokens(4, count, seed=100 + number)
        logits = together.step(ids[:, 0]) if count == 1 else together.read(ids)
        for row, stream in enumerate(alone):
            torch.testing.assert_close(logits[row], stream.read(ids[row : row + 1])[0], atol=2e-5, rtol=2e-5)
    assert together.seen_tokens == [length + 11 for length in lengths]


def test_nothing_that_a_stream_keeps_grows():
    for window in (1, 8):
        stream = Stream(model_of("M-*-", window=window))
        stream.read(random_tokens(1, 30))
        shapes = {name: tensor.shape for name, tensor in stream._tensors().items()}
        for ids in random_tokens(1, 20)[0]:
            stream.step(ids[None])
        assert {name: tensor.shape for name, tensor in stream._tensors().items()} == shapes


def test_ids_of_a_wrong_shape_are_refused():
    for ids in (random_tokens(2, 3), random_tokens(1, 3)[0], random_tokens(1, 0)):
        with pytest.raises(ValueError, match=r"give \[1, at least 1\]"):
            Stream(model_of("M-")).read(ids)
    with pytest.raises(ValueError, match="only streams of one model"):
        Stream.join([Stream(model_of("M-"))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
def test_a_checkpoints_weights_make_the_model_of_the_folder(dtype, tie):
    config = tiny_config("M-*-", tie_embeddings=tie)
    state = RandomState(config)
    made, expected = model_of_state(state, config, dtype=dtype), hf_model(config, state)
    assert not made.training
    assert made.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name].to(tensor.dtype)), name
    assert {p.dtype for n, p in made.named_parameters() if "A_log" in n or n.endswith(".D")} == {torch.float32}
    tokens = random_tokens(1, 9)
    assert made(tokens).logits.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(made(tokens).logits, expected(tokens).logits)
    del state.tensors["final_norm.weight"]
    with pytest.raises(HFError, match=r"lack tensor final_norm\.weight"):
        model_of_state(state, config, dtype=dtype)
