"""The three sublayers of Samba and their norm, cut over tensor- and context-parallel ranks (arXiv 2406.07522, 2.1).

Activations are [sequence, batch, width] between sublayers and [batch, sequence, ...] inside the mixers' kernels; both
are views of the same memory. S: sequence, B: batch, D: Mamba's channels, N: its states, H: heads.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sambalm.model import initialization as init
from sambalm.model.config import ModelConfig
from sambalm.model.heads import HeadShare, share_heads
from sambalm.model.ops.documents import Documents
from sambalm.model.ops.registry import Kernels
from sambalm.model.sequence_scan import context_parallel_scan
from sambalm.parallel.groups import ContextParallel, TensorParallel
from sambalm.parallel.layers.context_parallel import HaloExchange
from sambalm.parallel.layers.linear import linear, linear_beside, linear_parts
from sambalm.parallel.layers.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_region,
    reduce_from_region,
    replicated_weight,
)
from sambalm.parallel.shard import Shard, shard
from sambalm.parallel.sharding import replicated_parameter, sharded_parameter


@dataclass(frozen=True)
class SequenceContext:
    """What the sublayers need to know of the batch besides its activations."""

    rotary: tuple[Tensor, Tensor]  # cosines and sines of this rank's positions, fp32 [S, B or 1, 1, head dim / 2]
    cp: ContextParallel  # where this rank's part of the sequence lies
    documents: Documents | None = None  # of packed sequences, where states and attention end with them

    @property
    def resets(self) -> Tensor | None:
        return self.documents.resets if self.documents else None


class RMSNorm(nn.Module):
    """Root-mean-square norm of the residual stream before each sublayer and the head, after the last one's sum."""

    def __init__(self, config: ModelConfig, *, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        self.tp, self.eps, self.kernel = tp, config.norm_eps, kernels.norm
        self.weight = replicated_parameter((config.hidden_size,), name="weight", init=init.ones, tp=tp)

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream x with what the sublayer before adds to it (None: nothing), and that normed."""
        return self.kernel(x, branch, replicated_weight(self.weight, self.tp), eps=self.eps)


class MambaMixer(nn.Module):
    """Mamba-1 with its channels cut over ranks (arXiv 2312.00752, section 3.4)."""

    def __init__(self, config: ModelConfig, *, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        width, rank, states = config.hidden_size, config.dt_rank_size, config.d_state
        channels = shard(config.inner_size, tp)
        self.kernels = kernels
        self.state_sizes = [rank, states, states]
        self.in_proj = ColumnParallelLinear(width, {"x": channels, "z": channels}, tp=tp, init=init.linear(width))
        self.conv = CausalConv(channels, config.d_conv, kernels=kernels)
        self.x_proj = StateProjection(channels, rank + 2 * states, tp=tp)
        self.dt_proj = StepProjection(rank, channels, bias_init=init.dt_bias(config))
        self.A_log = sharded_parameter((0, states), {"A_log": channels}, init=init.a_log)
        self.D = sharded_parameter((0,), {"D": channels}, init=init.ones)
        self.out_proj = RowParallelLinear(channels, width, tp=tp, init=init.residual_linear(channels.size, config))

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        x_SBD, z_SBD = self.in_proj(x)
        u_SBD = self.conv(x_SBD.transpose(0, 1), context).transpose(0, 1)
        # Projections take the memory's order; of another view they would make a copy.
        u_SBD, projected = self.x_proj(u_SBD)
        dt, B, C = projected.split(self.state_sizes, dim=-1)
        dt, dt_bias = self.dt_proj(dt)
        u_BSD, dt_BSD, B, C, z_BSD = (t.transpose(0, 1) for t in (u_SBD, dt, B, C, z_SBD))
        A, resets = -torch.exp(self.A_log), context.resets
        scan = partial(self.kernels.scan, u_BSD, dt_BSD, A, B, C, D=self.D, z=z_BSD, dt_bias=dt_bias, resets=resets)
        y_BSD = context_parallel_scan(scan, dt=dt_BSD, A=A, dt_bias=dt_bias, resets=resets, cp=context.cp)
        return self.out_proj(y_BSD.transpose(0, 1))


class CausalConv(nn.Module):
    """Mamba's depthwise convolution and SiLU over this rank's channels."""

    def __init__(self, channels: Shard, taps: int, *, kernels: Kernels) -> None:
        super().__init__()
        self.kernel, self.taps = kernels.conv, taps
        self.weight = sharded_parameter((0, taps), {"weight": channels}, init=init.linear(taps))
        self.bias = sharded_parameter((0,), {"bias": channels}, init=init.linear(taps))

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Tensor:
        if context.cp.size == 1:
            return self.kernel(x_BSD, self.weight, self.bias, resets=context.resets)
        reach = self.taps - 1
        neighbours = HaloExchange(x_BSD, reach, cp=context.cp)
        y_BSD = self.kernel(x_BSD, self.weight, self.bias, resets=context.resets)
        before = neighbours.wait()
        start = torch.cat((before, x_BSD[:, :reach]), dim=1)  # the tokens that see a neighbour's
        resets = context.documents.resets_from(before.shape[1])[:, : start.shape[1]] if context.documents else None
        y_start = self.kernel(start, self.weight, self.bias, resets=resets)
        y_SBD = torch.cat((y_start[:, before.shape[1] :].transpose(0, 1), y_BSD[:, reach:].transpose(0, 1)))
        return y_SBD.transpose(0, 1)  # so that it lies in memory as without neighbours


class StateProjection(nn.Module):
    """Mamba's x_proj: every rank contributes its channels and all need the whole result.

    Not a RowParallelLinear, which would scatter the result under sequence parallelism. The result feeds each rank's own
    channels, so its gradient is a sum over ranks as well.
    """

    def __init__(self, channels: Shard, out_features: int, *, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = sharded_parameter(
            (out_features, 0), {"weight": channels}, init=init.linear(channels.size), dim=1, matmul_only=True
        )

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u for the scan, and its projection."""
        u, partial = linear_beside(u, self.weight)
        return u, copy_to_region(reduce_from_region(partial, self.tp), self.tp)


class StepProjection(nn.Module):
    """Mamba's dt_proj to this rank's channels. The bias stays fp32 and is added by the scan."""

    def __init__(self, rank: int, channels: Shard, *, bias_init: init.Init) -> None:
        super().__init__()
        self.weight = sharded_parameter((0, rank), {"weight": channels}, init=init.linear(rank), matmul_only=True)
        self.bias = sharded_parameter((0,), {"bias": channels}, init=bias_init)

    def forward(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        return linear(dt, self.weight), self.bias


class QKVProjection(nn.Module):
    """Queries, keys and values of this rank's heads in one matrix product.

    Keys and values have a parameter of their own, since ranks may hold copies of a kv head: its gradient is then the
    sum over the copies, each of which serves other query heads.
    """

    def __init__(self, config: ModelConfig, share: HeadShare, *, tp: TensorParallel) -> None:
        super().__init__()
        width, weights = config.hidden_size, init.linear(config.hidden_size)
        self.tp, self.copies = tp, tp.copies(share.kv_copies)
        self.local_sizes = [[share.query.length], [share.kv.length, share.kv.length]]
        self.query = sharded_parameter((0, width), {"q.weight": share.query}, init=weights, matmul_only=True)
        parts, alone = {"k.weight": share.kv, "v.weight": share.kv}, share.kv_copies == 1
        self.key_value = sharded_parameter((0, width), parts, init=weights, owned=share.owns_kv, matmul_only=alone)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        key_value = copy_to_region(self.key_value, self.copies)
        return linear_parts(x, self.query, key_value, sizes=self.local_sizes, tp=self.tp)


class WindowAttention(nn.Module):
    """Causal sliding-window attention with rotary positions and grouped queries; heads are cut over ranks."""

    def __init__(self, config: ModelConfig, *, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        width, share = config.hidden_size, share_heads(config, tp)
        self.head_dim, self.window, self.kernel = config.head_dim, config.window, kernels.attention
        self.rotary = kernels.elementwise.rotary
        self.qkv_proj = QKVProjection(config, share, tp=tp)
        self.o_proj = RowParallelLinear(share.query, width, tp=tp, init=init.residual_linear(width, config))

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        q_SBHd, k_SBHd, v_SBHd = (t.unflatten(-1, (-1, self.head_dim)) for t in self.qkv_proj(x))
        q_SBHd, k_SBHd = (self.rotary(t, *context.rotary) for t in (q_SBHd, k_SBHd))
        q_BHSd, k_BHSd, v_BHSd = (t.permute(1, 2, 0, 3) for t in (q_SBHd, k_SBHd, v_SBHd))
        if context.cp.size == 1:
            y_SBHd = self._attend(q_BHSd, k_BHSd, v_BHSd, context, first=0)
        else:
            y_SBHd = self._attend_over_parts(q_BHSd, k_BHSd, v_BHSd, context)
        return self.o_proj(y_SBHd.flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: SequenceContext, *, first: int) -> Tensor:
        """[queries, B, H, d] of the part's queries from `first` on, with keys that end with them."""
        queries, documents = q.shape[2], None
        if context.documents:
            numbers = range(first, first + queries)
            documents = context.documents.attention(numbers, keys_before=k.shape[2] - queries)
        return self.kernel(q, k, v, window=self.window, documents=documents).permute(2, 0, 1, 3)

    def _attend_over_parts(self, q: Tensor, k: Tensor, v: Tensor, context: SequenceContext) -> Tensor:
        """The same of a context-parallel rank: queries that only see its own keys are computed while others arrive."""
        # Queries that see neighbours' keys. Where most do, the others would not fill the time until those arrive.
        near = self.window - 1 if q.shape[2] >= 2 * (self.window - 1) else q.shape[2]
        kv_BSHd = torch.cat((k, v), dim=1).transpose(1, 2)  # one message instead of two
        neighbours = HaloExchange(kv_BSHd, self.window - 1, cp=context.cp)
        near_q, far_q = q.split([near, q.shape[2] - near], dim=2)
        parts = []
        if far_q.shape[2]:
            parts.append(self._attend(far_q, *kv_BSHd.transpose(1, 2).chunk(2, dim=1), context, first=near))
        if near:
            near_kv = torch.cat((neighbours.wait(), kv_BSHd[:, :near]), dim=1).transpose(1, 2)
            parts.append(self._attend(near_q, *near_kv.chunk(2, dim=1), context, first=0))
        return torch.cat(parts[::-1])


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)); the inner width is cut over ranks."""

    def __init__(self, config: ModelConfig, *, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        width, inner = config.hidden_size, shard(config.mlp_size, tp)
        self.kernel = kernels.elementwise.swiglu
        self.gate_up_proj = ColumnParallelLinear(width, {"gate": inner, "up": inner}, tp=tp, init=init.linear(width))
        self.down_proj = RowParallelLinear(inner, width, tp=tp, init=init.residual_linear(inner.size, config))

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        return self.down_proj(self.kernel(*self.gate_up_proj(x)))
