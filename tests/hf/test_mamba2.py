"""Mamba-2 in the Hugging Face format: converted, verified, continued from a cache and loaded alone."""

import json

import pytest
import torch
from transformers import StaticCache

from sambalm.model.hf import HFError
from sambalm.model.hf.export import export_hf
from sambalm.model.hf.folder import FolderState
from sambalm.model.hf.generate import load_config
from sambalm.model.hf.modeling_samba import SambaForCausalLM, new_cache
from sambalm.model.hf.names import hf_config, model_config
from sambalm.model.hf.verify import verify_export
from tests.hf import test_packing as packing
from tests.hf.test_modeling import difference_in_padded_turns, largest_difference, padded
from tests.support.hf import RandomState, hf_model, random_tokens, tiny_config, training_model
from tests.support.remote_code import same_by_remote_code

SIZES = {"mamba2": {"d_state": 5, "head_dim": 4, "groups": 4}}
PATTERNS = ["SM*-S-", "S"]


def config_of(pattern: str, **changes):
    return tiny_config(pattern, mixers=SIZES, **changes)


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_logits_are_the_training_models_at_once_in_pieces_and_with_padding(pattern):
    config = config_of(pattern)
    state = RandomState(config)
    model, tokens = hf_model(config, state).double(), random_tokens(2, 30)
    whole = model(tokens, use_cache=False).logits
    assert largest_difference(whole, training_model(config, state)(tokens)) < 1e-5
    caches = [new_cache(model.config)]
    if "*" in pattern:
        caches.append(StaticCache(config=model.config, max_cache_len=30))
    for cache in caches:
        pieces = [model(piece, past_key_values=cache).logits for piece in tokens.split([7, 1, 1, 2, 19], dim=1)]
        assert largest_difference(torch.cat(pieces, dim=1), whole) < 1e-12
    for side in ("left", "right"):
        together, mask = padded([tokens[0], tokens[1, :9]], length=30, side=side)
        logits = model(together, attention_mask=mask).logits
        assert largest_difference(logits[1][mask[1].bool()], whole[1, :9]) < 1e-12
    assert difference_in_padded_turns(hf_model(config_of(pattern, window=64), state)) < 1e-5


@torch.no_grad()
def test_packed_documents_are_as_if_alone():
    model = hf_model(config_of("SM*-S-"), RandomState(config_of("SM*-S-"))).double()
    row = torch.cat(packing.documents())[None]
    packed = model(row, position_ids=packing.positions()[None])
    assert largest_difference(packed.logits[0], packing.alone(model)) < 1e-12
    assert largest_difference(model(row).logits[0], packed.logits[0]) > 1e-3


@torch.no_grad()
def test_generation_with_a_cache_is_that_without():
    model = hf_model(config_of("S*-S"), RandomState(config_of("S*-S")))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    tokens = random_tokens(2, 9)
    assert torch.equal(model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options))


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
def folder(sentencepiece_model, documents, tmp_path_factory):
    """(folder, state, config) of an export, which compares logits in pieces too."""
    config = config_of("MS*-", vocab_size=1200, dt_rank=3)
    state = RandomState(config)
    output = tmp_path_factory.mktemp("export") / "model"
    output.mkdir()
    export_hf(state, config, folder=output, tokenizer_model=sentencepiece_model, documents=documents[:3])
    return output, state, config


def test_the_folder_gives_the_model_back(folder):
    path, state, config = folder
    keys = json.loads((path / "config.json").read_text())
    assert keys["extensions"]["S"]["layer_type"] == "linear_attention"
    back = model_config(load_config(path))
    assert back.model_copy(update={"mixers": {}}) == config.model_copy(update={"mixers": {}})
    assert [back.sizes_of(one) for one in back.kinds if one.sizes] == [
        config.sizes_of(one) for one in config.kinds if one.sizes
    ]
    again = FolderState(path, load_config(path))
    assert again.shapes() == state.shapes()
    assert all(torch.equal(again.read(name), state.read(name)) for name in state.shapes())
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
