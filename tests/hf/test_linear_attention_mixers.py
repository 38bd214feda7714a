"""Gated linear attention and retention in the Hugging Face format: in pieces, with padding, exported, generated."""

import json

import pytest
import torch

from sambalm.model.hf import Stream, load_for_generation
from sambalm.model.hf.export import export_hf
from sambalm.model.hf.generate import load_config
from sambalm.model.hf.modeling_samba import SambaForCausalLM, new_cache
from sambalm.model.hf.names import hf_config, model_config
from sambalm.pretrain.checkpointing.from_hf import checkpoint_from_hf
from tests.hf.test_modeling import difference_in_padded_turns, largest_difference, padded
from tests.support.hf import RandomState, hf_model, random_tokens, tiny_config, training_model
from tests.support.remote_code import outputs_by_remote_code

SIZES = {"gla": {"num_heads": 3, "head_dim": 6}, "retnet": {"num_heads": 2, "head_dim": 8, "expand_v": 1}}
PATTERNS = ["A-R-", "R*", "A", "R"]


def config_of(pattern: str, **changes):
    names = {"A": "gla", "R": "retnet"}
    mixers = {name: SIZES[name] for letter, name in names.items() if letter in pattern}
    return tiny_config(pattern, mixers=mixers, **changes)


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_are_the_training_models_at_once_in_pieces_with_padding_and_in_documents(pattern):
    config = config_of(pattern)
    state = RandomState(config)
    model, tokens = hf_model(config, state).double(), random_tokens(2, 90)
    whole = model(tokens, use_cache=False).logits
    assert largest_difference(whole, training_model(config, state)(tokens)) < 5e-5
    cache = new_cache(model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in tokens.split([7, 1, 1, 81], dim=1)]
    assert largest_difference(torch.cat(pieces, dim=1), whole) < 1e-12
    for side in ("left", "right"):
        together, mask = padded([tokens[0], tokens[1, :9]], length=90, side=side)
        logits = model(together, attention_mask=mask).logits
        assert largest_difference(logits[1][mask[1].bool()], whole[1, :9]) < 1e-12
    positions = torch.cat((torch.arange(11), torch.arange(79)))[None]
    packed = model(tokens, position_ids=positions).logits
    assert largest_difference(packed[:, 11:], model(tokens[:, 11:], use_cache=False).logits) < 1e-12
    assert difference_in_padded_turns(hf_model(config_of(pattern, window=64), state)) < 1e-5


def test_a_mixture_is_seen_in_pieces_that_begin_without_their_state():
    model, tokens = hf_model(config_of("AR"), RandomState(config_of("AR"))), random_tokens(1, 30)
    whole, second = model(tokens).logits, model(tokens[:, 15:]).logits
    assert largest_difference(whole[:, 15:], second) > 0.1


def test_a_model_made_of_the_configuration_alone_has_initial_weights():
    gla, retnet = SambaForCausalLM(hf_config(config_of("AR"))).backbone.layers
    assert not gla.mixer.decay_bias.any()
    for layer in (gla, retnet):
        assert torch.equal(layer.mixer.o_norm, torch.ones_like(layer.mixer.o_norm))


def test_a_stream_generates_and_is_saved(tmp_path):
    model, prompt = hf_model(config_of("A-R*"), RandomState(config_of("A-R*"))), random_tokens(1, 19)
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 19:]
    for token in expected[:3]:  # which the model finds without its cache, too
        logits = model(prompt, use_cache=False).logits[0, -1]
        assert logits.argmax() == token
        prompt = torch.cat((prompt, token.view(1, 1)), dim=1)
    stream, found = Stream(model), []
    stream.read(prompt)
    stream.save(tmp_path / "state")
    stream = Stream.load(model, tmp_path / "state")
    for _ in range(9):
        found.append(stream.logits.argmax(-1))
        stream.step(found[-1])
    assert torch.equal(torch.cat(found), expected[3:])


@pytest.fixture(scope="module")
def folder(sentencepiece_model, documents, tmp_path_factory):
    config = config_of("A-R*", vocab_size=1200, dt_rank=3)
    state = RandomState(config)
    output = tmp_path_factory.mktemp("export") / "model"
    output.mkdir()
    export_hf(state, config, folder=output, tokenizer_model=sentencepiece_model, documents=documents[:3])
    return output, config


def test_a_folder_is_written_read_and_comes_back(folder, tmp_path):
    path, config = folder
    keys = json.loads((path / "config.json").read_text())
    assert keys["layer_types"] == ["linear_attention", "linear_attention", "sliding_attention"]
    assert keys["extensions"]["R"]["sizes"] == {"num_heads": 2, "head_dim": 8, "expand_v": 1, "rope_base": 10_000.0}
    card = (path / "README.md").read_text()
    assert "- `A`: gated linear attention: 3 heads, keys of 6 and values of 12 channels" in card
    converted = checkpoint_from_hf(
        path, tmp_path / "run", query_heads=None, window=None, progress=lambda done, total: None
    )
    assert converted == model_config(load_config(path))
    assert [converted.sizes_of(one) for one in converted.kinds if one.sizes] == [
        config.sizes_of(one) for one in config.kinds if one.sizes
    ]


@pytest.mark.slow
def test_remote_code_needs_no_package_of_ours(folder, tmp_path):
    path, _ = folder
    tokens = torch.randint(3, 1200, (2, 30), generator=torch.Generator().manual_seed(0))
    given = outputs_by_remote_code(path, tokens, tmp_path)
    model, _ = load_for_generation(path)
    assert torch.equal(given["logits"], model(tokens).logits)
    fp32 = {name.removeprefix("fp32 ") for name in given if name.startswith("fp32")}
    assert "backbone.layers.0.mixer.decay_bias" in fp32
