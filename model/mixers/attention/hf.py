"""Attention in the Hugging Face format, in PyTorch alone or by transformers' implementations.

Between calls the cache holds the keys and values of the last window - 1 positions, or of all in full attention.
B: batch, S: sequence, H: heads, d: head dim.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sambalm.model.hf.configuration_samba import SambaConfig
from sambalm.model.hf.layers import DENSE_ATTENTION, AttentionWeightsLayer, SambaResidualLinear, SequenceContext


class FirstKeys(NamedTuple):
    """The documents of a call, as window_attention takes them."""

    first_keys: Tensor  # int64 [B, S]: the place among the keys of the first one that a query may see


class SambaAttention(AttentionWeightsLayer):
    """Causal sliding-window attention with grouped queries, and rotary positions where the configuration has any."""

    isolates_documents = True
    is_full = False

    def __init__(self, config: SambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.head_dim, self.window = config.head_dim, None if self.is_full else config.sliding_window
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = SambaResidualLinear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor | None]:
        """Maps hidden_states [B, S, width] to the same; adds attention weights where the implementation gives them."""
        q, k = (self._rotated(p(hidden_states), context) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if context.cache is not None:
            k, v = context.cache.update(k, v, self.layer_idx)
        if self.writes is not None:
            self.written((k, v), context)
        return self._attend(q, k, v, context)

    def _rotated(self, projected: Tensor, context: SequenceContext) -> Tensor:
        """Returns queries or keys [B, H, S, d] with their positions, from their projection [B, S, width]."""
        x_BSHd = projected.unflatten(-1, (-1, self.head_dim))
        if context.rotary is not None:
            x_BSHd = context.operations.rotary(x_BSHd, *context.rotary)
        return x_BSHd.transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor | None]:
        """Returns the layer's output [B, S, width], and attention weights where the implementation gives them."""
        weights = None
        masks = context.attention_masks
        if masks is None and self.config._attn_implementation in DENSE_ATTENTION:
            y_BSHd = self._attend_window(q, k, v, context).transpose(1, 2)
        else:
            mask = None if masks is None else masks.full if self.is_full else masks.window
            y_BSHd, weights = self._attend_masked(q, k, v, mask)
        return self.o_proj(y_BSHd.flatten(2)), weights

    @property
    def _cache_idx(self) -> int:
        """The number of the block whose keys these are."""
        return self.layer_idx

    def _attend_window(self, q: Tensor, k: Tensor, v: Tensor, context: SequenceContext) -> Tensor:
        if context.cache is not None:
            # A static cache that is not yet full hands out its whole buffer.
            seen = min(k.shape[2], context.cache.get_seq_length(self._cache_idx))
            k, v = k[:, :, :seen], v[:, :, :seen]
        keys, documents, real = k.shape[2], None, context.real_keys
        if context.documents:
            first_keys = context.documents.first_tokens + (keys - q.shape[2])
            documents = FirstKeys(first_keys.clamp(min=0).expand(q.shape[0], -1))
        if real is not None:
            real = real[:, real.shape[1] - keys :]
        attend, window = context.operations.window_attention, keys if self.window is None else self.window
        return attend(q, k, v, window=window, documents=documents, real_keys=real)

    def _attend_masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor | None]:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if isinstance(mask, Tensor):
            # With a window of one position transformers' cache keeps every key, though its mask counts on none.
            k, v = k[:, :, -mask.shape[-1] :], v[:, :, -mask.shape[-1] :]
        scaling = 1 / math.sqrt(self.head_dim)
        return attend(self, q, k, v, mask, dropout=0.0, scaling=scaling, sliding_window=self.window)


class SambaFullAttention(SambaAttention):
    """Causal attention over everything before."""

    is_full = True
    writes = "keys and values"


class SambaCrossAttention(SambaAttention):
    """Causal attention over the keys and values of the last full attention before."""

    is_full = True
    reads = "keys and values"

    def __init__(self, config: SambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.k_proj, self.v_proj

    @property
    def _cache_idx(self) -> int:
        assert self.source_idx is not None, "the model tells the layer whose keys it reads"
        return self.source_idx

    def forward(self, hidden_states: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor | None]:
        """Maps hidden_states [B, S, width] to the same, as its parent does; the cache has nothing of it."""
        k, v = self.memory(context)
        return self._attend(self._rotated(self.q_proj(hidden_states), context), k, v, context)


def eager_attention_forward(
    module: "SambaAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attends with the weights written out; signature and shapes are those of ALL_ATTENTION_FUNCTIONS."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    work = torch.promote_types(query.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=work).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights
