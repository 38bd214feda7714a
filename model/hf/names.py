"""The two-way mapping between canonical tensors (as checkpoints name them) and those of a Hugging Face folder.

One table serves both directions. A Hugging Face tensor is one or more canonical tensors, concatenated along their first
dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from sambalm.model.config import ModelConfig

from .configuration_samba import ATTENTION, MAMBA, SambaConfig, pattern_blocks
from .errors import HFError


class CanonicalState(Protocol):
    """A model's weights, read one canonical tensor at a time."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every canonical tensor."""

    def read(self, name: str) -> Tensor:
        """One whole tensor, fp32 on the CPU."""


@dataclass(frozen=True)
class HFTensor:
    """How a tensor of a Hugging Face folder is made."""

    parts: tuple[str, ...]  # canonical names, in order along dimension 0
    is_conv: bool = False  # nn.Conv1d has a dimension of one input channel, which the canonical [channels, taps] lacks
    is_fp32: bool = False  # whatever the dtype of the rest

    def hf_shape(self, canonical_shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        shapes = [tuple(canonical_shapes[part]) for part in self.parts]
        rows = sum(shape[0] for shape in shapes)
        return (rows, *((1,) if self.is_conv else ()), *shapes[0][1:])

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.is_fp32 else dtype


# Name in a block of the Hugging Face model: name in the sublayer of the canonical one.
_MIXERS = {
    MAMBA: {
        "mixer_norm.weight": HFTensor(("norm.weight",)),
        "mixer.A_log": HFTensor(("mixer.A_log",), is_fp32=True),
        "mixer.D": HFTensor(("mixer.D",), is_fp32=True),
        "mixer.in_proj.weight": HFTensor(("mixer.in_proj.x.weight", "mixer.in_proj.z.weight")),
        "mixer.conv1d.weight": HFTensor(("mixer.conv.weight",), is_conv=True),
        "mixer.conv1d.bias": HFTensor(("mixer.conv.bias",)),
        "mixer.x_proj.weight": HFTensor(("mixer.x_proj.weight",)),
        "mixer.dt_proj.weight": HFTensor(("mixer.dt_proj.weight",)),
        "mixer.dt_proj.bias": HFTensor(("mixer.dt_proj.bias",), is_fp32=True),
        "mixer.out_proj.weight": HFTensor(("mixer.out_proj.weight",)),
    },
    ATTENTION: {
        "mixer_norm.weight": HFTensor(("norm.weight",)),
        "mixer.q_proj.weight": HFTensor(("mixer.qkv_proj.q.weight",)),
        "mixer.k_proj.weight": HFTensor(("mixer.qkv_proj.k.weight",)),
        "mixer.v_proj.weight": HFTensor(("mixer.qkv_proj.v.weight",)),
        "mixer.o_proj.weight": HFTensor(("mixer.o_proj.weight",)),
    },
    None: {},
}
_MLP = {
    "mlp_norm.weight": HFTensor(("norm.weight",)),
    "mlp.gate_proj.weight": HFTensor(("mixer.gate_up_proj.gate.weight",)),
    "mlp.up_proj.weight": HFTensor(("mixer.gate_up_proj.up.weight",)),
    "mlp.down_proj.weight": HFTensor(("mixer.down_proj.weight",)),
}


def hf_tensors(pattern: str, *, tie_embeddings: bool) -> dict[str, HFTensor]:
    """Name and making of every tensor of the Hugging Face model, in the model's order."""
    tensors = {"backbone.embeddings.weight": HFTensor(("embedding.weight",))}
    for i, block in enumerate(pattern_blocks(pattern)):
        for table, sublayer in ((_MIXERS[block.mixer], block.mixer_sublayer), (_MLP, block.mlp_sublayer)):
            if sublayer is None:
                continue
            for name, tensor in table.items():
                parts = tuple(f"layers.{sublayer}.{part}" for part in tensor.parts)
                made = HFTensor(parts, is_conv=tensor.is_conv, is_fp32=tensor.is_fp32)
                tensors[f"backbone.layers.{i}.{name}"] = made
    tensors["backbone.norm_f.weight"] = HFTensor(("final_norm.weight",))
    if not tie_embeddings:
        tensors["lm_head.weight"] = HFTensor(("head.weight",))
    return tensors


def hf_config(config: ModelConfig, **others: Any) -> SambaConfig:
    """The Hugging Face configuration of a model; `others` are keys that ModelConfig lacks, such as token ids."""
    return SambaConfig(
        pattern=config.pattern,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        mlp_size=config.mlp_size,
        attn={
            "num_heads": config.num_query_heads,
            "num_kv_heads": config.num_kv_heads,
            "window_size": config.window,
            "rope_theta": config.rope_base,
        },
        state_size=config.d_state,
        expand=config.expand,
        conv_kernel=config.d_conv,
        time_step_rank=config.dt_rank_size,
        time_step_min=config.dt_min,
        time_step_max=config.dt_max,
        time_step_floor=config.dt_floor,
        norm_eps=config.norm_eps,
        initializer_range=config.embedding_std,
        tie_word_embeddings=config.tie_embeddings,
        **others,
    )


def model_config(config: SambaConfig) -> ModelConfig:
    """The inverse of hf_config. Raises HFError for a model that training does not know."""
    try:
        return ModelConfig(
            pattern=config.pattern,
            hidden_size=config.hidden_size,
            num_query_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            mlp_size=config.mlp_size,
            window=config.sliding_window,
            vocab_size=config.vocab_size,
            tie_embeddings=config.tie_word_embeddings,
            d_state=config.state_size,
            d_conv=config.conv_kernel,
            expand=config.expand,
            dt_rank=config.time_step_rank,
            dt_min=config.time_step_min,
            dt_max=config.time_step_max,
            dt_floor=config.time_step_floor,
            rope_base=config.attn["rope_theta"],
            norm_eps=config.norm_eps,
            embedding_std=config.initializer_range,
        )
    except ValidationError as error:
        raise HFError(
            f"config.json describes a model that cannot be trained here: {error.errors()[0]['msg']}"
        ) from error
