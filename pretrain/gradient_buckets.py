"""Which parameters the optimizer steps together, and which gradients ranks therefore reduce together."""

import math
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import cast

from torch import nn

from sambalm.model.samba import Samba
from sambalm.parallel.zero.buckets import GradientBucket
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.pretrain.optimizer import bucket_ranges


def gradient_buckets(
    chunks: Sequence[nn.Module], *, max_elements: int | None = None, muon: bool = False
) -> list[GradientBucket]:
    """Sorts parameters into those that the optimizer steps together and whose gradients ranks reduce together.

    There is one bucket of weights of matrix products, one of other parameters with weight decay, and one of those
    without; empty ones are left out. Each of these is several where its parameters have several learning rates or
    optimizers.

    Args:
        chunks: of the model on this rank. Their parameters have a `ParameterInfo`.
        max_elements: makes several buckets of a whole Samba's weights of products, which a backward completes one after
            the other: of consecutive layers with up to so many elements, and up to BUCKET_SHARE of all, from the last
            layer to the first. None: one bucket, of any model.
        muon: whether Muon steps the weights of products in a Samba's layers.
    """
    buckets: list[GradientBucket] = []
    matrices = {p for p in _layer_parameters(chunks) if info_of(p).matmul_only} if muon else set()
    if max_elements:
        (model,) = chunks
        buckets = _layer_buckets(cast(Samba, model), max_elements=max_elements, by_muon=matrices)
    sorted_already = {parameter for bucket in buckets for parameter in bucket.parameters}
    by_use: dict[tuple[bool, bool], list[nn.Parameter]] = {(True, True): [], (True, False): [], (False, False): []}
    for parameter in nn.ModuleList(chunks).parameters():
        if parameter not in sorted_already:
            info = info_of(parameter)
            by_use[info.weight_decay, info.matmul_only].append(parameter)
    for (decays, _), parameters in by_use.items():
        buckets += _stepped_alike(parameters, weight_decay=decays, by_muon=matrices)
    return buckets


def _layer_parameters(chunks: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    for chunk in chunks:
        yield from cast(Samba, chunk).layers.parameters()


def _stepped_alike(
    parameters: Iterable[nn.Parameter],
    *,
    weight_decay: bool,
    by_muon: Set[nn.Parameter],
    completed_by: nn.Parameter | None = None,
) -> list[GradientBucket]:
    """Makes a bucket for each learning rate and optimizer of some parameters."""
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault((info_of(parameter).lr_scale, parameter in by_muon), []).append(parameter)
    return [
        GradientBucket(tuple(alike), weight_decay=weight_decay, completed_by=completed_by, lr_scale=lr_scale, muon=muon)
        for (lr_scale, muon), alike in found.items()
    ]


def _layer_buckets(model: Samba, *, max_elements: int, by_muon: Set[nn.Parameter]) -> list[GradientBucket]:
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
        bucket
        for together in (
            layers[bucket.start : bucket.stop] for bucket in bucket_ranges(sizes, max_elements=max_elements)
        )
        for bucket in _stepped_alike(
            (matrix for matrices, _ in together for matrix in matrices),
            weight_decay=True,
            by_muon=by_muon,
            completed_by=together[-1][1],
        )
    ]
