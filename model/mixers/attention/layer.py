"""Attention with its heads dealt to tensor-parallel ranks (arXiv 2406.07522).

It is over a window, over everything before, or over the keys of another layer.
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
from sambalm.parallel.layers.tensor_parallel import ColumnParallelLinear, RowParallelLinear, copy_to_region
from sambalm.parallel.sharding import sharded_parameter


def _query_weights(config: ModelConfig) -> init.Linear:
    return init.linear(config.hidden_size, scale=config.query_scale)


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
            (0, width), {"q.weight": share.query}, init=_query_weights(config), matmul_only=True, takes_fp8=True
        )
        parts, alone = {"k.weight": share.kv, "v.weight": share.kv}, share.kv_copies == 1
        self.key_value = sharded_parameter((0, width), parts, init=weights, owned=share.owns_kv, matmul_only=alone)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        key_value = copy_to_region(self.key_value, self.copies)
        return linear_parts(x, self.query, key_value, sizes=self.local_sizes, tp=self.tp)


def _output(config: ModelConfig, share: HeadShare, *, tp: TensorParallel) -> RowParallelLinear:
    width = config.hidden_size
    return RowParallelLinear(share.query, width, tp=tp, init=init.residual_linear(width, config))


class _Attention(nn.Module):
    """What all kinds of attention share: their heads, rotary positions, and the kernel with its documents.

    Args:
        letter: of the mixer, whose rotary tables the layer reads.
    """

    def __init__(self, config: ModelConfig, *, letter: str, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        self.letter, self.head_dim, self.share = letter, config.head_dim, share_heads(config, tp)
        self.kernel, self.rotary = kernels.attention, kernels.elementwise.rotary

    def _rotated(self, *tensors_SBHd: Tensor, context: SequenceContext) -> list[Tensor]:
        """Queries, or queries and keys, with their positions, as the kernels take them, [B, H, S, d]."""
        tables = context.shared[self.letter]
        rotated = tensors_SBHd if tables is None else [self.rotary(t, *tables) for t in tensors_SBHd]
        return [t.permute(1, 2, 0, 3) for t in rotated]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: SequenceContext, *, window: int | None, first: int = 0
    ) -> Tensor:
        """[queries, B, H, d] of the part's queries from `first` on, with keys that end with them."""
        queries, documents = q.shape[2], None
        if context.documents:
            numbers = range(first, first + queries)
            documents = context.documents.attention(numbers, keys_before=k.shape[2] - queries)
        window = k.shape[2] if window is None else window
        return self.kernel(q, k, v, window=window, documents=documents).permute(2, 0, 1, 3)


class WindowAttentionLayer(_Attention):
    """Causal attention over a window with grouped queries; heads are cut over ranks."""

    def __init__(self, config: ModelConfig, *, letter: str, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__(config, letter=letter, tp=tp, kernels=kernels)
        self.window = config.window
        self.qkv_proj = QKVProjection(config, self.share, tp=tp)
        self.o_proj = _output(config, self.share, tp=tp)

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        q, k, v = map(self._heads, self.qkv_proj(x))
        (q, k), v = self._rotated(q, k, context=context), v.permute(1, 2, 0, 3)
        if context.cp.size == 1:
            y_SBHd = self._attend(q, k, v, context, window=self.window)
        else:
            y_SBHd = self._attend_over_parts(q, k, v, context)
        return self.o_proj(y_SBHd.flatten(2))

    def _attend_over_parts(self, q: Tensor, k: Tensor, v: Tensor, context: SequenceContext) -> Tensor:
        """The same of a context-parallel rank: queries that only see its own keys are computed while others arrive."""
        reach = self.window - 1
        # Queries that see neighbours' keys. Where most do, the others would not fill the time until those arrive.
        near = reach if q.shape[2] >= 2 * reach else q.shape[2]
        kv_BSHd = torch.cat((k, v), dim=1).transpose(1, 2)  # one message instead of two
        neighbours = HaloExchange(kv_BSHd, reach, cp=context.cp)
        near_q, far_q = q.split([near, q.shape[2] - near], dim=2)
        parts = []
        if far_q.shape[2]:
            far_k, far_v = kv_BSHd.transpose(1, 2).chunk(2, dim=1)
            parts.append(self._attend(far_q, far_k, far_v, context, window=self.window, first=near))
        if near:
            near_kv = torch.cat((neighbours.wait(), kv_BSHd[:, :near]), dim=1).transpose(1, 2)
            near_k, near_v = near_kv.chunk(2, dim=1)
            parts.append(self._attend(near_q, near_k, near_v, context, window=self.window))
        return torch.cat(parts[::-1])


class FullAttentionLayer(_Attention):
    """Causal attention over everything before, with grouped queries; heads are cut over ranks."""

    def __init__(self, config: ModelConfig, *, letter: str, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__(config, letter=letter, tp=tp, kernels=kernels)
        self.qkv_proj = QKVProjection(config, self.share, tp=tp)
        self.o_proj = _output(config, self.share, tp=tp)

    def forward(self, x: Tensor, context: SequenceContext) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What is added to the stream, and keys and values [B, kv heads, tokens up to the part's end, d]."""
        q, k, v = map(self._heads, self.qkv_proj(x))
        (q, k), v = self._rotated(q, k, context=context), v.permute(1, 2, 0, 3)
        if context.cp.size > 1:
            kv_BSHd = torch.cat((k, v), dim=1).transpose(1, 2)  # one message instead of two
            before = HaloExchange(kv_BSHd, (context.cp.size - 1) * q.shape[2], cp=context.cp).wait()
            k, v = torch.cat((before, kv_BSHd), dim=1).transpose(1, 2).chunk(2, dim=1)
        return self.o_proj(self._attend(q, k, v, context, window=None).flatten(2)), (k, v)


class CrossAttentionLayer(_Attention):
    """Causal attention over keys and values that a layer before has written; heads are cut over ranks."""

    def __init__(self, config: ModelConfig, *, letter: str, memory: str, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__(config, letter=letter, tp=tp, kernels=kernels)
        width, self.memory = config.hidden_size, memory
        self.q_proj = ColumnParallelLinear(width, {"q": self.share.query}, tp=tp, init=_query_weights(config))
        self.o_proj = _output(config, self.share, tp=tp)

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        (q,) = self._rotated(self._heads(*self.q_proj(x)), context=context)
        k, v = context.memories[self.memory]
        return self.o_proj(self._attend(q, k, v, context, window=None).flatten(2))
