"""Matrix products with fp32 weights in the activations' precision or in FP8, also of column-parallel layers."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.layers.fp8 import scales_of
from sambalm.parallel.layers.fp8_linear import Fp8Linear, observed
from sambalm.parallel.layers.product_weights import compute_weight, kept_weight, weight_gradient
from sambalm.parallel.layers.sequence_messages import Gathered, Summed
from sambalm.parallel.zero.parameter_info import info_of

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
    return linear_parts(x, weight, sizes=[[weight.shape[0]]], tp=tp)[0]


def linear_parts(
    x: Tensor, *weights: Tensor, sizes: Sequence[Sequence[int]], tp: TensorParallel = ALONE
) -> tuple[Tensor, ...]:
    """Runs `linear` with several weights as one, and returns the output in parts, whose gradients are never joined.

    Args:
        weights: [out, in] each, taken as one below the other.
        sizes: for each weight the features of its parts.
    """
    rows = x.numel() // x.shape[-1] * (tp.size if tp.sequence else 1)
    scales = scales_of(weights, rows=rows)
    if scales is None:
        return _Linear.apply(x, sizes, tp, *weights)
    records = torch.is_grad_enabled()  # validation tells the next step nothing
    if scales.store.is_new:
        outputs = _Linear.apply(x, sizes, tp, *weights)
        return observed(x, outputs, scales) if records else outputs
    return Fp8Linear.apply(x, sizes, tp, scales, records, *weights)


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
        weight = compute_weight(weights, x.dtype)
        ctx.save_for_backward(x, kept_weight(weights, weight))
        ctx.weights, ctx.sizes, ctx.tp = weights, sizes, tp
        y, features = F.linear(Gathered(x, tp).wait(), weight), list(chain(*sizes))
        return y.split(features, dim=-1) if len(features) > 1 else (y,)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """What ranks exchange is under way while this one computes, as in megatron-core's linear layer."""
        x, weight = ctx.saved_tensors
        weight = compute_weight(ctx.weights, x.dtype) if weight is None else weight
        gathered = Gathered(x, ctx.tp)
        flat = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        features = [gradient.shape[1] for gradient in flat]
        grad_rows = x.new_empty(flat[0].shape[0], x.shape[-1])
        for number, (gradient, part) in enumerate(zip(flat, weight.split(features), strict=True)):
            torch.addmm(grad_rows, gradient, part, beta=min(number, 1), out=grad_rows)
        rows = gathered.wait().reshape(-1, x.shape[-1])
        summed = Summed(grad_rows, ctx.tp)
        parts = iter(flat)
        grad_weights = [
            weight_gradient(weight, partial(_add_products, list(islice(parts, len(sizes))), rows))
            for weight, sizes in zip(ctx.weights, ctx.sizes, strict=True)
        ]
        return summed.wait().view_as(x), None, None, *grad_weights


class _LinearBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        converted = compute_weight((weight,), x.dtype)
        ctx.save_for_backward(x, kept_weight((weight,), converted))
        ctx.weight = weight
        return x.view_as(x), F.linear(x, converted)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        weight = compute_weight((ctx.weight,), x.dtype) if weight is None else weight
        gradient = gradient.reshape(-1, gradient.shape[-1])
        sums = grad_x.reshape(-1, x.shape[-1]).addmm_(gradient, weight)
        rows = x.reshape(-1, x.shape[-1])
        return sums.view_as(x), weight_gradient(ctx.weight, partial(_add_products, [gradient], rows))


def _add_products(gradients: Sequence[Tensor], rows: Tensor, out: Tensor, beta: int) -> None:
    """Writes beta * out and the gradient of each part's rows of a weight into out, [features of all parts, in]."""
    for gradient, part in zip(gradients, out.split([gradient.shape[1] for gradient in gradients]), strict=True):
        _add_product(part, gradient.t(), rows, beta=beta)


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, beta: int) -> None:
    """Writes beta * out + left @ right into out, whose precision the sums have."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=beta, out=out)
    elif left.is_cuda:
        torch.addmm(out, left, right, beta=beta, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=beta, out=out)
