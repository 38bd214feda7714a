"""The norms of the residual stream and of a layer's heads."""

from functools import partial

from torch import Tensor, nn

from sambalm.model import initialization as init
from sambalm.model.config import ModelConfig
from sambalm.model.ops.registry import Kernels
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.layers.tensor_parallel import copy_to_region, replicated_weight
from sambalm.parallel.sharding import replicated_parameter


class RMSNorm(nn.Module):
    """Root-mean-square norm of the residual stream before each sublayer and the head, after the last one's sum.

    Args:
        scale: what its weight begins with.
    """

    def __init__(self, config: ModelConfig, *, tp: TensorParallel, kernels: Kernels, scale: float = 1.0) -> None:
        super().__init__()
        self.tp, self.eps, self.kernel = tp, config.norm_eps, kernels.norm
        self.weight = replicated_parameter((config.hidden_size,), name="weight", init=init.Constant(scale), tp=tp)

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream x with what the sublayer before adds to it (None: nothing), and that normed."""
        return self.kernel(x, branch, replicated_weight(self.weight, self.tp), eps=self.eps)


class GatedHeadNorm(nn.Module):
    """The norm of each head's output times an activation of its gate. All heads have the same weights.

    Args:
        channels: of a head's output.
        activation: silu or sigmoid.
    """

    def __init__(self, channels: int, *, eps: float, activation: str, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        self.tp, self.kernel = tp, partial(kernels.elementwise.norm_and_gate, eps=eps, activation=activation)
        self.weight = replicated_parameter((channels,), name="weight", init=init.ones, tp=tp)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.kernel(x, copy_to_region(self.weight, self.tp), gate)
