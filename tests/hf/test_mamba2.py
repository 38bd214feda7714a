"""Mamba-2 in the Hugging Face format: converted, verified, continued from a cache and loaded alone."""

import json

import pytest
import torch

from sambalm.model.hf import HFError
from sambalm.model.hf.modeling_samba import SambaForCausalLM
from sambalm.model.hf.names import hf_config
from sambalm.model.hf.verify import verify_export
from tests.hf import test_packing as packing
from tests.hf.test_modeling import difference_in_padded_turns, largest_difference
from tests.support.hf import RandomState, hf_model, tiny_config
from tests.support.hf_mixers import (
    assert_a_folder_comes_back,
    assert_a_folder_holds,
    assert_generates_the_same_without_a_cache,
    assert_logits_are_the_training_models,
)
from tests.support.remote_code import same_by_remote_code

SIZES = {"mamba2": {"d_state": 5, "head_dim": 4, "groups": 4}}
PATTERNS = ["SM*-S-", "S"]


def config_of(pattern: str, **changes):
    return tiny_config(pattern, mixers=SIZES, **changes)


def model_of(pattern: str, **changes):
    return hf_model(config_of(pattern, **changes), RandomState(config_of(pattern)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_are_the_training_models_at_once_in_pieces_and_with_padding(pattern):
    assert_logits_are_the_training_models(
        config_of(pattern), length=30, pieces=[7, 1, 1, 2, 19], tolerance=1e-5, static="*" in pattern
    )
    assert difference_in_padded_turns(model_of(pattern, window=64)) < 1e-5


@torch.no_grad()
def test_packed_documents_are_as_if_alone():
    model = model_of("SM*-S-").double()
    row = torch.cat(packing.documents())[None]
    packed = model(row, position_ids=packing.positions()[None])
    assert largest_difference(packed.logits[0], packing.alone(model)) < 1e-12
    assert largest_difference(model(row).logits[0], packed.logits[0]) > 1e-3


def test_generation_with_a_cache_is_that_without():
    assert_generates_the_same_without_a_cache(model_of("S*-S"))


def test_a_model_made_of_the_configuration_alone_has_initial_weights():
    weights = dict(SambaForCausalLM(hf_config(config_of("S-"))).named_parameters())
    mixer = {name.rpartition("mixer.")[2]: w.detach() for name, w in weights.items() if ".mixer." in name}
    assert 1 <= mixer["A_log"].exp().min() < mixer["A_log"].exp().max() <= 16
    step = torch.nn.functional.softplus(mixer["dt_bias"])
    assert 0.9e-3 < step.min() < step.max() < 0.11
    assert mixer["D"].eq(1).all()
    assert mixer["norm.weight"].eq(1).all()
    assert 0.4 < mixer["bc_conv1d.weight"].abs().max() <= 0.5


@pytest.fixture(scope="module")
def folder(export):
    """(folder, state, config) of an export, which compares logits in pieces too."""
    config = config_of("MS*-", vocab_size=1200, dt_rank=3)
    return *export(config), config


def test_the_folder_gives_the_model_back(folder, tmp_path):
    path, state, config = folder
    keys = json.loads((path / "config.json").read_text())
    assert keys["extensions"]["S"]["layer_type"] == "linear_attention"
    assert_a_folder_comes_back(path, config, tmp_path / "run")
    assert_a_folder_holds(path, state)
    assert "- `S`: Mamba-2: 5 states, heads of 4 channels in 4 groups" in (path / "README.md").read_text()


def forget_the_state(patch):
    patch.setattr("sambalm.model.mixers.mamba2.hf.carried_states", lambda cache, layer_idx: (None, None))


def test_the_verification_finds_a_layer_that_forgets(folder, documents, sentencepiece_model, monkeypatch):
    path, state, config = folder
    verify_export(path, state, config, documents[:3], sentencepiece_model)
    forget_the_state(monkeypatch)
    with pytest.raises(HFError, match="logits of the exported model differ"):
        verify_export(path, state, config, documents[:3], sentencepiece_model)


@pytest.mark.long
def test_remote_code_needs_no_package_of_ours(folder, tmp_path):
    same_by_remote_code(folder[0], tmp_path)
