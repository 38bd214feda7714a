"""SwiGLU for one token a row."""

from torch import Tensor

from sambalm.model.hf.layer_steps import LayerStep, plain
from sambalm.model.hf.layers import SambaRMSNorm
from sambalm.model.mixers.mlp.hf import SambaMLP
from sambalm.model.ops.decode.linear import RowLinear, Workspace, activations


class MLPStep(LayerStep):
    """Two kernels: norm, both projections and their product; the way back and the sum."""

    def __init__(self, layer: SambaMLP, norm: SambaRMSNorm, workspace: Workspace) -> None:
        super().__init__(layer, norm, workspace)
        gate = plain(layer.gate_proj)
        self.gate_up = RowLinear(gate, workspace, up=plain(layer.up_proj), norm=self.norm)
        self.down = RowLinear(plain(layer.down_proj), workspace)
        self.between = activations(workspace.rows, len(gate), like=gate)

    def __call__(self, x: Tensor, positions: Tensor) -> None:
        self.down(self.gate_up(x, self.between), x, adds=True)
