"""SwiGLU for one token a row."""

from torch import Tensor

from sambalm.model.hf.layer_steps import LayerStep, plain
from sambalm.model.mixers.mlp.hf import SambaMLP
from sambalm.model.ops.decode.linear import Norm, ResidualStream, RowLinear, Workspace, activations


class MLPStep(LayerStep):
    """Two kernels: norm, both projections and their product; the way back and the sum."""

    def __init__(self, layer: SambaMLP, norm: Norm, workspace: Workspace) -> None:
        super().__init__(layer, norm, workspace)
        gate = plain(layer.gate_proj)
        self.gate_up = RowLinear(gate, workspace=workspace, up=plain(layer.up_proj))
        self.down = RowLinear(plain(layer.down_proj), workspace=workspace)
        self.between = activations(workspace.rows, len(gate), like=gate)

    def __call__(self, stream: ResidualStream, positions: Tensor, following: Tensor) -> None:
        self.gate_up.of_stream(stream, self.between, eps=self.norm.eps)
        self.down.into_stream(self.between, stream, following)
