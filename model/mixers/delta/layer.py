"""Gated DeltaNet (arXiv 2412.06464) and Kimi Delta Attention (arXiv 2510.26692), heads dealt to tensor-parallel ranks.

S: sequence, B: batch, H: heads, K and V: channels of a key and a value, D: of all queries, keys and values.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sambalm.model import initialization as init
from sambalm.model.causal_conv import CausalConv
from sambalm.model.config import ModelConfig
from sambalm.model.mixers.context import SequenceContext
from sambalm.model.mixers.delta.sizes import GatedDeltaNetSizes
from sambalm.model.mixers.whole_heads import HeadShare, share_heads
from sambalm.model.norm import GatedHeadNorm
from sambalm.model.ops.registry import Kernels
from sambalm.parallel.groups import ContextParallel, TensorParallel
from sambalm.parallel.layers.context_parallel import after, incoming_matrix_state
from sambalm.parallel.layers.linear import linear, linear_parts
from sambalm.parallel.layers.tensor_parallel import RowParallelLinear, copy_to_region
from sambalm.parallel.shard import Shard
from sambalm.parallel.sharding import sharded_parameter

LOWEST_RATE, HIGHEST_RATE = 1e-4, 16.0  # of Gated DeltaNet's decays; uniform, and not quite from zero
LOWEST_KIMI_RATE = 1.0


class InputProjection(nn.Module):
    """Queries, keys, values, the output's gate, and the numbers a and b of each head, in one matrix product."""

    def __init__(self, width: int, share: HeadShare, *, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.count = tp, share.heads.length
        wide = {"q.weight": share.key, "k.weight": share.key, "v.weight": share.value, "g.weight": share.value}
        numbers = {"a.weight": share.numbers, "b.weight": share.numbers}
        weights = init.linear(width)
        self.wide = sharded_parameter((0, width), wide, init=weights, matmul_only=True, takes_fp8=True)
        self.numbers = sharded_parameter((0, width), numbers, init=weights, matmul_only=True)
        self.sizes = [[2 * share.key.length + share.value.length, share.value.length], [share.numbers.held] * 2]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Takes the stream to [S, B, D], the gate [S, B, values of the rank], and a and b [S, B, H]."""
        qkv, gate, a, b = linear_parts(x, self.wide, self.numbers, sizes=self.sizes, tp=self.tp)
        return qkv, gate, a[..., : self.count], b[..., : self.count]


class KimiInputProjection(nn.Module):
    """Queries, keys, values and beta, and through a few channels a decay of each key's and a gate of each value's.

    Every rank holds the whole way down, and uses it for its own heads: its gradient is a sum over the ranks.
    """

    def __init__(self, width: int, rank: int, share: HeadShare, *, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.count = tp, share.heads.length
        wide = {"q.weight": share.key, "k.weight": share.key, "v.weight": share.value}
        whole, weights, alone = Shard(rank, 0, rank), init.linear(width), tp.size == 1
        down, up = {"f_down.weight": whole, "g_down.weight": whole}, init.linear(rank)
        self.wide = sharded_parameter((0, width), wide, init=weights, matmul_only=True, takes_fp8=True)
        self.numbers = sharded_parameter((0, width), {"b.weight": share.numbers}, init=weights, matmul_only=True)
        self.down = sharded_parameter((0, width), down, init=weights, owned=tp.rank == 0, matmul_only=alone)
        self.f_up = sharded_parameter((0, rank), {"f_up.weight": share.key}, init=up, matmul_only=True)
        self.g_up = sharded_parameter((0, rank), {"g_up.weight": share.value}, init=up, matmul_only=True)
        self.sizes = [[2 * share.key.length + share.value.length], [share.numbers.held], [rank, rank]]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Takes the stream to [S, B, D], the gate [S, B, values], decays [S, B, keys] and beta [S, B, H]."""
        down = copy_to_region(self.down, self.tp)
        qkv, b, f, g = linear_parts(x, self.wide, self.numbers, down, sizes=self.sizes, tp=self.tp)
        return qkv, linear(g, self.g_up), linear(f, self.f_up), b[..., : self.count]


class DeltaLayer(nn.Module):
    """A layer with the gated delta rule.

    Args:
        per_channel: whether each channel of a key has a decay of its own, as Kimi Delta Attention has; else each head.
    """

    def __init__(
        self,
        config: ModelConfig,
        sizes: GatedDeltaNetSizes,
        *,
        per_channel: bool,
        tp: TensorParallel,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        width, share = config.hidden_size, share_heads(sizes, tp)
        self.per_channel, self.kernel = per_channel, kernels.delta_rule
        self.head_dim, self.value_dim = sizes.head_dim, sizes.value_dim
        self.widths = [share.key.length, share.key.length, share.value.length]
        if per_channel:
            self.in_proj: nn.Module = KimiInputProjection(width, sizes.value_dim, share, tp=tp)
        else:
            self.in_proj = InputProjection(width, share, tp=tp)
        convolved = {"q.": share.key, "k.": share.key, "v.": share.value}
        self.conv = CausalConv(convolved, sizes.d_conv, kernels=kernels, has_bias=False)
        rates = init.log_uniform(LOWEST_KIMI_RATE if per_channel else LOWEST_RATE, HIGHEST_RATE)
        self.A_log = sharded_parameter((0,), {"A_log": share.heads}, init=rates)
        steps = share.key if per_channel else share.heads
        self.dt_bias = sharded_parameter((0,), {"dt_bias": steps}, init=init.dt_bias(sizes))
        activation = "sigmoid" if per_channel else "silu"
        self.norm = GatedHeadNorm(sizes.value_dim, eps=config.norm_eps, activation=activation, tp=tp, kernels=kernels)
        self.out_proj = RowParallelLinear(
            share.value, width, tp=tp, init=init.residual_linear(share.value.size, config)
        )

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        qkv_SBD, gate_SBD, decay, beta_SBH = self.in_proj(x)
        qkv_BSD = self.conv(qkv_SBD.transpose(0, 1), context)
        q, k, v = qkv_BSD.split(self.widths, dim=-1)
        q, k, v = (
            t.unflatten(-1, (-1, size)) for t, size in ((q, self.head_dim), (k, self.head_dim), (v, self.value_dim))
        )
        dt_bias = self.dt_bias
        if self.per_channel:
            decay, dt_bias = (t.unflatten(-1, (-1, self.head_dim)) for t in (decay, dt_bias))

        def rule(v: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            gates = (decay.transpose(0, 1), beta_SBH.transpose(0, 1))
            options = {"A_log": self.A_log, "dt_bias": dt_bias, "resets": context.resets}
            return self.kernel(q, k, v, *gates, initial_state=initial_state, **options)

        y_BSHV = context_parallel_rule(rule, v, key_dim=self.head_dim, cp=context.cp)
        gate_SBHV = gate_SBD.unflatten(-1, (-1, self.value_dim))
        return self.out_proj(self.norm(y_BSHV.transpose(0, 1), gate_SBHV).flatten(2))


def context_parallel_rule(
    rule: Callable[..., tuple[Tensor, Tensor]], v: Tensor, *, key_dim: int, cp: ContextParallel
) -> Tensor:
    """The rule over this rank's part of the sequence, going on from the states that the ranks before it reach.

    Over its part a rank's state becomes transition @ state + reached. The rule finds both in one run: from zero it
    reaches the second, and where values are zero it takes the unit matrix to the first. What is sent is a matrix
    [K, K + V] a head, however long the sequence. The first rank's state is zero, and nobody goes on from the last
    rank's: both run once, the others twice.

    Args:
        rule: of values and an initial state, with all other arguments of a kernel.
        v: [batch, this rank's tokens, H, V].
    """
    if cp.size == 1:
        return rule(v)[0]
    batch, length, heads, value_dim = v.shape
    work = torch.promote_types(v.dtype, torch.float32)
    empty = torch.zeros(batch, heads, key_dim, value_dim + key_dim, dtype=work, device=v.device, requires_grad=True)
    if cp.rank == 0:
        y, reached = rule(v)
        return after(y, incoming_matrix_state(empty[..., value_dim:], reached, cp=cp))
    state = empty
    if cp.rank < cp.size - 1:
        unit = torch.eye(key_dim, dtype=work, device=v.device).expand(batch, heads, -1, -1)
        wide = torch.cat((v, v.new_zeros(batch, length, heads, key_dim)), dim=-1)
        state = rule(wide, torch.cat((empty[..., :value_dim].detach(), unit), dim=-1))[1]
    reached, transition = state.split([value_dim, key_dim], dim=-1)
    return rule(v, incoming_matrix_state(transition, reached, cp=cp))[0]
