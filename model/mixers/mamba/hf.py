"""Mamba-1 in the Hugging Face format, in PyTorch alone.

Between calls the cache holds the last inputs of the convolution and the scan's state.
B: batch, S: sequence, D: channels, T: tokens before.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from sambalm.model.hf.configuration_samba import SambaConfig
from sambalm.model.hf.layers import (
    Padding,
    SambaLayer,
    SambaResidualLinear,
    SequenceContext,
    carried_states,
    last_tokens,
)
from sambalm.model.ops.reference.causal_conv import causal_conv_silu
from sambalm.model.ops.reference.selective_scan import gated_selective_scan

# Before the softplus, a step this negative is exactly 0 whatever its bias: the state stays as it is.
NO_STEP = -1e4


class SambaMamba(SambaLayer):
    """Mamba-1 (arXiv 2312.00752, section 3.4)."""

    def __init__(self, config: SambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width, inner, states = config.hidden_size, config.intermediate_size, config.state_size
        rank = int(config.time_step_rank)
        self.split_sizes = [rank, states, states]
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.conv_kernel, groups=inner, padding=config.conv_kernel - 1)
        self.x_proj = nn.Linear(inner, sum(self.split_sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = SambaResidualLinear(inner, width, bias=False)

    def init_weights(self) -> None:
        """Fills convolution, decay rates, skip and step bias; see sambalm.model.initialization."""
        config = self.config
        states = torch.arange(1, config.state_size + 1, dtype=torch.float32)
        init.copy_(self.A_log, states.log().expand_as(self.A_log))
        init.ones_(self.D)
        bound = 1 / math.sqrt(config.conv_kernel)
        init.uniform_(self.conv1d.weight, -bound, bound)
        init.uniform_(self.conv1d.bias, -bound, bound)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.empty(config.intermediate_size).uniform_(low, high).exp().clamp(min=config.time_step_floor)
        init.copy_(self.dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))

    def forward(self, hidden_states: Tensor, context: SequenceContext) -> Tensor:
        """Maps hidden_states [B, S, width] to the same; continues from and updates the context's cache."""
        cache, padding = context.cache, context.padding
        conv_state, scan_state = carried_states(cache, self.layer_idx)
        if padding:
            hidden_states = padding.front(hidden_states)
        x_BSD, z_BSD = self.in_proj(hidden_states).chunk(2, dim=-1)
        u_BSD, conv_state = self._convolve(x_BSD, conv_state, padding)
        dt, B, C = self.x_proj(u_BSD).split(self.split_sizes, dim=-1)
        dt_BSD = F.linear(dt, self.dt_proj.weight)
        if padding:
            dt_BSD = dt_BSD.masked_fill(~padding.real[..., None], NO_STEP)
        work = torch.promote_types(x_BSD.dtype, torch.float32)
        y_BSD, scan_state = gated_selective_scan(
            u_BSD,
            dt_BSD,
            -torch.exp(self.A_log.to(work)),
            B,
            C,
            D=self.D.to(work),
            z=z_BSD,
            dt_bias=self.dt_proj.bias.to(work),
            initial_state=scan_state,
        )
        if cache is not None:
            cache.update_conv_state(conv_state.transpose(1, 2), self.layer_idx)
            cache.update_recurrent_state(scan_state, self.layer_idx)
        output = self.out_proj(y_BSD)
        return padding.back(output) if padding else output

    def _convolve(self, x_BSD: Tensor, state_BDT: Tensor | None, padding: Padding | None) -> tuple[Tensor, Tensor]:
        """Returns the convolution's output [B, S, D] and its last real inputs [B, conv_kernel - 1, D]."""
        state_BTD = None if state_BDT is None else state_BDT.transpose(1, 2)
        u_BSD = causal_conv_silu(x_BSD, self.conv1d.weight.squeeze(1), self.conv1d.bias, state_BTD)
        return u_BSD, last_tokens(state_BTD, x_BSD, padding, count=self.conv1d.kernel_size[0] - 1)
