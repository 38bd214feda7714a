"""The SwiGLU MLP in the Hugging Face format."""

import torch.nn.functional as F
from torch import Tensor, nn

from sambalm.model.hf.configuration_samba import SambaConfig
from sambalm.model.hf.layers import SambaLayer, SambaResidualLinear, SequenceContext


class SambaMLP(SambaLayer):
    """SwiGLU: down(SiLU(gate(x)) * up(x))."""

    isolates_documents = True

    def __init__(self, config: SambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = SambaResidualLinear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, context: SequenceContext) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
