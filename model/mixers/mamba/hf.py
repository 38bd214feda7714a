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
    SambaLayer,
    SambaResidualLinear,
    SequenceContext,
    are_plain,
    carried_states,
    convolve,
    init_step_bias,
    last_tokens,
)
from sambalm.model.ops.reference.causal_conv import causal_conv

# Before the softplus, a step this negative is exactly 0 whatever its bias: the state stays as it is.
NO_STEP = -1e4


class CausalConv1d(nn.Conv1d):
    """A depthwise convolution in which each output sees the inputs up to its own, faster on a CPU than nn.Conv1d."""

    def forward(self, x: Tensor, resets: Tensor | None = None) -> Tensor:
        """Maps x [B, D, S + kernel_size - 1] to [B, D, S].

        Args:
            resets: bool [B, S + kernel_size - 1], True for tokens that do not see what is before them.
        """
        if self.groups != self.in_channels or self.bias is None:  # an adapter's factor, made of this class
            return super().forward(x)
        y_BSD = causal_conv(x.transpose(1, 2), self.weight.squeeze(1), self.bias, resets=resets)
        return y_BSD[:, self.kernel_size[0] - 1 :].transpose(1, 2)


class StepProjection(nn.Linear):
    """The projection to Mamba's step sizes, whose bias is fp32 in a model of any dtype, and so is the sum."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, S, rank] to fp32 (fp64 for fp64) [B, S, D]."""
        projected = F.linear(x, self.weight)
        if self.bias is None:  # an adapter's factor, made of this class
            return projected
        work = torch.promote_types(x.dtype, torch.float32)
        return projected.to(work) + self.bias.to(work)


class SambaMamba(SambaLayer):
    """Mamba-1 (arXiv 2312.00752, section 3.4).

    Convolution and step projection are called as the modules that they are where adapters wrap them, or hooks bring
    their weights from elsewhere; else the operations read their weights.
    """

    isolates_documents = True

    def __init__(self, config: SambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width, inner, states = config.hidden_size, config.intermediate_size, config.state_size
        rank = int(config.time_step_rank)
        self.split_sizes = [rank, states, states]
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = CausalConv1d(inner, inner, config.conv_kernel, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.split_sizes), bias=False)
        self.dt_proj = StepProjection(rank, inner, bias=True)
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
        init_step_bias(
            self.dt_proj.bias,
            smallest=config.time_step_min,
            largest=config.time_step_max,
            floor=config.time_step_floor,
        )

    def forward(self, hidden_states: Tensor, context: SequenceContext) -> Tensor:
        """Maps hidden_states [B, S, width] to the same; continues from and updates the context's cache."""
        cache, padding = context.cache, context.padding
        conv_state, scan_state = carried_states(cache, self.layer_idx)
        if padding:
            hidden_states = padding.front(hidden_states)
        x_BSD, z_BSD = self.in_proj(hidden_states).chunk(2, dim=-1)
        if are_plain(self.conv1d, kinds=(CausalConv1d,)):
            weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
            u_BSD, conv_state = convolve(x_BSD, conv_state, weight=weight, bias=bias, context=context)
        else:
            u_BSD, conv_state = self._convolve_by_module(x_BSD, conv_state, context)
        dt, B, C = self.x_proj(u_BSD).split(self.split_sizes, dim=-1)
        work = torch.promote_types(x_BSD.dtype, torch.float32)
        dt_bias = None
        if are_plain(self.dt_proj, kinds=(StepProjection,)):
            dt_BSD, dt_bias = F.linear(dt, self.dt_proj.weight), self.dt_proj.bias.to(work)
        else:
            dt_BSD = self.dt_proj(dt)
        if padding:
            dt_BSD = dt_BSD.masked_fill(~padding.real[..., None], NO_STEP)
        y_BSD, scan_state = context.operations.gated_selective_scan(
            u_BSD,
            dt_BSD,
            -torch.exp(self.A_log.to(work)),
            B,
            C,
            D=self.D.to(work),
            z=z_BSD,
            dt_bias=dt_bias,
            initial_state=scan_state,
            resets=context.resets,
        )
        if cache is not None:
            cache.update_conv_state(conv_state.transpose(1, 2), self.layer_idx)
            cache.update_recurrent_state(scan_state, self.layer_idx)
        output = self.out_proj(y_BSD)
        return padding.back(output) if padding else output

    def _convolve_by_module(
        self, x_BSD: Tensor, state_BDT: Tensor | None, context: SequenceContext
    ) -> tuple[Tensor, Tensor]:
        """Does what `convolve` does by calling the module, which another package may have wrapped."""
        count, resets = self.config.conv_kernel - 1, context.resets
        if state_BDT is None:
            state_BTD = x_BSD.new_zeros(x_BSD.shape[0], count, x_BSD.shape[2])
        else:
            state_BTD = state_BDT.transpose(1, 2).to(x_BSD.dtype)
        whole_BDT = torch.cat((state_BTD, x_BSD), dim=1).transpose(1, 2)
        resets = None if resets is None else F.pad(resets.expand(len(x_BSD), -1), (count, 0))
        u_BSD = F.silu(self.conv1d(whole_BDT, resets=resets).transpose(1, 2))
        return u_BSD, last_tokens(state_BTD, x_BSD, context.padding, count=count)
