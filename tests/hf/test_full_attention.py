"""Full attention, attention without positions and the second MLP in the Hugging Face format, and streams of them."""

import json

import pytest
import torch
from transformers import StaticCache

from sambalm.model.hf import HFError, Stream, load_for_generation
from sambalm.model.hf.export import export_hf
from sambalm.model.hf.folder_code import folder_code
from sambalm.model.hf.generate import load_config
from sambalm.model.hf.modeling_samba import new_cache
from sambalm.model.hf.names import hf_config, model_config
from sambalm.model.hf.verify import verify_export
from sambalm.pretrain.checkpointing.from_hf import checkpoint_from_hf
from tests.hf.test_modeling import difference_in_padded_turns, largest_difference, padded
from tests.support.hf import RandomState, hf_model, random_tokens, tiny_config
from tests.support.remote_code import outputs_by_remote_code

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
    for cache in (new_cache(model.config), StaticCache(config=model.config, max_cache_len=30)):
        pieces = [model(piece, past_key_values=cache).logits for piece in tokens.split([7, 1, 1, 21], dim=1)]
        assert largest_difference(torch.cat(pieces, dim=1), whole) < 1e-12
    positions = torch.cat((torch.arange(11), torch.arange(19)))[None]
    alone = model(tokens[:, 11:], use_cache=False).logits
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        for side in ("left", "right"):
            together, mask = padded([tokens[0], tokens[1, :9]], length=30, side=side)
            logits = model(together, attention_mask=mask).logits
            assert largest_difference(logits[1][mask[1].bool()], whole[1, :9]) < 1e-12
        packed = model(tokens, position_ids=positions.expand(2, -1)).logits
        assert largest_difference(packed[:, 11:], alone) < 1e-12
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
def folder(sentencepiece_model, documents, tmp_path_factory):
    config = tiny_config(**MODELS["mixed"], vocab_size=1200, rope_base=None, dt_rank=3)
    state = RandomState(config)
    output = tmp_path_factory.mktemp("export") / "model"
    output.mkdir()
    export_hf(state, config, folder=output, tokenizer_model=sentencepiece_model, documents=documents[:3])
    return output, state, config


def test_a_folder_is_written_read_and_comes_back(folder, tmp_path):
    path, _, config = folder
    keys = json.loads((path / "config.json").read_text())
    assert keys["layer_types"] == ["moe", "linear_attention", "full_attention", "sliding_attention"]
    assert keys["extensions"]["F"]["layer_type"] == "full_attention"
    assert keys["extensions"]["="]["sizes"] == {"size": 20}
    assert keys["attn"]["rope_theta"] is None
    assert model_config(load_config(path)) == config
    card = (path / "README.md").read_text()
    for line in (
        "- `F`: full causal attention: 4 query heads, 2 key/value heads, no positions",
        "- `=`: SwiGLU MLP of width 20, in the place of a mixer",
    ):
        assert line in card
    converted = checkpoint_from_hf(
        path, tmp_path / "run", query_heads=None, window=None, progress=lambda done, total: None
    )
    assert converted == config


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
    path = folder[0]
    tokens = torch.randint(3, 1200, (2, 30), generator=torch.Generator().manual_seed(0))
    given = outputs_by_remote_code(path, tokens, tmp_path)
    model, _ = load_for_generation(path)
    assert torch.equal(given["logits"], model(tokens).logits)
    generated = model.generate(tokens[:, :9], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(given["generated"], generated)
    assert {file.name for file in (tmp_path / "copy").glob("*.py")} == set(folder_code("=-MF*-"))
