"""`linear` in FP8: the forward, the input's gradient and the weight's (see `fp8`)."""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.layers.fp8 import GRADIENTS, INPUTS, ProductScales, product
from sambalm.parallel.layers.product_weights import compute_weight, weight_gradient
from sambalm.parallel.layers.sequence_messages import Gathered, Summed


def observed(x: Tensor, outputs: Sequence[Tensor], scales: ProductScales) -> tuple[Tensor, ...]:
    """Returns the outputs of a product that is not in FP8, whose input and gradients its scales shall know of."""
    scales.observe(x.detach(), INPUTS)
    return tuple(_ObservedGradient.apply(output, scales) for output in outputs)


class _ObservedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, scales: ProductScales) -> Tensor:
        ctx.scales = scales
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.scales.observe(gradient, GRADIENTS)
        return gradient, None


class Fp8Linear(torch.autograd.Function):
    """Arguments are those of `linear.linear_parts`, the product's scales, and whether these learn from the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        sizes: Sequence[Sequence[int]],
        tp: TensorParallel,
        scales: ProductScales,
        records: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        gathered = Gathered(x, tp).wait()
        rows = gathered.reshape(-1, x.shape[-1])
        left = scales.round([rows], INPUTS, records=records)
        weight = scales.weight(partial(compute_weight, weights, x.dtype))
        y = product(left.rows, weight.rows, (left.inverse, weight.inverse), out_dtype=x.dtype, use_fast_accum=False)
        # Half the bytes of x in bf16; under sequence parallelism the whole sequence of one layer after the other is
        # what the backward gathers again.
        kept = (x, x) if tp.sequence else (left.columns, left.inverse)
        ctx.save_for_backward(*kept, weight.columns, weight.inverse)
        ctx.weights, ctx.sizes, ctx.tp, ctx.scales, ctx.shape = weights, sizes, tp, scales, x.shape
        y = y.view(*gathered.shape[:-1], -1)
        features = list(chain(*sizes))
        return y.split(features, dim=-1) if len(features) > 1 else (y,)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """What ranks exchange is under way while this one computes."""
        columns, inverse, weight_columns, weight_inverse = ctx.saved_tensors
        gathered = Gathered(columns, ctx.tp) if ctx.tp.sequence else None
        flat = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        found = ctx.scales.round(flat, GRADIENTS, records=True)
        grad_rows = product(found.rows, weight_columns, (found.inverse, weight_inverse), out_dtype=gradients[0].dtype)
        if gathered:
            rows = gathered.wait().reshape(-1, ctx.shape[-1])
            again = ctx.scales.round([rows], INPUTS, records=False)
            columns, inverse = again.columns, again.inverse
        summed = Summed(grad_rows, ctx.tp)
        parts = found.columns.split([sum(sizes) for sizes in ctx.sizes])
        inverses = (found.inverse, inverse)
        grad_weights = [
            weight_gradient(weight, partial(_add_product, part, columns, inverses))
            for weight, part in zip(ctx.weights, parts, strict=True)
        ]
        return summed.wait().view(ctx.shape), None, None, None, None, *grad_weights


def _add_product(left: Tensor, right: Tensor, inverses: tuple[Tensor, Tensor], out: Tensor, beta: int) -> None:
    """Writes beta * out + left @ right.T into out, in fp32."""
    if beta:
        out.add_(product(left, right, inverses, out_dtype=out.dtype))
    else:
        product(left, right, inverses, out_dtype=out.dtype, out=out)
