"""Window attention for one token a row."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sambalm.model.hf.layer_steps import LayerStep, plain
from sambalm.model.mixers.attention.hf import SambaAttention
from sambalm.model.ops.decode.attention import RingAttention
from sambalm.model.ops.decode.linear import Norm, ResidualStream, RowLinear, Workspace, activations


class AttentionStep(LayerStep):
    """Three kernels: norm and qkv_proj; rotation, attention and the token's way into the ring; o_proj."""

    def __init__(self, layer: SambaAttention, norm: Norm, workspace: Workspace) -> None:
        super().__init__(layer, norm, workspace)
        config, rows = layer.config, workspace.rows
        weights = [plain(projection) for projection in (layer.q_proj, layer.k_proj, layer.v_proj)]
        self.qkv_proj = RowLinear(*weights, workspace=workspace)
        self.o_proj = RowLinear(plain(layer.o_proj), workspace=workspace)
        ring = (rows, config.num_key_value_heads, config.sliding_window, config.head_dim)
        self.keys, self.values = weights[0].new_zeros(ring), weights[0].new_zeros(ring)
        self.attend = RingAttention(
            self.keys,
            self.values,
            workspace,
            query_heads=config.num_attention_heads,
            rotary_base=config.rotary_base,
        )
        self.qkv = activations(rows, self.qkv_proj.columns, like=weights[0])
        self.y = activations(rows, config.hidden_size, like=weights[0])

    def __call__(self, stream: ResidualStream, positions: Tensor, following: Tensor) -> None:
        self.qkv_proj.of_stream(stream, self.qkv, eps=self.norm.eps)
        self.attend(self.qkv, positions, self.y)
        self.o_proj.into_stream(self.y, stream, following)

    def load(self, state: Mapping[str, Tensor], seen_tokens: list[int]) -> None:
        for ring, name in ((self.keys, "keys"), (self.values, "values")):
            if name not in state:
                continue
            for row, (seen, tokens) in enumerate(zip(seen_tokens, state[name], strict=True)):
                kept = min(seen, ring.shape[2] - 1)
                places = torch.arange(seen - kept, seen, device=ring.device) % ring.shape[2]
                ring[row, :, places] = tokens[:, tokens.shape[1] - kept :]

    def state(self, seen_tokens: list[int]) -> dict[str, Tensor]:
        window = self.keys.shape[2]
        longest = min(max(seen_tokens), window - 1)
        places = [torch.arange(seen - longest, seen, device=self.keys.device) % window for seen in seen_tokens]
        named = {"keys": self.keys, "values": self.values}
        state = {}
        for name, ring in named.items():
            rows = []
            for row, (seen, at) in enumerate(zip(seen_tokens, places, strict=True)):
                tokens = ring[row, :, at]
                missing = longest - min(seen, longest)
                rows.append(torch.cat((torch.zeros_like(tokens[:, :missing]), tokens[:, missing:]), dim=1))
            state[name] = torch.stack(rows)
        return state
