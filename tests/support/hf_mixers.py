"""What tests ask of every mixer in the Hugging Face format: logits in every form, generation, streams and folders."""

from pathlib import Path
from typing import Any

import torch
from transformers import Cache, StaticCache

from sambalm.model.config import ModelConfig
from sambalm.model.hf import Stream
from sambalm.model.hf.folder import FolderState
from sambalm.model.hf.generate import load_config
from sambalm.model.hf.modeling_samba import SambaForCausalLM, new_cache
from sambalm.model.hf.names import CanonicalState, model_config
from sambalm.pretrain.checkpointing.from_hf import checkpoint_from_hf
from tests.hf.test_modeling import largest_difference, padded
from tests.support.hf import RandomState, hf_model, random_tokens, training_model


@torch.no_grad()
def assert_logits_are_the_training_models(
    config: ModelConfig, *, length: int, pieces: list[int], tolerance: float, static: bool = False
) -> None:
    """Compares logits of random weights with the training model's, and their forms with each other.

    Args:
        pieces: lengths in which a sequence of `length` tokens is read as well.
        static: whether a cache of fixed length is to give the same.
    """
    state = RandomState(config)
    model, tokens = hf_model(config, state).double(), random_tokens(2, length)
    whole = model(tokens, use_cache=False).logits
    assert largest_difference(whole, training_model(config, state)(tokens)) < tolerance
    assert_pieces_and_padding_change_nothing(model, tokens, pieces=pieces, static=static)


@torch.no_grad()
def assert_pieces_and_padding_change_nothing(
    model: SambaForCausalLM, tokens: torch.Tensor, *, pieces: list[int], static: bool
) -> None:
    """Compares the logits of tokens [2, length] in fp64 with those in pieces, and with padding on either side."""
    whole, length = model(tokens, use_cache=False).logits, tokens.shape[1]
    caches: list[Cache] = [new_cache(model.config)]
    if static:
        caches.append(StaticCache(config=model.config, max_cache_len=length))
    for cache in caches:
        found = [model(piece, past_key_values=cache).logits for piece in tokens.split(pieces, dim=1)]
        assert largest_difference(torch.cat(found, dim=1), whole) < 1e-12
    for side in ("left", "right"):
        together, mask = padded([tokens[0], tokens[1, :9]], length=length, side=side)
        logits = model(together, attention_mask=mask).logits
        assert largest_difference(logits[1][mask[1].bool()], whole[1, :9]) < 1e-12


@torch.no_grad()
def assert_documents_are_as_if_alone(model: SambaForCausalLM, tokens: torch.Tensor, *, first: int = 11) -> None:
    """Compares a document of packed rows [2, length] in fp64 with itself alone; it begins after `first` tokens."""
    positions = torch.cat((torch.arange(first), torch.arange(tokens.shape[1] - first)))[None]
    packed = model(tokens, position_ids=positions.expand(len(tokens), -1)).logits
    assert largest_difference(packed[:, first:], model(tokens[:, first:], use_cache=False).logits) < 1e-12


@torch.no_grad()
def assert_generates_the_same_without_a_cache(model: SambaForCausalLM) -> None:
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    tokens = random_tokens(2, 9)
    assert torch.equal(model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options))


@torch.no_grad()
def assert_a_stream_generates_and_is_saved(model: SambaForCausalLM, folder: Path) -> None:
    """Compares a stream, saved and loaded after the prompt, with `generate`, and this with logits without a cache."""
    prompt = random_tokens(1, 19)
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 19:]
    for token in expected[:3]:
        assert model(prompt, use_cache=False).logits[0, -1].argmax() == token
        prompt = torch.cat((prompt, token.view(1, 1)), dim=1)
    stream, found = Stream(model), []
    stream.read(prompt)
    stream.save(folder)
    stream = Stream.load(model, folder)
    for _ in range(9):
        found.append(stream.logits.argmax(-1))
        stream.step(found[-1])
    assert torch.equal(torch.cat(found), expected[3:])


def assert_a_folder_comes_back(folder: Path, config: ModelConfig, run_dir: Path) -> None:
    """Compares a folder's configuration with the exported one, and converts it to a run's checkpoint."""
    back = model_config(load_config(folder))
    assert back.model_copy(update={"mixers": {}}) == config.model_copy(update={"mixers": {}})
    kinds = [one for one in config.kinds if one.sizes]
    assert [back.sizes_of(one) for one in kinds] == [config.sizes_of(one) for one in kinds]
    options: dict[str, Any] = {"query_heads": None, "window": None}
    assert checkpoint_from_hf(folder, run_dir, progress=lambda done, total: None, **options) == back


def assert_a_folder_holds(folder: Path, state: CanonicalState) -> None:
    """Compares the tensors of a folder with those that were exported, bit by bit."""
    again = FolderState(folder, load_config(folder))
    assert again.shapes() == state.shapes()
    assert all(torch.equal(again.read(name), state.read(name)) for name in state.shapes())
