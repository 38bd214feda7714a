"""Mega (arXiv 2209.10655, section 3) with S6 in the place of its moving average (arXiv 2406.07522, section 3.1).

    m = SiLU(S6(x))     z = SiLU(m Wz)     q = z * gamma_q + beta     k = z * gamma_k     v = SiLU(x Wv)
    y = softmax(q k' / sqrt(Z) + bias of the distance) v          h = SiLU(m Wh + (SiLU(m Wr) * y) Uh)
    what comes out is sigmoid(m Wu) * h + (1 - sigmoid(m Wu)) * stream

All products have biases. Mega's keys have one too, which is left out: it adds one number to all scores of a query, so
that the softmax and every gradient are the same without it. The attention is causal and stays within a chunk of tokens;
chunks begin with the sequence or the document. The bias of a distance is the product of two learnt vectors, each turned
by its position. So it is the product of further channels of queries and keys, which the kernels of the window attention
compute as they are.

S: sequence, B: batch, D: width, Z: channels of queries and keys, H: heads, which share queries and keys.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sambalm.model import initialization as init
from sambalm.model.causal_conv import CausalConv
from sambalm.model.config import ModelConfig
from sambalm.model.mixers.context import SequenceContext
from sambalm.model.mixers.mega.sizes import MegaSizes, pieces_of
from sambalm.model.ops.documents import AttentionDocuments
from sambalm.model.ops.registry import Kernels
from sambalm.model.selective_scan import StateProjection, StepProjection, context_parallel_scan
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.layers.context_parallel import HaloExchange
from sambalm.parallel.layers.linear import linear_parts
from sambalm.parallel.shard import Shard
from sambalm.parallel.sharding import sharded_parameter

POSITION_STD = 0.02  # of the initial scales of queries and keys, and of the vectors that make the bias (reference code)


class MegaLayer(nn.Module):
    """One layer, whole on a rank: it takes the stream besides the normed stream."""

    def __init__(
        self, config: ModelConfig, sizes: MegaSizes, *, letter: str, tp: TensorParallel, kernels: Kernels
    ) -> None:
        super().__init__()
        width, key = config.hidden_size, sizes.key_dim
        self.letter, self.chunk_tokens, self.heads = letter, sizes.chunk_tokens, sizes.heads(width)
        self.kernel, self.rotary, self.swiglu = (
            kernels.attention,
            kernels.elementwise.rotary,
            kernels.elementwise.swiglu,
        )
        self.s6 = S6(width, sizes, tp=tp, kernels=kernels)
        self.in_proj = BiasedLinear(width, {"update.": width, "reset.": width, "hidden.": width, "shared.": key})
        self.v_proj = BiasedLinear(width, {"": width})
        self.scale, self.position = (
            sharded_parameter(
                (0,), {f"query_{name}": whole(key), f"key_{name}": whole(key)}, init=init.normal(POSITION_STD)
            )
            for name in ("scale", "position")
        )
        self.bias = sharded_parameter((0,), {"query_bias": whole(key)}, init=init.zeros)
        # Not smaller than others, as projections that write the stream are: an activation and a gate stand between.
        self.h_proj = BiasedLinear(width, {"": width})

    def forward(self, x: Tensor, context: SequenceContext, stream: Tensor) -> Tensor:
        mixed = F.silu(self.s6(x, context))
        update, reset, hidden, shared = self.in_proj(mixed)
        (v,) = self.v_proj(x)
        q, k = self._queries_and_keys(F.silu(shared), context)
        y = self._attend(q, k, F.silu(v), context)
        (attended,) = self.h_proj(self.swiglu(reset, y))
        return update.sigmoid() * (F.silu(hidden + attended) - stream)

    def _queries_and_keys(self, z: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """Queries and keys [S, B, 2 Z] of z [S, B, Z]: its channels, and those that make the bias."""
        work, channels = torch.promote_types(z.dtype, torch.float32), z.shape[-1]
        z_work, (cos, sin) = z.to(work), context.shared[self.letter]
        (q_scale, k_scale), (q_position, k_position) = (t.chunk(2) for t in (self.scale, self.position))
        # Kernels divide scores by sqrt(2 Z), where the product of q and k takes sqrt(Z), and the bias nothing.
        q, k = z_work * (q_scale * math.sqrt(2)) + self.bias * math.sqrt(2), z_work * k_scale
        positions = torch.stack((q_position * math.sqrt(2 * channels), k_position))
        rotated = self.rotary(positions.view(1, 1, 2, channels), cos, sin).expand(-1, z.shape[1], -1, -1)
        q, k = (torch.cat(pair, dim=-1).to(z.dtype) for pair in zip((q, k), rotated.unbind(2), strict=True))
        return q, k

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: SequenceContext) -> Tensor:
        """Maps queries and keys [S, B, 2 Z] and values [S, B, D] to [S, B, D]."""
        tokens, cp, documents = len(q), context.cp, context.documents
        if cp.size > 1 and (documents or tokens % self.chunk_tokens):
            kv = torch.cat((k, v), dim=-1)
            arrived = HaloExchange(kv.transpose(0, 1), self.chunk_tokens - 1, cp=cp).wait()
            k, v = torch.cat((arrived.transpose(0, 1), kv)).split([k.shape[-1], v.shape[-1]], dim=-1)
        before = k.shape[0] - tokens
        if documents:
            pieces = documents.in_pieces(self.chunk_tokens).attention(range(tokens), keys_before=before)
            return self._call(q, k, v, window=self.chunk_tokens, documents=pieces)
        outputs, start = [], 0
        for piece in pieces_of(tokens, first=cp.rank * tokens, chunk_tokens=self.chunk_tokens):
            stop = start + piece.chunks * piece.queries
            first_key = before + start - piece.before
            keys, values = (t[first_key : before + stop] for t in (k, v))
            window = piece.before + piece.queries
            outputs.append(self._call(q[start:stop], keys, values, window=window, chunks=piece.chunks))
            start = stop
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int,
        chunks: int = 1,
        documents: AttentionDocuments | None = None,
    ) -> Tensor:
        """The kernel's output [S, B, D], of chunks of one length as rows of a batch."""
        rows = (self._rows(t, chunks) for t in (q, k, v))
        y_SBD = self.kernel(*rows, window=window, documents=documents).permute(2, 0, 1, 3).flatten(2)
        return y_SBD.unflatten(1, (chunks, -1)).transpose(0, 1).flatten(0, 1)

    def _rows(self, t: Tensor, chunks: int) -> Tensor:
        """Chunks of [S, B, channels] as [chunks * B, H, S / chunks, 2 Z]; each head has the same queries and keys."""
        t = t.unflatten(0, (chunks, -1)).transpose(0, 1).flatten(1, 2).unflatten(-1, (-1, len(self.scale)))
        return t.expand(-1, -1, self.heads, -1).contiguous().permute(1, 2, 0, 3)


class S6(nn.Module):
    """A short convolution and the selective scan of Mamba-1, as wide as the stream and without its gate."""

    def __init__(self, width: int, sizes: MegaSizes, *, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        channels, rank, states = whole(width), sizes.step_rank(width), sizes.d_state
        self.kernel, self.state_sizes = kernels.scan, [rank, states, states]
        self.conv = CausalConv({"": channels}, sizes.d_conv, kernels=kernels)
        self.x_proj = StateProjection(channels, rank + 2 * states, tp=tp)
        self.dt_proj = StepProjection(rank, channels, bias_init=init.dt_bias(sizes))
        self.A_log = sharded_parameter((0, states), {"A_log": channels}, init=init.a_log, weight_decay=False)
        self.D = sharded_parameter((0,), {"D": channels}, init=init.ones)

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """Maps the normed stream [S, B, D] to the same shape."""
        u_SBD = self.conv(x.transpose(0, 1), context).transpose(0, 1)
        u_SBD, projected = self.x_proj(u_SBD)
        dt, B, C = projected.split(self.state_sizes, dim=-1)
        dt, dt_bias = self.dt_proj(dt)
        u_BSD, dt_BSD, B, C = (t.transpose(0, 1) for t in (u_SBD, dt, B, C))
        A, resets = -torch.exp(self.A_log), context.resets
        scan = partial(self.kernel, u_BSD, dt_BSD, A, B, C, D=self.D, z=None, dt_bias=dt_bias, resets=resets)
        y_BSD = context_parallel_scan(scan, dt=dt_BSD, A=A, dt_bias=dt_bias, resets=resets, cp=context.cp)
        return y_BSD.transpose(0, 1)


class BiasedLinear(nn.Module):
    """A linear layer with bias, whole on a rank.

    Args:
        parts: output features by the beginnings of their canonical names, all computed in one matrix product.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int]) -> None:
        super().__init__()
        self.sizes = list(parts.values())
        weights, biases = (
            {f"{name}{kind}": whole(size) for name, size in parts.items()} for kind in ("weight", "bias")
        )
        fill = init.linear(in_features)
        self.weight = sharded_parameter((0, in_features), weights, init=fill, matmul_only=True, takes_fp8=True)
        self.bias = sharded_parameter((0,), biases, init=init.zeros)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Takes [..., in] to one [..., features] for each part."""
        biases = self.bias.to(x.dtype).split(self.sizes)
        outputs = linear_parts(x, self.weight, sizes=[self.sizes])
        return tuple(output + bias for output, bias in zip(outputs, biases, strict=True))


def whole(size: int) -> Shard:
    """A dimension of which a rank holds all."""
    return Shard(size, 0, size)
