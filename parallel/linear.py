"""Matrix products with fp32 weights at the activations' precision."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, *weights: Tensor) -> Tensor:
    """x @ weight.T in x's dtype, with several weights as one below the other.

    Args:
        x: [..., in].
        weights: [out, in], in fp32 or x's dtype. Their gradients are summed in fp32 inside the matrix product and never
            rounded to x's dtype.
    """
    return _Linear.apply(x, None, *weights)


def linear_parts(x: Tensor, *weights: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """`linear`, its result cut into parts of so many features. Their gradients are never joined."""
    return _Linear.apply(x, sizes, *weights)


def linear_beside(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x for another use, and `linear` of it: saves the pass over memory that would add up their gradients.

    The backward changes the gradient of that use in place: it must not be shared with another tensor's.
    """
    return _LinearBeside.apply(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sizes: Sequence[int] | None, *weights: Tensor) -> Tensor | tuple[Tensor, ...]:
        cast = [weight.to(x.dtype) for weight in weights]
        weight = cast[0] if len(cast) == 1 else torch.cat(cast)
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes or [weight.shape[0]]
        ctx.weights = [(weight.shape[0], weight.dtype) for weight in weights]
        y = F.linear(x, weight)
        return y.split(sizes, dim=-1) if sizes else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        lengths, dtypes = zip(*ctx.weights, strict=True)
        grad_x = torch.empty_like(rows)
        grad_weight = torch.empty_like(weight, dtype=dtypes[0])
        parts = zip(gradients, weight.split(ctx.sizes), grad_weight.split(ctx.sizes), strict=True)
        for number, (gradient, part, found) in enumerate(parts):
            gradient = gradient.reshape(-1, gradient.shape[-1])
            torch.addmm(grad_x, gradient, part, beta=min(number, 1), out=grad_x)
            _product(gradient.t(), rows, out=found)
        return grad_x.view_as(x), None, *grad_weight.split(lengths)


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
