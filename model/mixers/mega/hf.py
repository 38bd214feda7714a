"""Mega-S6 in the Hugging Face format, in PyTorch alone.

Between calls the cache holds the last inputs of the convolution, the scan's state, and the keys and values of the last
chunk_tokens - 1 tokens, of which the next ones see those of their own chunk. The convolution's inputs, keys and values
lie in one tensor, as the cache has one beside the recurrent state.
B: batch, S: sequence, D: width, Z: channels of queries and keys, H: heads, C: tokens of a chunk.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from sambalm.model.hf.configuration_samba import SambaConfig
from sambalm.model.hf.layers import (
    BEFORE_ALL_TOKENS,
    SambaLayer,
    SequenceContext,
    carried_states,
    init_step_bias,
    last_tokens,
)
from sambalm.model.ops.reference.window_attention import rotary_tables

POSITION_BASE, POSITION_STD = 10_000.0, 0.02  # as the layer's that trains

# Before the softplus, a step this negative is exactly 0 whatever its bias: the state stays as it is.
NO_STEP = -1e4


class FirstKeys(NamedTuple):
    """The chunks of a call, as window_attention takes documents."""

    first_keys: Tensor  # int64 [B, S]: the place among the keys of the first one that a query may see


class Before(NamedTuple):
    """What a layer keeps of the tokens before a call."""

    inputs: Tensor  # of the convolution, [B, d_conv - 1, D]
    keys_and_values: Tensor  # side by side, [B, C - 1, 2 Z + D]
    scan_state: Tensor | None


class SambaMega(SambaLayer):
    """Mega (arXiv 2209.10655, section 3) with S6 in the place of its moving average (arXiv 2406.07522)."""

    isolates_documents = takes_stream = True

    def __init__(self, config: SambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        sizes, width = config.sizes("mega"), config.hidden_size
        self.sizes, self.key_dim, self.chunk_tokens = sizes, sizes["key_dim"], sizes["chunk_tokens"]
        rank, states = sizes["dt_rank"] or math.ceil(width / 32), sizes["d_state"]
        self.state_sizes = [rank, states, states]
        self.conv1d = nn.Conv1d(width, width, sizes["d_conv"], groups=width)
        self.x_proj = nn.Linear(width, sum(self.state_sizes), bias=False)
        self.dt_proj = nn.Linear(rank, width)
        self.A_log, self.D = nn.Parameter(torch.zeros(width, states)), nn.Parameter(torch.ones(width))
        self.in_proj, self.z_proj = nn.Linear(width, 3 * width), nn.Linear(width, self.key_dim)
        self.v_proj, self.h_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.qk_scale, self.qk_position = (nn.Parameter(torch.zeros(2 * self.key_dim)) for _ in range(2))
        self.q_bias = nn.Parameter(torch.zeros(self.key_dim))

    def init_weights(self) -> None:
        """Fills what is no product's weight; see sambalm.model.mixers.mega.layer."""
        sizes, bound = self.sizes, 1 / math.sqrt(self.sizes["d_conv"])
        init.uniform_(self.conv1d.weight, -bound, bound)
        init.uniform_(self.conv1d.bias, -bound, bound)
        init.copy_(self.A_log, torch.arange(1.0, sizes["d_state"] + 1).log().expand_as(self.A_log))
        init.ones_(self.D)
        init_step_bias(self.dt_proj.bias, smallest=sizes["dt_min"], largest=sizes["dt_max"], floor=sizes["dt_floor"])
        for projection in (self.in_proj, self.z_proj, self.v_proj, self.h_proj):
            init.zeros_(projection.bias)
        init.zeros_(self.q_bias)
        init.normal_(self.qk_scale, std=POSITION_STD)
        init.normal_(self.qk_position, std=POSITION_STD)

    def forward(self, hidden_states: Tensor, context: SequenceContext, stream: Tensor | None = None) -> Tensor:
        """Maps hidden_states and the stream, both [B, S, width], to the same; updates the context's cache."""
        assert stream is not None, "the model gives the stream to a layer that takes it"
        padding = context.padding
        x, before = hidden_states, self._before(context, like=hidden_states)
        if padding:
            x, stream = padding.front(x), padding.front(stream)
        moved, scan_state = self._moved(x, before, context)
        mixed = F.silu(moved)
        update, reset, hidden = self.in_proj(mixed).chunk(3, dim=-1)
        places = self._places(context)
        q, k = self._queries_and_keys(F.silu(self.z_proj(mixed)), places)
        new = torch.cat((k, F.silu(self.v_proj(x))), dim=-1)
        y = self._attend(q, torch.cat((before.keys_and_values, new), dim=1), places, context)
        if context.cache is not None:
            inputs = last_tokens(before.inputs, x, padding, count=before.inputs.shape[1])
            kept = last_tokens(before.keys_and_values, new, padding, count=self.chunk_tokens - 1)
            packed = torch.cat((F.pad(inputs, (0, 2 * self.key_dim)), kept), dim=1)
            context.cache.update_conv_state(packed.transpose(1, 2), self.layer_idx)
            context.cache.update_recurrent_state(scan_state, self.layer_idx)
        candidate = F.silu(hidden + self.h_proj(context.operations.swiglu(reset, y)))
        output = update.sigmoid() * (candidate - stream)
        return padding.back(output) if padding else output

    def _before(self, context: SequenceContext, *, like: Tensor) -> Before:
        packed, scan_state = carried_states(context.cache, self.layer_idx)
        taps, (rows, _, width) = self.sizes["d_conv"] - 1, like.shape
        if packed is None:
            packed = like.new_zeros(rows, 2 * self.key_dim + width, taps + self.chunk_tokens - 1)
        tokens = packed.transpose(1, 2).to(like.dtype)
        return Before(tokens[:, :taps, :width], tokens[:, taps:], scan_state)

    def _moved(self, x: Tensor, before: Before, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """Returns the scan's output [B, S, D] and its state after the last token."""
        resets = None if context.resets is None else context.resets.expand(len(x), -1)
        weight, operations = self.conv1d.weight.squeeze(1), context.operations
        u = operations.causal_conv_silu(x, weight, self.conv1d.bias, before.inputs, resets=resets)
        dt, B, C = self.x_proj(u).split(self.state_sizes, dim=-1)
        dt, work = F.linear(dt, self.dt_proj.weight), torch.promote_types(x.dtype, torch.float32)
        if context.padding:
            dt = dt.masked_fill(~context.padding.real[..., None], NO_STEP)
        A, D, dt_bias = -torch.exp(self.A_log.to(work)), self.D.to(work), self.dt_proj.bias.to(work)
        return operations.gated_selective_scan(
            u, dt, A, B, C, D=D, z=None, dt_bias=dt_bias, initial_state=before.scan_state, resets=resets
        )

    def _places(self, context: SequenceContext) -> Tensor:
        """Returns each token's place in its chunk, int64 [B or 1, S] in the order of `Padding.front`."""
        positions, padding = context.positions, context.padding
        assert positions is not None, "the model gives all layers the tokens' positions"
        if padding:
            positions = positions.expand(len(padding.order), -1).take_along_dim(padding.order, dim=1)
        return positions % self.chunk_tokens

    def _queries_and_keys(self, z: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Returns queries and keys [B, S, 2 Z] of z [B, S, Z]: its channels, and those that make the bias."""
        work, channels = torch.promote_types(z.dtype, torch.float32), self.key_dim
        (q_scale, k_scale), position = self.qk_scale.to(work).chunk(2), self.qk_position.to(work).view(2, channels)
        cos, sin = (t.unsqueeze(2) for t in rotary_tables(places, head_dim=channels, base=POSITION_BASE))
        first, second = position.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        # The attention divides scores by sqrt(2 Z), where the product of q and k takes sqrt(Z), and the bias nothing.
        z_work, root = z.to(work), math.sqrt(2 * channels)
        scaled = ((z_work * q_scale + self.q_bias.to(work)) * math.sqrt(2), z_work * k_scale)
        turned = (rotated[:, :, 0] * root, rotated[:, :, 1])
        pairs = zip(scaled, turned, strict=True)
        q, k = (torch.cat((own, bias.expand(len(z), -1, -1)), dim=-1).to(z.dtype) for own, bias in pairs)
        return q, k

    def _attend(self, q: Tensor, keys_and_values: Tensor, places: Tensor, context: SequenceContext) -> Tensor:
        """Returns [B, S, D] of queries [B, S, 2 Z], with keys and values that begin C - 1 tokens before them."""
        k, v = keys_and_values.split([q.shape[2], keys_and_values.shape[2] - q.shape[2]], dim=2)
        numbers = torch.arange(q.shape[1], device=q.device)
        first_keys = numbers - places
        if context.resets is not None:
            starts = torch.where(context.resets, numbers, BEFORE_ALL_TOKENS).cummax(dim=1).values
            first_keys = torch.maximum(first_keys, starts)
        chunks = FirstKeys((first_keys + self.chunk_tokens - 1).expand(len(q), -1))
        v = v.unflatten(2, (-1, q.shape[2])).transpose(1, 2)
        q, k = (t.unsqueeze(1).expand(-1, v.shape[1], -1, -1) for t in (q, k))
        y = context.operations.window_attention(q, k, v, window=self.chunk_tokens, documents=chunks)
        return y.transpose(1, 2).flatten(2)
