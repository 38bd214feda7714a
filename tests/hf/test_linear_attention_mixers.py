"""Gated linear attention and retention in the Hugging Face format: in pieces, with padding, exported, generated."""

import json

import pytest
import torch

from sambalm.model.hf.modeling_samba import SambaForCausalLM
from sambalm.model.hf.names import hf_config
from tests.hf.test_modeling import difference_in_padded_turns, largest_difference
from tests.support.hf import RandomState, hf_model, random_tokens, tiny_config
from tests.support.hf_mixers import (
    assert_a_folder_comes_back,
    assert_a_stream_generates_and_is_saved,
    assert_documents_are_as_if_alone,
    assert_logits_are_the_training_models,
)
from tests.support.remote_code import same_by_remote_code

SIZES = {"gla": {"num_heads": 3, "head_dim": 6}, "retnet": {"num_heads": 2, "head_dim": 8, "expand_v": 1}}
PATTERNS = ["A-R-", "R*", "A", "R"]


def config_of(pattern: str, **changes):
    names = {"A": "gla", "R": "retnet"}
    mixers = {name: SIZES[name] for letter, name in names.items() if letter in pattern}
    return tiny_config(pattern, mixers=mixers, **changes)


def model_of(pattern: str, **changes):
    return hf_model(config_of(pattern, **changes), RandomState(config_of(pattern)))


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_are_the_training_models_at_once_in_pieces_with_padding_and_in_documents(pattern):
    assert_logits_are_the_training_models(config_of(pattern), length=90, pieces=[7, 1, 1, 81], tolerance=5e-5)
    assert_documents_are_as_if_alone(model_of(pattern).double(), random_tokens(2, 90))
    assert difference_in_padded_turns(model_of(pattern, window=64)) < 1e-5


def test_a_mixture_is_seen_in_pieces_that_begin_without_their_state():
    model, tokens = model_of("AR"), random_tokens(1, 30)
    whole, second = model(tokens).logits, model(tokens[:, 15:]).logits
    assert largest_difference(whole[:, 15:], second) > 0.1


def test_a_model_made_of_the_configuration_alone_has_initial_weights():
    gla, retnet = SambaForCausalLM(hf_config(config_of("AR"))).backbone.layers
    assert not gla.mixer.decay_bias.any()
    for layer in (gla, retnet):
        assert torch.equal(layer.mixer.o_norm, torch.ones_like(layer.mixer.o_norm))


def test_a_stream_generates_and_is_saved(tmp_path):
    assert_a_stream_generates_and_is_saved(model_of("A-R*"), tmp_path / "state")


@pytest.fixture(scope="module")
def folder(export):
    config = config_of("A-R*", vocab_size=1200, dt_rank=3)
    return export(config)[0], config


def test_a_folder_is_written_read_and_comes_back(folder, tmp_path):
    path, config = folder
    keys = json.loads((path / "config.json").read_text())
    assert keys["layer_types"] == ["linear_attention", "linear_attention", "sliding_attention"]
    assert keys["extensions"]["R"]["sizes"] == {"num_heads": 2, "head_dim": 8, "expand_v": 1, "rope_base": 10_000.0}
    card = (path / "README.md").read_text()
    assert "- `A`: gated linear attention: 3 heads, keys of 6 and values of 12 channels" in card
    assert_a_folder_comes_back(path, config, tmp_path / "run")


@pytest.mark.slow
def test_remote_code_needs_no_package_of_ours(folder, tmp_path):
    given = same_by_remote_code(folder[0], tmp_path)
    fp32 = {name.removeprefix("fp32 ") for name in given if name.startswith("fp32")}
    assert "backbone.layers.0.mixer.decay_bias" in fp32
