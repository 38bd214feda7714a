"""generate() in its modes: what is cached, padded, static or searched gives what recomputing everything gives."""

import pytest
import torch

from sambalm.model.hf.modeling_samba import new_cache
from tests.hf.test_modeling import PATTERNS, padded
from tests.support.hf import RandomState, hf_model, random_tokens, tiny_config

GREEDY = {"max_new_tokens": 15, "do_sample": False}


def model_of(pattern: str):
    config = tiny_config(pattern, tie_embeddings=False)  # tied, a random model repeats its last token
    return hf_model(config, RandomState(config))


@pytest.mark.parametrize("length", [11, 3])  # more than a window's, and fewer, which fill no static cache
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_cache_changes_no_token(pattern, length):
    model = model_of(pattern)
    prompt = random_tokens(2, length)
    expected = model.generate(prompt, use_cache=False, **GREEDY)
    assert expected.shape == (2, length + 15)
    assert len(set(expected[0, length:].tolist())) > 1, "a constant continuation proves nothing"
    for mode in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        assert torch.equal(model.generate(prompt, **GREEDY, **mode), expected), mode


@pytest.mark.parametrize("pattern", ["M-*-M-*-", "M"])
def test_beam_search_and_sampling(pattern):
    model = model_of(pattern)
    prompt = random_tokens(2, 11)
    beams = {"num_beams": 4, **GREEDY}
    expected = model.generate(prompt, use_cache=False, **beams)
    assert torch.equal(model.generate(prompt, **beams), expected)
    assert not torch.equal(expected, model.generate(prompt, **GREEDY)), "beam search found nothing better anywhere"
    samples = []
    for use_cache in (False, True):
        torch.manual_seed(3)
        samples.append(model.generate(prompt, use_cache=use_cache, do_sample=True, max_new_tokens=15))
    assert torch.equal(*samples)


@pytest.mark.parametrize("mode", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_left_padding_changes_no_token(pattern, mode):
    model = model_of(pattern)
    rows = [random_tokens(1, length, seed=length)[0] for length in (12, 5)]
    tokens, mask = padded(rows, length=12, side="left")
    together = model.generate(tokens, attention_mask=mask, **GREEDY, **mode)
    for i, row in enumerate(rows):
        assert torch.equal(together[i, 12:], model.generate(row[None], **GREEDY)[0, len(row) :])


@pytest.mark.parametrize("pattern", ["M-*-", "M"])
def test_generation_continues_from_a_cache(pattern):
    model = model_of(pattern)
    prompt = random_tokens(1, 20)
    cache = new_cache(model.config)
    with torch.no_grad():
        model(prompt[:, :13], past_key_values=cache)
    assert torch.equal(model.generate(prompt, past_key_values=cache, **GREEDY), model.generate(prompt, **GREEDY))


def test_a_cache_has_two_names_and_no_third():
    """transformers 5.24 renamed the argument; one that goes unseen would leave out all that the cache holds."""
    model, prompt = model_of("M-*-"), random_tokens(1, 20)
    logits = []
    for name in ("past_key_values", "cache"):
        cache = new_cache(model.config)
        outputs = [model(piece, **{name: cache}) for piece in prompt.split([13, 7], dim=1)]
        logits.append(outputs[-1].logits)
        assert outputs[-1].past_key_values is cache
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], model(prompt[:, 13:]).logits)
    with pytest.raises(ValueError, match="give one of cache and past_key_values"):
        model(prompt, past_key_values=cache, cache=cache)
    for part in (model, model.backbone):
        with pytest.raises(ValueError, match="states is a cache, which this model knows as `cache`"):
            part(prompt, states=cache)


def test_a_cache_that_was_reset_is_as_new():
    """A model without attention has a cache that counts its tokens itself."""
    model = model_of("M-")
    prompt, cache = random_tokens(1, 20), new_cache(model.config)
    with torch.no_grad():
        model(random_tokens(1, 13, seed=1), past_key_values=cache)
        assert cache.get_seq_length() == 13
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(prompt, past_key_values=cache).logits, model(prompt).logits)
        assert cache.get_seq_length() == 20
