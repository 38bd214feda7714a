"""Gated linear attention and retention in the Hugging Face format, in PyTorch alone.

Between calls the cache holds each head's state.
B: batch, S: sequence, H: heads, K: channels of a key.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from sambalm.model.hf.configuration_samba import SambaConfig
from sambalm.model.hf.layers import SambaWholeHeadsLayer, SequenceContext, carried_states
from sambalm.model.ops.reference.linear_attention import gated_log_decays, linear_attention, retention_log_decays
from sambalm.model.ops.reference.window_attention import rotary_tables


class SambaGatedLinearAttention(SambaWholeHeadsLayer):
    """Gated linear attention (arXiv 2312.06635, section 4.4)."""

    name: ClassVar = "gla"

    def __init__(self, config: SambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.g_proj = nn.Linear(config.hidden_size, self.value_width, bias=False)
        self.make_decays(config.hidden_size, key=self.key_width)

    def make_decays(self, width: int, *, key: int) -> None:
        """Makes what `log_decays` calls."""
        rank = self.sizes["gate_rank"]
        self.decay_down, self.decay_up = nn.Linear(width, rank, bias=False), nn.Linear(rank, key, bias=False)
        self.decay_bias = nn.Parameter(torch.zeros(key))

    def init_weights(self) -> None:
        """Fills the norm and the decays' bias."""
        init.ones_(self.o_norm)
        init.zeros_(self.decay_bias)

    def log_decays(self, hidden_states: Tensor) -> Tensor:
        """Returns the logarithms of the decays [B, S, H, K], or [H] of all tokens, in fp32 (fp64 for fp64)."""
        gate = self.decay_up(self.decay_down(hidden_states))
        return gated_log_decays(gate, self.decay_bias).unflatten(-1, (-1, self.head_dim))

    def positioned(self, q: Tensor, k: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """Returns queries and keys [B, S, H, K] with their positions, where there are such."""
        return q, k

    def forward(self, hidden_states: Tensor, context: SequenceContext) -> Tensor:
        """Maps hidden_states [B, S, width] to the same; continues from and updates the context's cache."""
        cache, padding = context.cache, context.padding
        _, state = carried_states(cache, self.layer_idx)
        if padding:
            hidden_states = padding.front(hidden_states)
        q, k, v = self.per_head(*(project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj)))
        log_decays = self.log_decays(hidden_states)
        if padding:  # which neither decays a state nor, being zero, writes to it
            real = padding.real[..., None]
            log_decays = log_decays.masked_fill(~(real if log_decays.dim() < 4 else real[..., None]), 0)
        q, k = self.positioned(q, k, context)
        resets = None if context.resets is None else context.resets.expand(len(q), -1)
        attend = context.operations.linear_attention or linear_attention
        y_BSHV, state = attend(q, k, v, log_decays, initial_state=state, resets=resets)
        if cache is not None:
            # By a convolution's state, which this layer lacks, transformers tells that there is one to go on from.
            cache.update_conv_state(hidden_states.new_zeros(len(q), 1, 1), self.layer_idx)
            cache.update_recurrent_state(state, self.layer_idx)
        return self.output(y_BSHV, self.g_proj(hidden_states), context)


class SambaRetention(SambaGatedLinearAttention):
    """Retention (arXiv 2307.08621, section 2)."""

    name: ClassVar = "retnet"

    def make_decays(self, width: int, *, key: int) -> None:
        """Makes nothing: the decays are fixed."""

    def init_weights(self) -> None:
        """Fills the norm."""
        init.ones_(self.o_norm)

    def log_decays(self, hidden_states: Tensor) -> Tensor:
        return retention_log_decays(self.sizes["num_heads"], device=hidden_states.device)

    def positioned(self, q: Tensor, k: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        positions, padding = context.positions, context.padding
        assert positions is not None, "the model gives all layers the tokens' positions"
        if padding:
            positions = positions.expand(len(q), -1).take_along_dim(padding.order, dim=1)
        cos, sin = rotary_tables(positions.unsqueeze(2), head_dim=self.head_dim, base=self.sizes["rope_base"])
        rotated = (context.operations.rotary(t, cos, sin) for t in (q, k))
        return next(rotated), next(rotated)
