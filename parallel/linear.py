"""Matrix products with fp32 weights at the activations' precision, also of column-parallel layers."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sambalm.parallel.state import TensorParallel

ALONE = TensorParallel()


def linear(x: Tensor, *weights: Tensor, tp: TensorParallel = ALONE) -> Tensor:
    """x @ weight.T in x's dtype, with several weights as one below the other.

    Args:
        x: [..., in]; [sequence / tp, batch, in] under sequence parallelism, which is gathered first.
        weights: [out, in], in fp32 or x's dtype. Their gradients are summed in fp32 inside the matrix product and never
            rounded to x's dtype.
        tp: where the weights are this rank's rows of a column-parallel layer (arXiv 1909.08053, section 3); x's
            gradient is summed over the ranks, and scattered under sequence parallelism (arXiv 2205.05198).
    """
    return _Linear.apply(x, None, tp, *weights)


def linear_parts(x: Tensor, *weights: Tensor, sizes: Sequence[int], tp: TensorParallel = ALONE) -> tuple[Tensor, ...]:
    """`linear`, its result cut into parts of so many features. Their gradients are never joined."""
    return _Linear.apply(x, sizes, tp, *weights)


def linear_beside(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x for another use, and `linear` of it: saves the pass over memory that would add up their gradients.

    The backward changes the gradient of that use in place: it must not be shared with another tensor's.
    """
    return _LinearBeside.apply(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, sizes: Sequence[int] | None, tp: TensorParallel, *weights: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        cast = [weight.to(x.dtype) for weight in weights]
        weight = cast[0] if len(cast) == 1 else torch.cat(cast)
        ctx.save_for_backward(x, weight)
        ctx.sizes, ctx.tp = sizes or [weight.shape[0]], tp
        ctx.weights = [(weight.shape[0], weight.dtype) for weight in weights]
        y = F.linear(_Gathered(x, tp).wait(), weight)
        return y.split(sizes, dim=-1) if sizes else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """What ranks exchange is under way while this one computes, as in megatron-core's linear layer."""
        x, weight = ctx.saved_tensors
        lengths, dtypes = zip(*ctx.weights, strict=True)
        gathered = _Gathered(x, ctx.tp)
        gradients = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        grad_rows = x.new_empty(gradients[0].shape[0], x.shape[-1])
        for number, (gradient, part) in enumerate(zip(gradients, weight.split(ctx.sizes), strict=True)):
            torch.addmm(grad_rows, gradient, part, beta=min(number, 1), out=grad_rows)
        rows = gathered.wait().reshape(-1, x.shape[-1])
        summed = _Summed(grad_rows, ctx.tp)
        grad_weight = torch.empty_like(weight, dtype=dtypes[0])
        for gradient, found in zip(gradients, grad_weight.split(ctx.sizes), strict=True):
            _product(gradient.t(), rows, out=found)
        return summed.wait().view_as(x), None, None, *grad_weight.split(lengths)


class _Gathered:
    """Every rank's part of the sequence, dimension 0, on its way under sequence parallelism; else x itself."""

    def __init__(self, x: Tensor, tp: TensorParallel) -> None:
        self.x, self.work = x, None
        if tp.size > 1 and tp.sequence:
            self.part = x.contiguous()
            self.x = x.new_empty(tp.size * x.shape[0], *x.shape[1:])
            self.work = dist.all_gather_into_tensor(self.x, self.part, group=tp.group, async_op=True)

    def wait(self) -> Tensor:
        if self.work:
            self.work.wait()
        return self.x


class _Summed:
    """The sum of the ranks' rows on its way, or this rank's part of it under sequence parallelism."""

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
    def forward(ctx, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.weight_dtype = weight.dtype
        return x.view_as(x), F.linear(x, cast)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        sums = grad_x.reshape(-1, x.shape[-1]).addmm_(gradient, weight)
        grad_weight = torch.empty_like(weight, dtype=ctx.weight_dtype)
        _product(gradient.t(), x.reshape(-1, x.shape[-1]), out=grad_weight)
        return sums.view_as(x), grad_weight


def _product(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """left @ right into out, whose precision the sums have."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)
