"""Mamba-1 for one token a row (arXiv 2312.00752, section 3.4)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sambalm.model.hf.layer_steps import LayerStep, plain, taken
from sambalm.model.mixers.mamba.hf import SambaMamba
from sambalm.model.ops.decode.linear import Norm, ResidualStream, RowLinear, Workspace, activations
from sambalm.model.ops.decode.mamba import conv_step, scan_step


class MambaStep(LayerStep):
    """Five kernels: norm and in_proj, convolution, x_proj, dt_proj with the recurrence and the gate, out_proj."""

    def __init__(self, layer: SambaMamba, norm: Norm, workspace: Workspace) -> None:
        super().__init__(layer, norm, workspace)
        in_weight, x_weight = plain(layer.in_proj), plain(layer.x_proj)
        rows, self.channels = workspace.rows, layer.A_log.shape[0]
        self.in_proj = RowLinear(in_weight, workspace=workspace)
        self.x_proj = RowLinear(x_weight, workspace=workspace)
        self.out_proj = RowLinear(plain(layer.out_proj), workspace=workspace)
        self.conv_weight = plain(layer.conv1d).squeeze(1).contiguous()
        self.conv_bias = layer.conv1d.bias.detach()
        self.scan = {
            "dt_weight": plain(layer.dt_proj).contiguous(),
            "dt_bias": layer.dt_proj.bias.detach().float(),
            "A_log": layer.A_log.detach().float(),
            "D": layer.D.detach().float(),
        }
        self.xz = activations(rows, len(in_weight), like=in_weight)
        self.u, self.y = (activations(rows, self.channels, like=in_weight) for _ in range(2))
        self.projected = activations(rows, len(x_weight), like=in_weight)
        # The oldest token first, channels side by side, so that a warp reads one piece of memory.
        self.conv_state = in_weight.new_zeros(rows, self.conv_weight.shape[1] - 1, self.channels)
        self.scan_state = in_weight.new_zeros(rows, *layer.A_log.shape, dtype=torch.float32)

    def __call__(self, stream: ResidualStream, positions: Tensor, following: Tensor) -> None:
        self.in_proj.of_stream(stream, self.xz, eps=self.norm.eps)
        conv_step(self.xz, self.conv_state, self.conv_weight, self.conv_bias, self.u)
        self.x_proj(self.u, self.projected)
        z = self.xz[:, self.channels :]
        scan_step(self.u, z, self.projected, **self.scan, state=self.scan_state, out=self.y)
        self.out_proj.into_stream(self.y, stream, following)

    def load(self, state: Mapping[str, Tensor], seen_tokens: list[int]) -> None:
        conv = state.get("conv")
        rows = len(seen_tokens)
        taken(self.conv_state[:rows], None if conv is None else conv.transpose(1, 2))
        taken(self.scan_state[:rows], state.get("scan"))

    def state(self, seen_tokens: list[int]) -> dict[str, Tensor]:
        rows = len(seen_tokens)
        return {"conv": self.conv_state[:rows].mT.contiguous(), "scan": self.scan_state[:rows].clone()}
