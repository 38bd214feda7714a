"""The weights of a matrix product in its own precision, and where their gradients go."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sambalm.parallel.zero.compute_weights import joined
from sambalm.parallel.zero.parameter_info import find_info


def compute_weight(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Returns [out, in] of all weights in dtype.

    A weight whose copy nobody keeps is converted at each use, as is what is no parameter: keys' and values' weights
    where several ranks hold them.
    """
    infos = [find_info(weight) for weight in weights]
    keepers = [info.compute_weights if info else None for info in infos]
    if keepers[0] and all(keepers):
        return keepers[0].of(tuple(weights), dtype)
    kept = zip(weights, keepers, strict=True)
    return joined([keeper.of((weight,), dtype) if keeper else weight for weight, keeper in kept], dtype)


def kept_weight(weights: Sequence[Tensor], computed: Tensor) -> Tensor | None:
    """Returns what autograd keeps of a `compute_weight` for the backward; None where the backward asks for it again."""
    info = find_info(weights[0])
    return None if info and info.is_partitioned else computed


def weight_gradient(weight: Tensor, write: Callable[[Tensor, int], None]) -> Tensor | None:
    """Returns a gradient in the weight's shape and dtype; None where it has been added to the weight's own.

    Args:
        write: given a tensor and beta, writes beta times what is there, and the gradient, into it.
    """
    info = find_info(weight)
    own = weight.grad if info and info.fuses_accumulation else None
    found = torch.empty_like(weight, memory_format=torch.contiguous_format) if own is None else own
    write(found, int(own is not None and info is not None and not info.is_overwritten))
    if own is None or info is None:
        return found
    info.has_product, info.is_overwritten = True, False
    return None
