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
from sambalm.model.mixers.base import Ability, HFSide, HFTensor
from sambalm.model.registry import BUILT_IN, mixer

from .configuration_samba import SambaConfig, pattern_blocks
from .errors import HFError


class CanonicalState(Protocol):
    """A model's weights, read one canonical tensor at a time."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every canonical tensor."""

    def read(self, name: str) -> Tensor:
        """One whole tensor, fp32 on the CPU."""


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
    for i, block in enumerate(pattern_blocks(pattern)):
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
    """Returns what a mixer is in the Hugging Face format. Raises HFError for one that has no such side."""
    one = mixer(letter)
    if one.hf is None:
        raise HFError(f"the mixer {one.name} ({letter} in model.pattern) has no {Ability.HUGGING_FACE}")
    return one.hf


def hf_config(config: ModelConfig, **others: Any) -> SambaConfig:
    """Returns the Hugging Face configuration of a model; `others` are further keys, such as token ids."""
    own: dict[str, Any] = {}
    for letter in [*BUILT_IN, *config.pattern]:  # ours have keys of ModelConfig whether the pattern has them or not
        own |= hf_side(letter).to_config(config)
    return SambaConfig(
        pattern=config.pattern,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        norm_eps=config.norm_eps,
        initializer_range=config.embedding_std,
        tie_word_embeddings=config.tie_embeddings,
        **own,
        **others,
    )


def model_config(config: SambaConfig) -> ModelConfig:
    """Returns the inverse of `hf_config`. Raises HFError for a model that training does not know."""
    own: dict[str, Any] = {}
    for letter in [*BUILT_IN, *config.pattern]:
        own |= hf_side(letter).from_config(config)
    try:
        return ModelConfig(
            pattern=config.pattern,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            tie_embeddings=config.tie_word_embeddings,
            norm_eps=config.norm_eps,
            embedding_std=config.initializer_range,
            **own,
        )
    except ValidationError as error:
        raise HFError(
            f"config.json describes a model that cannot be trained here: {error.errors()[0]['msg']}"
        ) from error
