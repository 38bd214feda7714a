"""Gated DeltaNet and Kimi Delta Attention in the Hugging Face format, in PyTorch alone.

Between calls the cache holds the last inputs of the convolution and each head's state.
B: batch, S: sequence, D: channels of queries, keys and values, H: heads, K and V: channels of a key and a value.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from sambalm.model.hf.configuration_samba import SambaConfig
from sambalm.model.hf.layers import (
    SambaWholeHeadsLayer,
    SequenceContext,
    carried_states,
    convolve,
    init_step_bias,
)
from sambalm.model.ops.reference.delta_rule import gated_delta_rule

# A gate this negative neither decays a state nor writes to it, whatever its bias: the state stays as it is.
NO_STEP = -1e4


class SambaGatedDeltaNet(SambaWholeHeadsLayer):
    """Gated DeltaNet (arXiv 2412.06464, section 3.4)."""

    name: ClassVar = "gated_deltanet"
    per_channel: ClassVar = False
    lowest_rate: ClassVar = 1e-4

    def __init__(self, config: SambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width, heads, key, value = config.hidden_size, self.sizes["num_heads"], self.key_width, self.value_width
        self.widths = [key, key, value]
        self.b_proj = nn.Linear(width, heads, bias=False)
        self.q_conv, self.k_conv, self.v_conv = (
            nn.Parameter(torch.empty(size, self.sizes["d_conv"])) for size in self.widths
        )
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(key if self.per_channel else heads))
        self.make_gates(width, key=key, value=value, heads=heads)

    def make_gates(self, width: int, *, key: int, value: int, heads: int) -> None:
        """Makes what `gates` calls."""
        self.g_proj, self.a_proj = (nn.Linear(width, size, bias=False) for size in (value, heads))

    def gates(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the decays before softplus, [B, S, H] or [B, S, keys], and the output's gate [B, S, values]."""
        return self.a_proj(hidden_states), self.g_proj(hidden_states)

    def init_weights(self) -> None:
        """Fills convolutions, decays and norm; see sambalm.model.mixers.delta.layer."""
        bound = 1 / math.sqrt(self.sizes["d_conv"])
        for weight in (self.q_conv, self.k_conv, self.v_conv):
            init.uniform_(weight, -bound, bound)
        init.copy_(self.A_log, torch.empty(self.A_log.shape).uniform_(self.lowest_rate, 16.0).log())
        sizes = self.sizes
        init_step_bias(self.dt_bias, smallest=sizes["dt_min"], largest=sizes["dt_max"], floor=sizes["dt_floor"])
        init.ones_(self.o_norm)

    def forward(self, hidden_states: Tensor, context: SequenceContext) -> Tensor:
        """Maps hidden_states [B, S, width] to the same; continues from and updates the context's cache."""
        cache, padding = context.cache, context.padding
        conv_state, state = carried_states(cache, self.layer_idx)
        if padding:
            hidden_states = padding.front(hidden_states)
        qkv_BSD = torch.cat([project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        (decay, gate), beta = self.gates(hidden_states), self.b_proj(hidden_states)
        if padding:
            decay, beta = (t.masked_fill(~padding.real[..., None], NO_STEP) for t in (decay, beta))
        weight = torch.cat((self.q_conv, self.k_conv, self.v_conv))
        bias = torch.zeros_like(weight[:, 0])
        qkv_BSD, conv_state = convolve(qkv_BSD, conv_state, weight=weight, bias=bias, context=context)
        q, k, v = self.per_head(*qkv_BSD.split(self.widths, dim=-1))
        dt_bias = self.dt_bias
        if self.per_channel:
            decay, dt_bias = (t.unflatten(-1, (-1, self.head_dim)) for t in (decay, dt_bias))
        rule = context.operations.delta_rule or gated_delta_rule
        resets = None if context.resets is None else context.resets.expand(len(q), -1)
        options = {"A_log": self.A_log, "dt_bias": dt_bias, "initial_state": state, "resets": resets}
        y_BSHV, state = rule(q, k, v, decay, beta, **options)
        if cache is not None:
            cache.update_conv_state(conv_state.transpose(1, 2), self.layer_idx)
            cache.update_recurrent_state(state, self.layer_idx)
        return self.output(y_BSHV, gate, context)


class SambaKimiDelta(SambaGatedDeltaNet):
    """Kimi Delta Attention (arXiv 2510.26692, section 4)."""

    name: ClassVar = "kimi_delta"
    per_channel: ClassVar = True
    activation: ClassVar = "sigmoid"
    lowest_rate: ClassVar = 1.0

    def make_gates(self, width: int, *, key: int, value: int, heads: int) -> None:
        rank = self.value_dim
        self.f_down, self.g_down = (nn.Linear(width, rank, bias=False) for _ in range(2))
        self.f_up, self.g_up = (nn.Linear(rank, size, bias=False) for size in (key, value))

    def gates(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return self.f_up(self.f_down(hidden_states)), self.g_up(self.g_down(hidden_states))
