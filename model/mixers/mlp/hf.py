"""The SwiGLU MLP in the Hugging Face format."""

import torch.nn.functional as F
from torch import Tensor, nn

from sambalm.model.hf.configuration_samba import SambaConfig
from sambalm.model.hf.layers import SambaLayer, SambaResidualLinear, SequenceContext, are_plain

# cuBLAS takes its fast kernels where rows begin at multiples of 16 bytes, and is faster still with whole tiles.
ALIGNED_BY, ALIGNED_TO = 8, 64


class SambaMLP(SambaLayer):
    """SwiGLU: down(SiLU(gate(x)) * up(x))."""

    isolates_documents = True

    def __init__(self, config: SambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        size = self.inner_size(config)
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.down_proj = SambaResidualLinear(size, config.hidden_size, bias=False)

    @staticmethod
    def inner_size(config: SambaConfig) -> int:
        return config.mlp_size

    def forward(self, hidden_states: Tensor, context: SequenceContext) -> Tensor:
        projections, swiglu = (self.gate_proj, self.up_proj, self.down_proj), context.operations.swiglu
        is_slow = hidden_states.is_cuda and self.inner_size(self.config) % ALIGNED_BY
        if is_slow and are_plain(*projections, kinds=(nn.Linear, SambaResidualLinear)):
            gate, up, down = (projection.weight for projection in projections)
            more = -len(gate) % ALIGNED_TO  # of zeros, which change no result
            gate, up = (F.linear(hidden_states, F.pad(weight, (0, 0, 0, more))) for weight in (gate, up))
            return F.linear(swiglu(gate, up), F.pad(down, (0, more)))
        return self.down_proj(swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states)))


class SambaMLP2(SambaMLP):
    """The same with the width of the second MLP."""

    @staticmethod
    def inner_size(config: SambaConfig) -> int:
        return config.sizes("mlp2")["size"]
