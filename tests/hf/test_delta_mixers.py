"""Gated DeltaNet and Kimi Delta Attention in the Hugging Face format: in pieces, with padding, exported, generated."""

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

SIZES = {"gated_deltanet": {"num_heads": 3, "head_dim": 6}, "kimi_delta": {"num_heads": 2, "head_dim": 5, "d_conv": 3}}
PATTERNS = ["G-K-", "K*", "G"]


def config_of(pattern: str, **changes):
    names = {"G": "gated_deltanet", "K": "kimi_delta"}
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
    model, tokens = model_of("GK"), random_tokens(1, 30)
    whole, second = model(tokens).logits, model(tokens[:, 15:]).logits
    assert largest_difference(whole[:, 15:], second) > 0.1


def test_a_model_made_of_the_configuration_alone_has_initial_weights():
    model = SambaForCausalLM(hf_config(config_of("GK")))
    for number, rates in ((0, (1e-4, 16)), (1, (1, 16))):
        mixer = model.backbone.layers[number].mixer
        assert rates[0] * 0.99 <= mixer.A_log.exp().min() <= mixer.A_log.exp().max() <= rates[1] * 1.01
        steps = torch.nn.functional.softplus(mixer.dt_bias)
        assert 1e-3 * 0.99 < steps.min() <= steps.max() < 0.1 * 1.01
        assert 0.3 < mixer.k_conv.abs().max() < mixer.k_conv.shape[1] ** -0.5
        assert torch.equal(mixer.o_norm, torch.ones_like(mixer.o_norm))


def test_a_stream_generates_and_is_saved(tmp_path):
    assert_a_stream_generates_and_is_saved(model_of("G-K*"), tmp_path / "state")


@pytest.fixture(scope="module")
def folder(export):
    config = config_of("G-K*", vocab_size=1200, dt_rank=3)
    return export(config)[0], config


def test_a_folder_is_written_read_and_comes_back(folder, tmp_path):
    path, config = folder
    keys = json.loads((path / "config.json").read_text())
    assert keys["layer_types"] == ["linear_attention", "linear_attention", "sliding_attention"]
    assert keys["extensions"]["G"]["sizes"]["expand_v"] == 2
    card = (path / "README.md").read_text()
    assert "- `G`: Gated DeltaNet: 3 heads, keys of 6 and values of 12 channels, convolution over 4 tokens" in card
    assert_a_folder_comes_back(path, config, tmp_path / "run")


@pytest.mark.slow
def test_remote_code_needs_no_package_of_ours(folder, tmp_path):
    given = same_by_remote_code(folder[0], tmp_path)
    fp32 = {name.removeprefix("fp32 ") for name in given if name.startswith("fp32")}
    assert {"backbone.layers.1.mixer.A_log", "backbone.layers.1.mixer.dt_bias"} <= fp32
