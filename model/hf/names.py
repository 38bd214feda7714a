"""The two-way mapping between canonical tensors (as checkpoints name them) and those of a Hugging Face folder.

One table serves both directions. A Hugging Face tensor is one or more canonical tensors, concatenated along their first
dimension.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from sambalm.model.config import ModelConfig
from sambalm.model.mixers.base import HFSide, HFTensor
from sambalm.model.registry import MixerError, mixer

from .configuration_samba import LAYER_TYPES, SambaConfig, pattern_blocks
from .errors import HFError


class CanonicalState(Protocol):
    """A model's weights, read one canonical tensor at a time."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every canonical tensor."""

    def read(self, name: str) -> Tensor:
        """One whole tensor, fp32; of what is stored on the CPU."""


def hf_shape(tensor: HFTensor, canonical_shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the shape of a tensor in the folder, from those of the canonical tensors that it is made of."""
    shapes = [tuple(canonical_shapes[part]) for part in tensor.parts]
    rows = sum(shape[0] for shape in shapes)
    return (rows, *((1,) if tensor.is_conv else ()), *shapes[0][1:])


def hf_dtype(tensor: HFTensor, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a tensor in a folder of a dtype."""
    return torch.float32 if tensor.is_fp32 else dtype


def hf_tensors(pattern: str, *, tie_embeddings: bool) -> dict[str, HFTensor]:
    """Returns name and making of every tensor of the Hugging Face model, in the model's order."""
    tensors = {"backbone.embeddings.weight": HFTensor(("embedding.weight",))}
    mlps = "".join(letter for letter in sorted(set(pattern)) if hf_side(letter).is_mlp)
    for i, block in enumerate(pattern_blocks(pattern, mlps=mlps)):
        for slot, sublayer in (("mixer", block.mixer_sublayer), ("mlp", block.mlp_sublayer)):
            if sublayer is None:
                continue
            tensors[f"backbone.layers.{i}.{slot}_norm.weight"] = HFTensor((f"layers.{sublayer}.norm.weight",))
            for name, tensor in hf_side(pattern[sublayer]).tensors.items():
                parts = tuple(f"layers.{sublayer}.mixer.{part}" for part in tensor.parts)
                tensors[f"backbone.layers.{i}.{slot}.{name}"] = replace(tensor, parts=parts)
    tensors["backbone.norm_f.weight"] = HFTensor(("final_norm.weight",))
    if not tie_embeddings:
        tensors["lm_head.weight"] = HFTensor(("head.weight",))
    return tensors


def hf_side(letter: str) -> HFSide:
    """Returns what a mixer is in the Hugging Face format.

    Raises:
        HFError: no mixer has the letter, or it has no such side.
    """
    try:
        one = mixer(letter)
    except MixerError as error:
        raise HFError(f"{error}; install the package that brings it") from None
    if one.hf is None:
        raise HFError(
            f"the mixer {one.name} ({letter} in model.pattern) cannot be written in the Hugging Face format, by "
            "which models are also evaluated and generate: give its Mixer an `hf` (CONTRIBUTING.md, Adding a mixer)"
        )
    return one.hf


def hf_config(config: ModelConfig, **others: Any) -> SambaConfig:
    """Returns the Hugging Face configuration of a model; `others` are further keys, such as token ids."""
    own: dict[str, Any] = {}
    for letter in [*LAYER_TYPES, *config.pattern]:  # those have keys of both whether the pattern has them or not
        own |= hf_side(letter).to_config(config)
    return SambaConfig(
        pattern=config.pattern,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        norm_eps=config.norm_eps,
        initializer_range=config.embedding_std,
        tie_word_embeddings=config.tie_embeddings,
        extensions=_extensions(config) or None,
        **own,
        **others,
    )


def _extensions(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """Describes the mixers beyond those that SambaConfig knows, by their letters."""
    return {
        one.letter: {
            "name": one.name,
            "layer_type": hf_side(one.letter).cache_layer,
            "is_mlp": hf_side(one.letter).is_mlp,
            "sizes": config.sizes_of(one).model_dump(mode="json") if one.sizes else {},
        }
        for one in config.kinds
        if one.letter not in LAYER_TYPES
    }


def check_mixers(config: SambaConfig) -> None:
    """Raises HFError where the mixers that are installed are not those of the configuration."""
    for letter in config.pattern:
        hf_side(letter)
        described = (config.extensions or {}).get(letter, {}).get("name")
        if described not in (None, mixer(letter).name):
            raise HFError(
                f"config.json means the mixer {described} by the letter {letter}, but the installed mixer with that "
                f"letter is {mixer(letter).name}: install the package of {described} in its place"
            )


def model_config(config: SambaConfig) -> ModelConfig:
    """Returns the inverse of `hf_config`. Raises HFError for a model that training does not know."""
    check_mixers(config)
    own: dict[str, Any] = {}
    sections = {one["name"]: one["sizes"] for one in (config.extensions or {}).values() if one["sizes"]}
    for letter in [*LAYER_TYPES, *config.pattern]:
        own |= hf_side(letter).from_config(config)
    try:
        return ModelConfig(
            pattern=config.pattern,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            tie_embeddings=config.tie_word_embeddings,
            norm_eps=config.norm_eps,
            embedding_std=config.initializer_range,
            mixers=sections,
            **own,
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = f"model.{'.'.join(map(str, first['loc']))} is {first['input']!r}: " if first["loc"] else ""
        reason = first["msg"].removeprefix("Value error, ")
        raise HFError(f"config.json describes a model that cannot be trained here: {key}{reason}") from error
