"""Tensor- and sequence-parallel layers over megatron-core's communication primitives.

Weights are fp32, their own master copies, and converted to the input's dtype where they are used. Activations are
sequence-first, [sequence, batch, width], as megatron-core's sequence parallelism needs them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sambalm.parallel.compat.megatron import tensor_parallel
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.layers.linear import linear, linear_parts
from sambalm.parallel.shard import Shard, equal_shard
from sambalm.parallel.sharding import Init, sharded_parameter


class _ContiguousGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous: given another, megatron-core's all-reduces silently reduce a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def copy_to_region(x: Tensor, tp: TensorParallel) -> Tensor:
    """Returns x; the backward sums the gradient over the tensor-parallel ranks, each of which used x for its shard."""
    if tp.size == 1:
        return x
    return _ContiguousGradient.apply(tensor_parallel.copy_to_tensor_model_parallel_region(x, group=tp.group))


def reduce_from_region(x: Tensor, tp: TensorParallel) -> Tensor:
    """Returns the sum over tensor-parallel ranks; the backward is the identity."""
    if tp.size == 1:
        return x
    return tensor_parallel.reduce_from_tensor_model_parallel_region(x.contiguous(), group=tp.group)


def replicated_weight(weight: Tensor, tp: TensorParallel) -> Tensor:
    """Returns a whole weight for use on this rank's sequence shard: its gradient is then a sum over the ranks."""
    return copy_to_region(weight, tp) if tp.sequence else weight


class ColumnParallelLinear(nn.Module):
    """A linear layer without bias whose output features ranks share.

    Args:
        parts: this rank's shares of the output features, by name; all are computed in one matrix product.
    """

    def __init__(self, in_features: int, parts: Mapping[str, Shard], *, tp: TensorParallel, init: Init) -> None:
        super().__init__()
        self.tp = tp
        self.local_sizes = [part.held for part in parts.values()]
        shards = {f"{name}.weight": part for name, part in parts.items()}
        self.weight = sharded_parameter((0, in_features), shards, init=init, matmul_only=True, takes_fp8=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Takes [sequence, batch, in] to one [sequence, batch, this rank's features] for each part."""
        return linear_parts(x, self.weight, sizes=[self.local_sizes], tp=self.tp)


class RowParallelLinear(nn.Module):
    """A linear layer without bias whose input features ranks share; the output is summed over them."""

    def __init__(self, in_features: Shard, out_features: int, *, tp: TensorParallel, init: Init) -> None:
        super().__init__()
        self.tp = tp
        self.weight = sharded_parameter(
            (out_features, 0), {"weight": in_features}, init=init, dim=1, matmul_only=True, takes_fp8=True
        )

    def forward(self, x: Tensor) -> Tensor:
        """Takes [sequence, batch, this rank's features] to [sequence (/ tp under sequence parallelism), batch, out]."""
        partial = linear(x, self.weight)
        if self.tp.sequence:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(partial, group=self.tp.group)
        return reduce_from_region(partial, self.tp)


class VocabParallelEmbedding(nn.Module):
    """An embedding whose rows ranks share.

    Args:
        owned: False for a second copy, which a tied head has on the last pipeline stage.
    """

    def __init__(self, vocab_size: int, width: int, *, tp: TensorParallel, init: Init, owned: bool = True) -> None:
        super().__init__()
        self.tp = tp
        rows = equal_shard(vocab_size, tp)
        self.weight = sharded_parameter((0, width), {"weight": rows}, init=init, owned=owned)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Takes int64 [batch, sequence] to [sequence (/ tp under sequence parallelism), batch, width]."""
        tokens = tokens.t()
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight).to(dtype)
        rows = self.weight.shape[0]
        local = tokens - self.tp.rank * rows  # all ranks hold as many
        elsewhere = (local < 0) | (local >= rows)
        partial = F.embedding(local.masked_fill(elsewhere, 0), self.weight).to(dtype)
        partial = partial.masked_fill(elsewhere.unsqueeze(-1), 0)
        if self.tp.sequence:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(partial, group=self.tp.group)
        return reduce_from_region(partial, self.tp)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    tp: TensorParallel,
    *,
    vocabulary: int,
    token_losses: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:
    """Returns the negative log-likelihood of each label.

    Args:
        logits: [sequence, batch, rows of the head on this rank], all ranks having as many.
        labels: int64 [sequence, batch].
        vocabulary: how many of the rank's rows, from the first on, are tokens.
        token_losses: of logits [tokens, rows], labels [tokens] and the vocabulary, for a process that has all of it.

    Returns:
        fp32 [sequence, batch].
    """
    if tp.size == 1:
        return token_losses(logits.flatten(0, 1), labels.flatten(), vocabulary).view_as(labels)
    logits, zeros = logits.float(), logits.shape[-1] - vocabulary
    if zeros:  # which no probability may go to
        logits = F.pad(logits[..., :vocabulary], (0, zeros), value=-torch.inf)
    return tensor_parallel.vocab_parallel_cross_entropy(logits, labels.contiguous())
