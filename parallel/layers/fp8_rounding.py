"""Rounding matrices to FP8 in one pass over memory: as they are, transposed, and with their largest number."""

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor


def round_both_ways(
    parts: Sequence[Tensor],
    scale: Tensor,
    *,
    largest: Tensor | None,
    dtype: torch.dtype,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rounds scale times a matrix whose parts stand side by side; what is larger than dtype holds becomes its largest.

    Args:
        parts: [rows, columns of each], in one dtype, the columns next to each other in memory.
        scale: fp32 [].
        largest: fp32 [], which becomes the largest absolute number of the matrix if that is larger.
        dtype: an FP8 format.
        out: contiguous tensors to write to.

    Returns:
        [rows, columns] and [columns, rows] in dtype, both contiguous.
    """
    rows, columns = parts[0].shape[0], sum(part.shape[1] for part in parts)
    as_it_is, transposed = out or (
        torch.empty(rows, columns, dtype=dtype, device=scale.device),
        torch.empty(columns, rows, dtype=dtype, device=scale.device),
    )
    if scale.is_cuda:
        kernel, first = import_module("sambalm.parallel.layers.fp8_kernel"), 0
        for part in parts:
            kernel.round_part(part, scale, largest, as_it_is, transposed, first)
            first += part.shape[1]
        return as_it_is, transposed
    whole = torch.cat([part.float() for part in parts], dim=1)
    limit = torch.finfo(dtype).max
    as_it_is.copy_((whole * scale).clamp(-limit, limit).to(dtype))
    transposed.copy_(as_it_is.t())
    if largest is not None:
        largest.copy_(torch.maximum(largest, whole.abs().amax()))
    return as_it_is, transposed
