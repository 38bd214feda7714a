"""Full attention, attention without positions and the second MLP in the Hugging Face format, and streams of them."""

import json

import pytest
import torch

from sambalm.model.hf import HFError, Stream
from sambalm.model.hf.folder_code import folder_code
from sambalm.model.hf.modeling_samba import new_cache
from sambalm.model.hf.names import hf_config
from sambalm.model.hf.verify import verify_export
from tests.hf.test_modeling import difference_in_padded_turns, largest_difference
from tests.support.hf import RandomState, hf_model, random_tokens, tiny_config
from tests.support.hf_mixers import (
    assert_a_folder_comes_back,
    assert_documents_are_as_if_alone,
    assert_pieces_and_padding_change_nothing,
)
from tests.support.remote_code import same_by_remote_code

MODELS = {
    "full": {"pattern": "F-F"},
    "mixed": {"pattern": "=-MF*-", "mixers": {"mlp2": {"size": 20}}},
    "no positions": {"pattern": "MF-", "rope_base": None},
}


def model_of(name: str, **changes):
    config = tiny_config(**MODELS[name], tie_embeddings=False, **changes)
    return hf_model(config, RandomState(config))


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", MODELS)
def test_pieces_padding_and_documents_give_the_logits_of_the_whole(name):
    model, tokens = model_of(name).double(), random_tokens(2, 30)
    whole = model(tokens, use_cache=False).logits
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert largest_difference(model(tokens, use_cache=False).logits, whole) < 1e-12
        assert_pieces_and_padding_change_nothing(model, tokens, pieces=[7, 1, 1, 21], static=True)
        assert_documents_are_as_if_alone(model, tokens)
    assert difference_in_padded_turns(model_of(name, window=64)) < 1e-5


def test_padding_that_left_the_window_is_still_masked_in_full_attention():
    model, row = model_of("mixed"), random_tokens(1, 30)
    mask = torch.ones(1, 45, dtype=torch.long)
    mask[:, :15] = 0
    padded_row = torch.cat((torch.zeros(1, 15, dtype=torch.long), row), dim=1)
    cache = new_cache(model.config)
    model(padded_row[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
    last = model(padded_row[:, 40:], attention_mask=mask, past_key_values=cache).logits
    assert largest_difference(last, model(row).logits[:, 25:]) < 1e-5


def test_one_mask_of_keys_for_layers_that_see_different_keys_is_refused():
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        model_of("mixed")(random_tokens(1, 6), attention_mask=torch.eye(6).bool()[None, None])


@pytest.mark.parametrize("name", MODELS)
def test_streams_generate_are_saved_joined_and_copied(name, tmp_path):
    model, more = model_of(name), random_tokens(1, 25, seed=4)
    prompts = [random_tokens(1, length, seed=length) for length in (3, 19)]
    streams = []
    for prompt in prompts:
        stream = Stream(model)
        stream.read(prompt)
        stream.save(tmp_path / "state")
        streams.append(Stream.load(model, tmp_path / "state"))
    both = Stream.join(streams)
    logits = [both.step(ids) for ids in more.expand(2, -1).unbind(1)]
    first, second = both.fork([0]), both.fork([1])
    assert (first.seen_tokens, second.seen_tokens) == ([28], [44])
    for i, prompt in enumerate(prompts):
        alone = model(torch.cat((prompt, more, more), dim=1)).logits[0]
        start = prompt.shape[1]
        assert largest_difference(torch.stack([each[i] for each in logits]), alone[start : start + 25]) < 1e-5
        assert largest_difference((first, second)[i].read(more)[0], alone[-1]) < 1e-5
    keys = [tensor.shape[2] for name, tensor in second._tensors().items() if name.endswith("keys")]
    assert max(keys) == 44 + 25, "the state of full attention grows with the text"
    prompt = prompts[1]
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 19:]
    stream, found = Stream(model), []
    stream.read(prompt)
    for _ in range(12):
        found.append(stream.logits.argmax(-1))
        stream.step(found[-1])
    assert torch.equal(torch.cat(found), expected)


def test_a_window_stream_without_other_rows_keys_goes_on_as_alone():
    config = tiny_config("M-*-", window=64)
    model, more = hf_model(config, RandomState(config)), random_tokens(1, 4, seed=3)
    short, long = Stream(model), Stream(model)
    short.read(random_tokens(1, 3))
    long.read(random_tokens(1, 20))
    copy = Stream.join([short, long]).fork([0])
    assert largest_difference(copy.read(more), short.read(more)) < 1e-5


@pytest.fixture(scope="module")
def folder(export):
    config = tiny_config(**MODELS["mixed"], vocab_size=1200, rope_base=None, dt_rank=3)
    return *export(config), config


def test_a_folder_is_written_read_and_comes_back(folder, tmp_path):
    path, _, config = folder
    keys = json.loads((path / "config.json").read_text())
    assert keys["layer_types"] == ["moe", "linear_attention", "full_attention", "sliding_attention"]
    assert keys["extensions"]["F"]["layer_type"] == "full_attention"
    assert keys["extensions"]["="]["sizes"] == {"size": 20}
    assert keys["attn"]["rope_theta"] is None
    card = (path / "README.md").read_text()
    for line in (
        "- `F`: full causal attention: 4 query heads, 2 key/value heads, no positions",
        "- `=`: SwiGLU MLP of width 20, in the place of a mixer",
    ):
        assert line in card
    assert_a_folder_comes_back(path, config, tmp_path / "run")


def test_what_flash_linear_attention_lacks_is_said():
    assert (
        hf_config(tiny_config("M-*-", rope_base=None)).fla_obstacle == "It has no attention without rotary positions."
    )
    assert "no layer like F (full_attention)" in hf_config(tiny_config("F-")).fla_obstacle


def test_the_verification_finds_a_window_in_full_attention(folder, documents, sentencepiece_model, monkeypatch):
    from sambalm.model.mixers.attention.hf import SambaFullAttention

    path, state, config = folder
    verify_export(path, state, config, documents[:3], sentencepiece_model)
    monkeypatch.setattr(SambaFullAttention, "is_full", False)
    with pytest.raises(HFError, match="logits of the exported model differ"):
        verify_export(path, state, config, documents[:3], sentencepiece_model)


@pytest.mark.slow
def test_remote_code_needs_no_package_of_ours(folder, tmp_path):
    same_by_remote_code(folder[0], tmp_path)
    assert {file.name for file in (tmp_path / "copy").glob("*.py")} == set(folder_code("=-MF*-"))
