"""Gated linear attention (arXiv 2312.06635) and retention (arXiv 2307.08621), heads dealt to tensor-parallel ranks.

S: sequence, B: batch, H: heads, K and V: channels of a key and a value.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from sambalm.model import initialization as init
from sambalm.model.config import ModelConfig
from sambalm.model.mixers.context import SequenceContext
from sambalm.model.mixers.linear_attention.sizes import GLASizes, LinearAttentionSizes, RetNetSizes
from sambalm.model.mixers.whole_heads import HeadShare, share_heads
from sambalm.model.norm import GatedHeadNorm
from sambalm.model.ops.reference.linear_attention import gated_log_decays
from sambalm.model.ops.registry import Kernels
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.layers.context_parallel import scan_of_parts
from sambalm.parallel.layers.linear import linear, linear_parts
from sambalm.parallel.layers.tensor_parallel import RowParallelLinear, copy_to_region
from sambalm.parallel.shard import Shard
from sambalm.parallel.sharding import sharded_parameter


class InputProjection(nn.Module):
    """Queries, keys, values and the output's gate, in one matrix product."""

    def __init__(self, width: int, share: HeadShare, *, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        wide = {"q.weight": share.key, "k.weight": share.key, "v.weight": share.value, "g.weight": share.value}
        self.wide = sharded_parameter((0, width), wide, init=init.linear(width), matmul_only=True, takes_fp8=True)
        self.sizes = [[share.key.length] * 2 + [share.value.length] * 2]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Takes the stream to queries and keys [S, B, keys], values and the gate [S, B, values]."""
        return linear_parts(x, self.wide, sizes=self.sizes, tp=self.tp)


class GatedInputProjection(InputProjection):
    """The same, and the decays, which come through a few channels.

    Every rank holds the whole way down, and uses it for its own heads: its gradient is a sum over the ranks.
    """

    def __init__(self, width: int, rank: int, share: HeadShare, *, tp: TensorParallel) -> None:
        super().__init__(width, share, tp=tp)
        down, up = {"decay_down.weight": Shard(rank, 0, rank)}, {"decay_up.weight": share.key}
        alone = tp.size == 1
        self.down = sharded_parameter((0, width), down, init=init.linear(width), owned=tp.rank == 0, matmul_only=alone)
        self.up = sharded_parameter((0, rank), up, init=init.linear(rank), matmul_only=True)
        self.bias = sharded_parameter((0,), {"decay_up.bias": share.key}, init=init.zeros)
        self.sizes = [*self.sizes, [rank]]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Adds the logarithms of the decays, [S, B, keys] in fp32 (fp64 for fp64)."""
        weights = (self.wide, copy_to_region(self.down, self.tp))
        *wide, down = linear_parts(x, *weights, sizes=self.sizes, tp=self.tp)
        return *wide, gated_log_decays(linear(down, self.up), self.bias)


class _LinearAttention(nn.Module):
    """Linear attention, whose decays a subclass gives; heads are dealt to ranks."""

    def __init__(
        self,
        config: ModelConfig,
        sizes: LinearAttentionSizes,
        *,
        tp: TensorParallel,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        width, self.share = config.hidden_size, share_heads(sizes, tp)
        self.kernel, self.head_dim, self.value_dim = kernels.linear_attention, sizes.head_dim, sizes.value_dim
        self.in_proj = self._input(width, sizes, tp=tp)
        self.norm = GatedHeadNorm(sizes.value_dim, eps=config.norm_eps, activation="silu", tp=tp, kernels=kernels)
        value = self.share.value
        self.out_proj = RowParallelLinear(value, width, tp=tp, init=init.residual_linear(value.size, config))

    def _input(self, width: int, sizes: Any, *, tp: TensorParallel) -> InputProjection:
        return InputProjection(width, self.share, tp=tp)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decays: Tensor,
        context: SequenceContext,
        *,
        left: Callable[[], Tensor],
    ) -> Tensor:
        """Maps queries, keys and values [S, B, H, K or V] to [S, B, H, V].

        Args:
            log_decays: as the kernel's.
            left: computes the logarithm of what is left of a state after the whole part, [B or 1, H, K or 1].
        """
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        states = (len(q), self.share.heads.length)
        y_BSHV = scan_of_parts(
            partial(self.kernel, q, k, v, log_decays, resets=context.resets),
            decay=lambda: decay_over(left().expand(len(q), -1, -1), context.resets),
            decay_shape=(*states, self.head_dim if log_decays.dim() == 4 else 1, 1),
            state_shape=(*states, self.head_dim, self.value_dim),
            like=log_decays,
            cp=context.cp,
        )
        return y_BSHV.transpose(0, 1)

    def _heads(self, x: Tensor, channels: int) -> Tensor:
        return x.unflatten(-1, (-1, channels))

    def _output(self, y_SBHV: Tensor, gate_SBD: Tensor) -> Tensor:
        return self.out_proj(self.norm(y_SBHV, self._heads(gate_SBD, self.value_dim)).flatten(2))


class GatedLinearAttentionLayer(_LinearAttention):
    """A layer whose decays each channel of a key has of every token."""

    def _input(self, width: int, sizes: GLASizes, *, tp: TensorParallel) -> InputProjection:
        return GatedInputProjection(width, sizes.gate_rank, self.share, tp=tp)

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        q, k, v, gate, log_decays = self.in_proj(x)
        q, k, log_decays = (self._heads(t, self.head_dim) for t in (q, k, log_decays))
        v, log_decays = self._heads(v, self.value_dim), log_decays.transpose(0, 1)
        return self._output(self._attend(q, k, v, log_decays, context, left=lambda: log_decays.sum(1)), gate)


class RetentionLayer(_LinearAttention):
    """A layer with one fixed decay a head, and rotary positions."""

    def __init__(
        self, config: ModelConfig, sizes: RetNetSizes, *, letter: str, tp: TensorParallel, kernels: Kernels
    ) -> None:
        super().__init__(config, sizes, tp=tp, kernels=kernels)
        self.letter, self.rotary = letter, kernels.elementwise.rotary

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        q, k, v, gate = self.in_proj(x)
        cos, sin, log_decays = context.shared[self.letter]
        q, k = (self.rotary(self._heads(t, self.head_dim), cos, sin) for t in (q, k))
        v, heads = self._heads(v, self.value_dim), self.share.heads
        own = log_decays[heads.start : heads.start + heads.length]
        return self._output(self._attend(q, k, v, own, context, left=lambda: (own * len(v)).view(1, -1, 1)), gate)


def decay_over(left: Tensor, resets: Tensor | None) -> Tensor:
    """What is left of a state after the whole part, [B, H, K or 1, 1], of its logarithm [B, H, K or 1]."""
    decay = left.exp()
    return (decay if resets is None else decay.masked_fill(resets.any(1)[:, None, None], 0)).unsqueeze(-1)
