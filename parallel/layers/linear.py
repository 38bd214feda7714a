"""Matrix products with fp32 weights in the activations' precision, also of column-parallel layers."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.zero.compute_weights import joined
from sambalm.parallel.zero.parameter_info import find_info, info_of

ALONE = TensorParallel()


def fuse_gradient_accumulation(parameters: Iterable[nn.Parameter]) -> None:
    """Lets the backward add to a gradient that a weight has inside the matrix product, a pass over memory less.

    Autograd then finds no gradient for the weight and runs none of its hooks, and `torch.autograd.grad` would change
    `weight.grad`. megatron-core's gradient_accumulation_fusion does the same, whose `main_grad` is `grad` here.
    """
    for info in map(info_of, parameters):
        info.fuses_accumulation, info.has_product, info.is_overwritten = True, False, False


@contextmanager
def overwriting(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Goes around the backwards that find a step's first gradients.

    The first product of each weight writes over the gradient that the weight has and does not read it; others then add.

    Args:
        weights: that have a product (`ParameterInfo.has_product`); what else uses them comes before it in the forward.

    Raises:
        RuntimeError: on leaving, if a weight still has what it had.
    """
    infos = [info_of(weight) for weight in weights]
    for info in infos:
        info.is_overwritten = True
    yield
    kept = sum(info.is_overwritten for info in infos)
    if kept:
        raise RuntimeError(f"{kept} weights have gradients of the step before: no product has found others")


def linear(x: Tensor, weight: Tensor, *, tp: TensorParallel = ALONE) -> Tensor:
    """Returns x @ weight.T in x's dtype.

    Args:
        x: [..., in]; [sequence / tp, batch, in] under sequence parallelism, which is gathered first.
        weight: [out, in], in fp32 or x's dtype. Its gradient is summed in fp32 inside the matrix product and never
            rounded to x's dtype.
        tp: where the weight is this rank's rows of a column-parallel layer (arXiv 1909.08053, section 3); x's
            gradient is summed over the ranks, and scattered under sequence parallelism (arXiv 2205.05198).
    """
    return _Linear.apply(x, [[weight.shape[0]]], tp, weight)[0]


def linear_parts(
    x: Tensor, *weights: Tensor, sizes: Sequence[Sequence[int]], tp: TensorParallel = ALONE
) -> tuple[Tensor, ...]:
    """Runs `linear` with several weights as one, and returns the output in parts, whose gradients are never joined.

    Args:
        weights: [out, in] each, taken as one below the other.
        sizes: for each weight the features of its parts.
    """
    return _Linear.apply(x, sizes, tp, *weights)


def linear_beside(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x for another use, and `linear` of it: saves the pass over memory that would add up their gradients.

    The backward changes the gradient of that use in place: it must not be shared with another tensor's.
    """
    return _LinearBeside.apply(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: Sequence[Sequence[int]], tp: TensorParallel, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        weight = _compute_weight(weights, x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.weights, ctx.sizes, ctx.tp = weights, sizes, tp
        y, features = F.linear(_Gathered(x, tp).wait(), weight), list(chain(*sizes))
        return y.split(features, dim=-1) if len(features) > 1 else (y,)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """What ranks exchange is under way while this one computes, as in megatron-core's linear layer."""
        x, weight = ctx.saved_tensors
        gathered = _Gathered(x, ctx.tp)
        flat = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        features = [gradient.shape[1] for gradient in flat]
        grad_rows = x.new_empty(flat[0].shape[0], x.shape[-1])
        for number, (gradient, part) in enumerate(zip(flat, weight.split(features), strict=True)):
            torch.addmm(grad_rows, gradient, part, beta=min(number, 1), out=grad_rows)
        rows = gathered.wait().reshape(-1, x.shape[-1])
        summed = _Summed(grad_rows, ctx.tp)
        parts = iter(flat)
        grad_weights = [
            _weight_gradient(weight, list(islice(parts, len(sizes))), rows)
            for weight, sizes in zip(ctx.weights, ctx.sizes, strict=True)
        ]
        return summed.wait().view_as(x), None, None, *grad_weights


class _Gathered:
    """All ranks' sequence shards, joined along dimension 0, on their way under sequence parallelism; else x itself."""

    def __init__(self, x: Tensor, tp: TensorParallel) -> None:
        self.x, self.work = x, None
        if tp.size > 1 and tp.sequence:
            self.shard = x.contiguous()
            self.x = x.new_empty(tp.size * x.shape[0], *x.shape[1:])
            self.work = dist.all_gather_into_tensor(self.x, self.shard, group=tp.group, async_op=True)

    def wait(self) -> Tensor:
        if self.work:
            self.work.wait()
        return self.x


class _Summed:
    """The sum of the ranks' rows on its way, or this rank's sequence shard of it under sequence parallelism."""

    def __init__(self, rows: Tensor, tp: TensorParallel) -> None:
        self.rows, self.sum, self.work = rows, rows, None
        if tp.size > 1 and tp.sequence:
            self.sum = rows.new_empty(rows.shape[0] // tp.size, rows.shape[1])
            self.work = dist.reduce_scatter_tensor(self.sum, rows, group=tp.group, async_op=True)
        elif tp.size > 1:
            self.work = dist.all_reduce(rows, group=tp.group, async_op=True)

    def wait(self) -> Tensor:
        if self.work:
            self.work.wait()
        return self.sum


class _LinearBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        compute_weight = _compute_weight((weight,), x.dtype)
        ctx.save_for_backward(x, compute_weight)
        ctx.weight = weight
        return x.view_as(x), F.linear(x, compute_weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        sums = grad_x.reshape(-1, x.shape[-1]).addmm_(gradient, weight)
        return sums.view_as(x), _weight_gradient(ctx.weight, [gradient], x.reshape(-1, x.shape[-1]))


def _compute_weight(weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Returns [out, in] of all weights in dtype.

    A weight whose copy nobody keeps is converted at each use, as is what is no parameter: keys' and values' weights
    where several ranks hold them.
    """
    infos = [find_info(weight) for weight in weights]
    keepers = [info.compute_weights if info else None for info in infos]
    if keepers[0] and all(keepers):
        return keepers[0].of(weights, dtype)
    kept = zip(weights, keepers, strict=True)
    return joined([keeper.of((weight,), dtype) if keeper else weight for weight, keeper in kept], dtype)


def _weight_gradient(weight: Tensor, gradients: Sequence[Tensor], rows: Tensor) -> Tensor | None:
    """Returns [out, in] in the weight's dtype; None where it has been added to the weight's own.

    Args:
        gradients: [tokens, features] of each part of the output.
        rows: [tokens, in], what the weight was multiplied by.
    """
    info = find_info(weight)
    own = weight.grad if info and info.fuses_accumulation else None
    features = [gradient.shape[1] for gradient in gradients]
    found = rows.new_empty(sum(features), rows.shape[1], dtype=weight.dtype) if own is None else own
    beta = int(own is not None and info is not None and not info.is_overwritten)
    for gradient, part in zip(gradients, found.split(features), strict=True):
        _add_product(part, gradient.t(), rows, beta=beta)
    if own is None or info is None:
        return found
    info.has_product, info.is_overwritten = True, False
    return None


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, beta: int) -> None:
    """Writes beta * out + left @ right into out, whose precision the sums have."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=beta, out=out)
    elif left.is_cuda:
        torch.addmm(out, left, right, beta=beta, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=beta, out=out)
