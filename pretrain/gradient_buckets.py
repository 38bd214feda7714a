"""Which parameters AdamW steps together, and which gradients ranks therefore reduce together."""

import math
from collections.abc import Iterable, Sequence
from typing import cast

from torch import nn

from sambalm.model.samba import Samba
from sambalm.parallel.zero.buckets import GradientBucket
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.pretrain.optimizer import bucket_ranges


def gradient_buckets(chunks: Sequence[nn.Module], *, max_elements: int | None = None) -> list[GradientBucket]:
    """Sorts parameters into those that AdamW steps together and whose gradients ranks reduce together.

    There is one bucket of weights of matrix products, one of other parameters with weight decay, and one of those
    without; empty ones are left out. Each of these is several where its parameters have several learning rates.

    Args:
        chunks: of the model on this rank. Their parameters have a `ParameterInfo`.
        max_elements: makes several buckets of a whole Samba's weights of products, which a backward completes one after
            the other: of consecutive layers with up to so many elements, and up to BUCKET_SHARE of all, from the last
            layer to the first. None: one bucket, of any model.
    """
    buckets: list[GradientBucket] = []
    if max_elements:
        (model,) = chunks
        buckets = _layer_buckets(cast(Samba, model), max_elements=max_elements)
    sorted_already = {parameter for bucket in buckets for parameter in bucket.parameters}
    by_use: dict[tuple[bool, bool], list[nn.Parameter]] = {(True, True): [], (True, False): [], (False, False): []}
    for parameter in nn.ModuleList(chunks).parameters():
        if parameter not in sorted_already:
            info = info_of(parameter)
            by_use[info.weight_decay, info.matmul_only].append(parameter)
    for (decays, _), parameters in by_use.items():
        for lr_scale, equal in _by_lr_scale(parameters).items():
            buckets.append(GradientBucket(equal, weight_decay=decays, lr_scale=lr_scale))
    return buckets


def _by_lr_scale(parameters: Iterable[nn.Parameter]) -> dict[float, tuple[nn.Parameter, ...]]:
    found: dict[float, tuple[nn.Parameter, ...]] = {}
    for parameter in parameters:
        lr_scale = info_of(parameter).lr_scale
        found[lr_scale] = (*found.get(lr_scale, ()), parameter)
    return found


def _layer_buckets(model: Samba, *, max_elements: int) -> list[GradientBucket]:
    layers = [
        ([parameter for parameter in module.parameters() if info_of(parameter).matmul_only], last)
        for module, last in model.backward_order()
    ]
    # An even share of whole tensors, so that tensor-parallel ranks, whose shares differ, send in one order.
    sizes = [
        sum(math.prod(piece.shape) for matrix in matrices for piece in info_of(matrix).slices) // model.tp.size
        for matrices, _ in layers
    ]
    return [
        GradientBucket(equal, weight_decay=True, completed_by=layers[together.stop - 1][1], lr_scale=lr_scale)
        for together in bucket_ranges(sizes, max_elements=max_elements)
        for lr_scale, equal in _by_lr_scale(
            matrix for matrices, _ in layers[together.start : together.stop] for matrix in matrices
        ).items()
    ]
