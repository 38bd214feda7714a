"""The SwiGLU MLP with its inner width cut over tensor-parallel ranks."""

from torch import Tensor, nn

from sambalm.model import initialization as init
from sambalm.model.config import ModelConfig
from sambalm.model.mixers.context import SequenceContext
from sambalm.model.ops.registry import Kernels
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.layers.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from sambalm.parallel.shard import shard


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)); the inner width `size` is cut over ranks."""

    def __init__(self, config: ModelConfig, *, size: int, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        width, inner = config.hidden_size, shard(size, tp)
        self.kernel = kernels.elementwise.swiglu
        self.gate_up_proj = ColumnParallelLinear(width, {"gate": inner, "up": inner}, tp=tp, init=init.linear(width))
        self.down_proj = RowParallelLinear(inner, width, tp=tp, init=init.residual_linear(inner.size, config))

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        return self.down_proj(self.kernel(*self.gate_up_proj(x)))
