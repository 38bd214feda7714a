"""Matrix products with fp32 weights at the activations' precision, also of column-parallel layers."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.zero.compute_weights import joined

ALONE = TensorParallel()


def fuse_gradient_accumulation(parameters: Iterable[nn.Parameter]) -> None:
    """Lets the backward add to a gradient that a weight has inside the matrix product, a pass over memory less.

    Autograd then finds no gradient for the weight and runs none of its hooks, and `torch.autograd.grad` would change
    `weight.grad`. megatron-core's gradient_accumulation_fusion likewise, whose `main_grad` is `grad` here.

    A weight whose gradient a product has added to so far `has_product`.
    """
    for parameter in parameters:
        parameter.fuses_accumulation, parameter.has_product, parameter.is_overwritten = True, False, False


@contextmanager
def overwriting(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """While backwards find the first gradients of a step: a product writes over what the weight has, and does not read
    it; others then add.

    Args:
        weights: that have a product; what else uses them comes before it in the forward.

    Raises:
        RuntimeError: on leaving, if a weight still has what it had.
    """
    for weight in weights:
        weight.is_overwritten = True
    yield
    kept = sum(weight.is_overwritten for weight in weights)
    if kept:
        raise RuntimeError(f"{kept} weights have gradients of the step before: no product has found others")


def linear(x: Tensor, weight: Tensor, *, tp: TensorParallel = ALONE) -> Tensor:
    """x @ weight.T in x's dtype.

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
    """`linear` with several weights as one below the other, each cut into parts of so many features.

    The parts' gradients are never joined.
    """
    return _Linear.apply(x, sizes, tp, *weights)


def linear_beside(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x for another use, and `linear` of it: saves the pass over memory that would add up their gradients.

    The backward changes the gradient of that use in place: it must not be shared with another tensor's.
    """
    return _LinearBeside.apply(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, sizes: Sequence[Sequence[int]], tp: TensorParallel, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        weight = _rounded(weights, x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.weights, ctx.sizes, ctx.tp = weights, sizes, tp
        y, features = F.linear(_Gathered(x, tp).wait(), weight), list(chain(*sizes))
        return y.split(features, dim=-1) if len(features) > 1 else (y,)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """What ranks exchange is under way while this one computes, as in megatron-core's linear layer."""
        x, weight = ctx.saved_tensors
        gathered = _Gathered(x, ctx.tp)
        gradients = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        features = [gradient.shape[1] for gradient in gradients]
        grad_rows = x.new_empty(gradients[0].shape[0], x.shape[-1])
        for number, (gradient, part) in enumerate(zip(gradients, weight.split(features), strict=True)):
            torch.addmm(grad_rows, gradient, part, beta=min(number, 1), out=grad_rows)
        rows = gathered.wait().reshape(-1, x.shape[-1])
        summed = _Summed(grad_rows, ctx.tp)
        parts = iter(gradients)
        grad_weights = [
            _weight_gradient(weight, list(islice(parts, len(sizes))), rows)
            for weight, sizes in zip(ctx.weights, ctx.sizes, strict=True)
        ]
        return summed.wait().view_as(x), None, None, *grad_weights


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
        cast = _rounded((weight,), x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.weight = weight
        return x.view_as(x), F.linear(x, cast)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        sums = grad_x.reshape(-1, x.shape[-1]).addmm_(gradient, weight)
        return sums.view_as(x), _weight_gradient(ctx.weight, [gradient], x.reshape(-1, x.shape[-1]))


def _rounded(weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """[out, in] of all weights; what is no parameter, such as a copy for several ranks, is rounded at each use."""
    if all(hasattr(weight, "rounded") for weight in weights):
        return weights[0].rounded.of(weights, dtype)
    return joined([w.rounded.of((w,), dtype) if hasattr(w, "rounded") else w for w in weights], dtype)


def _weight_gradient(weight: Tensor, gradients: Sequence[Tensor], rows: Tensor) -> Tensor | None:
    """[out, in] in the weight's dtype; None where it has been added to the weight's own.

    Args:
        gradients: [tokens, features] of each part of the output.
        rows: [tokens, in], what the weight was multiplied by.
    """
    fused = getattr(weight, "fuses_accumulation", False) and weight.grad is not None
    features = [gradient.shape[1] for gradient in gradients]
    found = weight.grad if fused else rows.new_empty(sum(features), rows.shape[1], dtype=weight.dtype)
    beta = int(fused and not weight.is_overwritten)
    for gradient, part in zip(gradients, found.split(features), strict=True):
        _add_product(part, gradient.t(), rows, beta=beta)
    if not fused:
        return found
    weight.has_product, weight.is_overwritten = True, False
    return None


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, beta: int) -> None:
    """beta * out + left @ right into out, whose precision the sums have."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=beta, out=out)
    elif left.is_cuda:
        torch.addmm(out, left, right, beta=beta, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=beta, out=out)
