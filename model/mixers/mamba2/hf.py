"""Mamba-2 in the Hugging Face format, in PyTorch alone.

Between calls the cache holds the last inputs of the convolution and the scan's state.
B: batch, S: sequence, D: channels of the convolution (x, B and C side by side), T: tokens before.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from sambalm.model.hf.configuration_samba import SambaConfig
from sambalm.model.hf.layers import (
    SambaLayer,
    SambaResidualLinear,
    SequenceContext,
    carried_states,
    convolve,
    init_step_bias,
)
from sambalm.model.ops.reference.elementwise import gated_norm
from sambalm.model.ops.reference.ssd_scan import ssd_scan

# Before the softplus, a step this negative is exactly 0 whatever its bias: the state stays as it is.
NO_STEP = -1e4


class GatedNorm(nn.Module):
    """The norm of the gated output, each group's channels on their own."""

    def __init__(self, width: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.weight, self.groups, self.eps = nn.Parameter(torch.ones(width)), groups, eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """Maps y and gate [B, S, channels] to the same."""
        shape, work = (self.groups, -1), torch.promote_types(y.dtype, torch.float32)
        y, gate = (t.unflatten(2, shape) for t in (y, gate))
        return gated_norm(y, gate, self.weight.view(shape).to(work), self.eps).flatten(2)


class SambaMamba2(SambaLayer):
    """Mamba-2 (arXiv 2405.21060, section 7)."""

    isolates_documents, writes = True, "scan's output"

    def __init__(self, config: SambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.sizes = config.sizes("mamba2")
        width, inner, taps = config.hidden_size, self.sizes["expand"] * config.hidden_size, self.sizes["d_conv"]
        heads, states = inner // self.sizes["head_dim"], self.sizes["groups"] * self.sizes["d_state"]
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.bc_proj = nn.Linear(width, 2 * states, bias=False)
        self.dt_proj = nn.Linear(width, heads, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, taps, groups=inner)
        self.bc_conv1d = nn.Conv1d(2 * states, 2 * states, taps, groups=2 * states)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.zeros(heads)) for _ in range(3))
        self.norm = GatedNorm(inner, groups=self.sizes["groups"], eps=config.norm_eps)
        self.out_proj = SambaResidualLinear(inner, width, bias=False)

    def init_weights(self) -> None:
        """Fills convolutions, decay rates, skip, step bias and norm; see sambalm.model.initialization."""
        bound = 1 / math.sqrt(self.sizes["d_conv"])
        for conv in (self.conv1d, self.bc_conv1d):
            init.uniform_(conv.weight, -bound, bound)
            init.uniform_(conv.bias, -bound, bound)
        init.copy_(self.A_log, torch.empty(self.A_log.shape).uniform_(1, 16).log())
        init.ones_(self.D)
        init.ones_(self.norm.weight)
        sizes = self.sizes
        init_step_bias(self.dt_bias, smallest=sizes["dt_min"], largest=sizes["dt_max"], floor=sizes["dt_floor"])

    def forward(self, hidden_states: Tensor, context: SequenceContext) -> Tensor:
        """Maps hidden_states [B, S, width] to the same; continues from and updates the context's cache."""
        cache, padding = context.cache, context.padding
        conv_state, scan_state = carried_states(cache, self.layer_idx)
        if padding:
            hidden_states = padding.front(hidden_states)
        z_BSD, x_BSD = self.in_proj(hidden_states).chunk(2, dim=-1)
        dt_BSH = self.dt_proj(hidden_states)
        if padding:
            dt_BSH = dt_BSH.masked_fill(~padding.real[..., None], NO_STEP)
        mixed_BSD = torch.cat((x_BSD, self.bc_proj(hidden_states)), dim=-1)
        weight = torch.cat((self.conv1d.weight, self.bc_conv1d.weight)).squeeze(1)
        bias = torch.cat((self.conv1d.bias, self.bc_conv1d.bias))
        u_BSD, conv_state = convolve(mixed_BSD, conv_state, weight=weight, bias=bias, context=context)
        y_BSD, scan_state = self._scan(u_BSD, dt_BSH, scan_state, context)
        if cache is not None:
            cache.update_conv_state(conv_state.transpose(1, 2), self.layer_idx)
            cache.update_recurrent_state(scan_state, self.layer_idx)
        self.written(padding.back(y_BSD) if padding else y_BSD, context)
        output = self.out_proj(self.norm(y_BSD, z_BSD))
        return padding.back(output) if padding else output

    def _scan(
        self, u_BSD: Tensor, dt_BSH: Tensor, state: Tensor | None, context: SequenceContext
    ) -> tuple[Tensor, Tensor]:
        """Returns the scan's output [B, S, channels] and its state after the last token."""
        inner, states = self.norm.weight.shape[0], self.sizes["groups"] * self.sizes["d_state"]
        x, B, C = u_BSD.split([inner, states, states], dim=-1)
        work = torch.promote_types(x.dtype, torch.float32)
        y, state = ssd_scan(
            x.unflatten(2, (-1, self.sizes["head_dim"])),
            dt_BSH,
            -torch.exp(self.A_log.to(work)),
            *(t.unflatten(2, (self.sizes["groups"], -1)) for t in (B, C)),
            D=self.D.to(work),
            dt_bias=self.dt_bias.to(work),
            initial_state=None if state is None else state.to(work),
            resets=None if context.resets is None else context.resets.expand(len(x), -1),
        )
        return y.flatten(2), state


class SambaGatedMemoryUnit(SambaLayer):
    """A gate over the scan's output of the last Mamba-2 layer before (arXiv 2507.06607, section 2)."""

    isolates_documents, reads = True, "scan's output"

    def __init__(self, config: SambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        sizes, width = config.sizes("mamba2"), config.hidden_size
        inner = sizes["expand"] * width
        self.in_proj = nn.Linear(width, inner, bias=False)
        self.norm = GatedNorm(inner, groups=sizes["groups"], eps=config.norm_eps)
        self.out_proj = SambaResidualLinear(inner, width, bias=False)

    def init_weights(self) -> None:
        """Fills the norm."""
        init.ones_(self.norm.weight)

    def forward(self, hidden_states: Tensor, context: SequenceContext) -> Tensor:
        """Maps hidden_states [B, S, width] to the same; the cache has nothing of it."""
        return self.out_proj(self.norm(self.memory(context), self.in_proj(hidden_states)))
