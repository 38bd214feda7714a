"""The Triton kernel that rounds a matrix to FP8 both ways. Imported on a GPU alone."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_COLUMNS = 128, 64


@triton.jit
def _round_tile(
    x,
    scale,
    largest,
    as_it_is,
    transposed,
    rows,
    columns,
    stride,
    first,
    all_columns,
    LIMIT: tl.constexpr,
    RECORDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if RECORDS:
        tl.atomic_max(largest, tl.max(tl.abs(tile)))
    scaled = tile * tl.load(scale)
    # Comparisons with NaN are false, so that NaN stays what it is.
    scaled = tl.where(scaled > LIMIT, LIMIT, tl.where(scaled < -LIMIT, -LIMIT, scaled))
    rounded = scaled.to(as_it_is.dtype.element_ty)
    tl.store(as_it_is + row[:, None] * all_columns + first + column[None, :], rounded, mask=inside)
    there = (first + column).to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(transposed + there, tl.trans(rounded), mask=tl.trans(inside))


def round_part(
    part: Tensor, scale: Tensor, largest: Tensor | None, as_it_is: Tensor, transposed: Tensor, first: int
) -> None:
    """Writes a part of a matrix, which begins at a column of it; see `fp8_rounding.round_both_ways`."""
    part = part if part.stride(1) == 1 else part.contiguous()
    rows, columns = part.shape
    grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS))
    _round_tile[grid](
        part,
        scale,
        scale if largest is None else largest,
        as_it_is,
        transposed,
        rows,
        columns,
        part.stride(0),
        first,
        as_it_is.shape[1],
        LIMIT=torch.finfo(as_it_is.dtype).max,
        RECORDS=largest is not None,
        ROWS=BLOCK_ROWS,
        COLUMNS=BLOCK_COLUMNS,
        num_warps=8,
    )
