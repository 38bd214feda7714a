"""The token shift in the Hugging Face format: between calls the cache holds the last token's values."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from sambalm.model.hf.layers import SambaLayer, SambaResidualLinear, carried_states, last_tokens
from toy_mixer.ops import token_before


class TokenShift(SambaLayer):
    isolates_documents = True

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        channels = config.sizes("token_shift")["channels"]
        self.in_proj = nn.Linear(config.hidden_size, 2 * channels, bias=False)
        self.mix = nn.ParameterDict({"weight": torch.empty(channels, 2)})
        self.out_proj = SambaResidualLinear(channels, config.hidden_size, bias=False)

    def init_weights(self):
        init.uniform_(self.mix["weight"], -(2**-0.5), 2**-0.5)

    def forward(self, hidden_states, context):
        cache, padding = context.cache, context.padding
        if padding:
            hidden_states = padding.front(hidden_states)
        gate_BSC, value_BSC = self.in_proj(hidden_states).chunk(2, dim=-1)
        state_BC1, _ = carried_states(cache, self.layer_idx)
        start_B1C = torch.zeros_like(value_BSC[:, :1]) if state_BC1 is None else state_BC1.transpose(1, 2)
        now, before = self.mix["weight"].unbind(1)
        before_BSC = token_before(value_BSC, start_B1C)
        if context.resets is not None:
            before_BSC = before_BSC.masked_fill(context.resets[..., None], 0)
        mixed_BSC = (value_BSC * now + before_BSC * before).to(value_BSC.dtype)
        if cache is not None:
            last_B1C = last_tokens(start_B1C, value_BSC, padding, count=1)
            cache.update_conv_state(last_B1C.transpose(1, 2), self.layer_idx)
        output = self.out_proj(F.silu(gate_BSC) * mixed_BSC)
        return padding.back(output) if padding else output
