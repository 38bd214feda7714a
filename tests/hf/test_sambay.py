"""SambaY in the Hugging Face format: what layers read of others is as in training, also with a cache and padding."""

import pytest
import torch

from sambalm.model.hf import HFError
from sambalm.model.hf.layers import SambaLayer
from sambalm.model.hf.verify import verify_export
from tests.hf import test_packing as packing
from tests.hf.test_modeling import largest_difference
from tests.support.hf import RandomState, hf_model, random_tokens, tiny_config
from tests.support.hf_mixers import (
    assert_a_folder_holds,
    assert_generates_the_same_without_a_cache,
    assert_logits_are_the_training_models,
)
from tests.support.remote_code import same_by_remote_code

SIZES = {"mamba2": {"d_state": 5, "head_dim": 4, "groups": 4}}
PATTERNS = ["S-*-SFU-X-", "SUSFUXU"]


def config_of(pattern: str, **changes):
    return tiny_config(pattern, mixers=SIZES, **changes)


def model_of(pattern: str):
    return hf_model(config_of(pattern), RandomState(config_of(pattern)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_are_the_training_models_at_once_in_pieces_and_with_padding(pattern):
    assert_logits_are_the_training_models(
        config_of(pattern), length=30, pieces=[7, 1, 1, 2, 19], tolerance=1e-5, static=True
    )


@torch.no_grad()
def test_other_attention_and_packed_documents_give_the_same():
    model = model_of(PATTERNS[0]).double()
    row = torch.cat(packing.documents())[None]
    packed = model(row, position_ids=packing.positions()[None])
    assert largest_difference(packed.logits[0], packing.alone(model)) < 1e-12
    whole = model(row).logits
    model.set_attn_implementation("eager")
    assert largest_difference(model(row).logits, whole) < 1e-10


def test_generation_with_a_cache_is_that_without():
    assert_generates_the_same_without_a_cache(model_of(PATTERNS[1]))


def test_checkpointed_gradients_are_those_of_a_plain_backward():
    """A layer that runs again reads what it read, and not what a later layer has written since."""
    model, tokens = model_of(PATTERNS[1]).double().train(), random_tokens(2, 12)
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.fixture(scope="module")
def folder(export):
    """(folder, state, config) of an export, which compares logits in pieces too."""
    config = config_of(PATTERNS[0], vocab_size=1200)
    return *export(config), config


def test_the_folder_gives_the_model_back(folder):
    path, state, _ = folder
    assert_a_folder_holds(path, state)
    card = (path / "README.md").read_text()
    assert "- `U`: gated memory unit over the scan's output" in card
    assert "- `X`: cross attention: 4 query heads" in card


def test_the_verification_finds_a_layer_that_reads_another_memory(folder, documents, sentencepiece_model, monkeypatch):
    path, state, config = folder
    memory = SambaLayer.memory

    def first(self, context):
        found = memory(self, context)
        return context.memories[0] if isinstance(found, torch.Tensor) else found

    monkeypatch.setattr(SambaLayer, "memory", first)
    with pytest.raises(HFError, match="logits of the exported model differ"):
        verify_export(path, state, config, documents[:3], sentencepiece_model)


@pytest.mark.long
def test_remote_code_needs_no_package_of_ours(folder, tmp_path):
    same_by_remote_code(folder[0], tmp_path)
