"""Attention, over a window or everything before, with its heads dealt to tensor-parallel ranks (arXiv 2406.07522).

S: sequence, B: batch, H: heads, d: head dim.
"""

import torch
from torch import Tensor, nn

from sambalm.model import initialization as init
from sambalm.model.config import ModelConfig
from sambalm.model.mixers.attention.heads import HeadShare, share_heads
from sambalm.model.mixers.context import SequenceContext
from sambalm.model.ops.registry import Kernels
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.layers.context_parallel import HaloExchange
from sambalm.parallel.layers.linear import linear_parts
from sambalm.parallel.layers.tensor_parallel import RowParallelLinear, copy_to_region
from sambalm.parallel.sharding import sharded_parameter


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
        self.query = sharded_parameter(
            (0, width), {"q.weight": share.query}, init=weights, matmul_only=True, takes_fp8=True
        )
        parts, alone = {"k.weight": share.kv, "v.weight": share.kv}, share.kv_copies == 1
        self.key_value = sharded_parameter((0, width), parts, init=weights, owned=share.owns_kv, matmul_only=alone)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        key_value = copy_to_region(self.key_value, self.copies)
        return linear_parts(x, self.query, key_value, sizes=self.local_sizes, tp=self.tp)


class AttentionLayer(nn.Module):
    """Causal attention with grouped queries; heads are cut over ranks.

    Args:
        letter: of the mixer, whose rotary tables the layer reads.
        window: positions that a query sees, itself included; None: all up to its own.
    """

    def __init__(
        self, config: ModelConfig, *, letter: str, window: int | None, tp: TensorParallel, kernels: Kernels
    ) -> None:
        super().__init__()
        width, share = config.hidden_size, share_heads(config, tp)
        self.letter, self.window = letter, window
        self.head_dim, self.kernel = config.head_dim, kernels.attention
        self.rotary = kernels.elementwise.rotary
        self.qkv_proj = QKVProjection(config, share, tp=tp)
        self.o_proj = RowParallelLinear(share.query, width, tp=tp, init=init.residual_linear(width, config))

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        tables = context.shared[self.letter]
        q_SBHd, k_SBHd, v_SBHd = (t.unflatten(-1, (-1, self.head_dim)) for t in self.qkv_proj(x))
        if tables is not None:
            q_SBHd, k_SBHd = (self.rotary(t, *tables) for t in (q_SBHd, k_SBHd))
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
        window = k.shape[2] if self.window is None else self.window
        return self.kernel(q, k, v, window=window, documents=documents).permute(2, 0, 1, 3)

    def _attend_over_parts(self, q: Tensor, k: Tensor, v: Tensor, context: SequenceContext) -> Tensor:
        """The same of a context-parallel rank: queries that only see its own keys are computed while others arrive."""
        reach = (self.window or context.cp.size * q.shape[2]) - 1  # all that is before a part, in full attention
        # Queries that see neighbours' keys. Where most do, the others would not fill the time until those arrive.
        near = reach if q.shape[2] >= 2 * reach else q.shape[2]
        kv_BSHd = torch.cat((k, v), dim=1).transpose(1, 2)  # one message instead of two
        neighbours = HaloExchange(kv_BSHd, reach, cp=context.cp)
        near_q, far_q = q.split([near, q.shape[2] - near], dim=2)
        parts = []
        if far_q.shape[2]:
            far_k, far_v = kv_BSHd.transpose(1, 2).chunk(2, dim=1)
            parts.append(self._attend(far_q, far_k, far_v, context, first=near))
        if near:
            near_kv = torch.cat((neighbours.wait(), kv_BSHd[:, :near]), dim=1).transpose(1, 2)
            near_k, near_v = near_kv.chunk(2, dim=1)
            parts.append(self._attend(near_q, near_k, near_v, context, first=0))
        return torch.cat(parts[::-1])
