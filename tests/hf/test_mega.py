"""Mega-S6 in the Hugging Face format: converted, verified, continued from a cache and loaded alone."""

import json

import pytest
import torch

from sambalm.model.hf import HFError, Stream
from sambalm.model.hf.modeling_samba import SambaForCausalLM
from sambalm.model.hf.names import hf_config
from sambalm.model.hf.verify import verify_export
from sambalm.model.mixers.mega.hf import SambaMega
from tests.hf import test_packing as packing
from tests.hf.test_modeling import difference_in_padded_turns, largest_difference
from tests.support.hf import DrawnState, RandomState, hf_model, random_tokens, tiny_config
from tests.support.hf_mixers import (
    assert_a_folder_comes_back,
    assert_a_folder_holds,
    assert_a_stream_generates_and_is_saved,
    assert_generates_the_same_without_a_cache,
    assert_logits_are_the_training_models,
)
from tests.support.remote_code import same_by_remote_code

SIZES = {"mega": {"key_dim": 8, "chunk_tokens": 6, "d_state": 3}}
PATTERNS = ["ZM*-Z-", "Z"]


def config_of(pattern: str, **changes):
    return tiny_config(pattern, mixers=SIZES, **changes)


def model_of(pattern: str, **changes):
    return hf_model(config_of(pattern, **changes), RandomState(config_of(pattern)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_are_the_training_models_at_once_in_pieces_and_with_padding(pattern):
    assert_logits_are_the_training_models(
        config_of(pattern), length=30, pieces=[7, 1, 1, 2, 19], tolerance=1e-4, static="*" in pattern
    )
    assert difference_in_padded_turns(model_of(pattern, window=64)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_documents_are_as_if_alone(pattern):
    model = model_of(pattern).double()
    row = torch.cat(packing.documents())[None]
    packed = model(row, position_ids=packing.positions()[None])
    assert largest_difference(packed.logits[0], packing.alone(model)) < 1e-12
    assert largest_difference(model(row).logits[0], packed.logits[0]) > 1e-3


def test_generation_with_a_cache_is_that_without(tmp_path):
    assert_generates_the_same_without_a_cache(model_of("Z*-Z"))
    assert_a_stream_generates_and_is_saved(model_of("Z-"), tmp_path / "state")


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_of_different_lengths_go_on_together_as_alone(pattern):
    """Their tokens have different places in their chunks."""
    model, streams = model_of(pattern).double(), []
    for seed, length in enumerate((9, 3, 14)):
        streams.append(Stream(model))
        streams[-1].read(random_tokens(1, length, seed=seed))
    together = Stream.join(streams)
    for tokens in random_tokens(11, 3):
        together.step(tokens)
        for row, (stream, token) in enumerate(zip(streams, tokens, strict=True)):
            assert largest_difference(together.logits[row], stream.step(token[None])[0]) < 1e-12


def test_a_model_made_of_the_configuration_alone_has_initial_weights():
    """As a new run's: of one tensor the same range and spread."""
    config = tiny_config("Z-", hidden_size=128, mixers={"mega": {"key_dim": 64}})
    state = DrawnState(config, seed=0)
    torch.manual_seed(0)
    found = dict(SambaForCausalLM(hf_config(config)).named_parameters())
    expected = dict(hf_model(config, state).named_parameters())
    for name in (name for name in expected if ".mixer." in name):
        ours, theirs = found[name].detach(), expected[name].detach()
        assert torch.isclose(ours.double().std(), theirs.double().std(), rtol=0.3), name
        assert torch.isclose(ours.double().mean(), theirs.double().mean(), atol=0.7 * float(theirs.std()) + 1e-9), name


@pytest.fixture(scope="module")
def folder(export):
    """(folder, state, config) of an export, which compares logits in pieces too."""
    config = config_of("MZ*-", vocab_size=1200, dt_rank=3)
    return *export(config), config


def test_the_folder_gives_the_model_back(folder, tmp_path):
    path, state, config = folder
    keys = json.loads((path / "config.json").read_text())
    assert keys["extensions"]["Z"]["layer_type"] == "linear_attention"
    assert_a_folder_comes_back(path, config, tmp_path / "run")
    assert_a_folder_holds(path, state)
    assert "- `Z`: Mega-S6: queries and keys of 8 channels in chunks of 6 tokens" in (path / "README.md").read_text()


def forget_the_state(patch):
    patch.setattr("sambalm.model.mixers.mega.hf.carried_states", lambda cache, layer_idx: (None, None))


def lose_the_keys_of_the_chunk(patch):
    before = SambaMega._before

    def without(self, context, *, like):
        found = before(self, context, like=like)
        return found._replace(keys_and_values=found.keys_and_values * 0)

    patch.setattr(SambaMega, "_before", without)


@pytest.mark.parametrize("mistake", [forget_the_state, lose_the_keys_of_the_chunk])
def test_the_verification_finds_a_layer_that_forgets(mistake, folder, documents, sentencepiece_model, monkeypatch):
    path, state, config = folder
    verify_export(path, state, config, documents[:3], sentencepiece_model)
    mistake(monkeypatch)
    with pytest.raises(HFError, match="logits of the exported model differ"):
        verify_export(path, state, config, documents[:3], sentencepiece_model)


@pytest.mark.long
def test_remote_code_needs_no_package_of_ours(folder, tmp_path):
    same_by_remote_code(folder[0], tmp_path)
