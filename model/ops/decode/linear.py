"""Projections of one token a row: the time is that of reading the weights once, so everything else rides along.

A program computes a few columns for up to 64 rows. The norm before a projection, SwiGLU between two, and the residual
sum behind one are computed in it. Where columns alone would not fill the device, the width is split over programs, of
which the last one to arrive adds up what all have left in memory, in a fixed order: two runs give the same bits.

B: rows, K: width that is read, N: columns.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK_WIDTH = 256
PROGRAMS_PER_MULTIPROCESSOR = 2


class Norm(NamedTuple):
    """The RMS norm of a projection's input."""

    weight: Tensor  # [K]
    eps: float


class Workspace:
    """What the kernels of one stream share, since one runs after the other: sums of splits, and counts of programs.

    Args:
        rows: texts that go on by a token at a time.
        multiprocessors: of the device, which the programs are to fill.
    """

    def __init__(self, rows: int, *, device: torch.device, multiprocessors: int) -> None:
        self.rows, self.device, self.multiprocessors = rows, device, multiprocessors
        self.sums = torch.empty(0, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(0, dtype=torch.int32, device=device)

    def splits(self, tiles: int, *, most: int) -> int:
        """Returns over how many programs each of so many tiles is split to fill the device; a power of two."""
        splits = 1
        while splits * 2 <= most and splits * tiles < PROGRAMS_PER_MULTIPROCESSOR * self.multiprocessors:
            splits *= 2
        return splits

    def reserve(self, *, sums: int, tiles: int) -> None:
        """Makes room for so many fp32 sums and counts. It is called before any kernel is captured."""
        if sums > self.sums.numel():
            self.sums = self.sums.new_empty(sums)
        if tiles > self.arrived.numel():
            self.arrived = self.arrived.new_zeros(tiles)


def held_width(width: int) -> int:
    """Returns the width with which activations and weights are held, whole blocks; behind `width` they are zero."""
    block = block_width(width)
    return -(-width // block) * block


def block_width(width: int) -> int:
    return min(MAX_BLOCK_WIDTH, max(16, triton.next_power_of_2(width)))


def activations(rows: int, width: int, *, like: Tensor) -> Tensor:
    """Returns zeros [rows, held_width(width)] of a tensor's dtype and device."""
    return torch.zeros(rows, held_width(width), dtype=like.dtype, device=like.device)


class RowLinear:
    """Maps activations [B, held K] to [B, N or more], with fp32 sums.

    Args:
        weight: [N, K].
        up: [N, K] of a second projection; the result is then SiLU(x weight^T) * (x up^T).
        norm: normalises the input first.
    """

    def __init__(
        self, weight: Tensor, workspace: Workspace, *, up: Tensor | None = None, norm: Norm | None = None
    ) -> None:
        self.columns, self.width = weight.shape
        self.weight = _held(weight)
        self.up = None if up is None else _held(up)
        self.norm, self.workspace = norm, workspace
        if norm:
            self.norm = norm._replace(weight=_held(norm.weight[None])[0])
        rows = workspace.rows
        self.block_rows = min(64, max(16, triton.next_power_of_2(rows)))
        self.block_columns = 32 if self.columns >= 1024 else 16
        tiles = -(-self.columns // self.block_columns) * -(-rows // self.block_rows)
        blocks = self.weight.shape[1] // block_width(self.width)
        self.splits = workspace.splits(tiles, most=1 if up is not None else blocks)
        if self.splits > 1:
            workspace.reserve(sums=self.splits * rows * (self.columns + 1), tiles=tiles)

    def __call__(self, x: Tensor, out: Tensor, *, adds: bool = False) -> Tensor:
        """Writes to out, or adds to it, and returns it."""
        rows, block = self.workspace.rows, block_width(self.width)
        grid = (triton.cdiv(self.columns, self.block_columns), self.splits, triton.cdiv(rows, self.block_rows))
        _linear[grid](
            x,
            self.weight,
            self.weight if self.up is None else self.up,
            self.norm.weight if self.norm else self.weight,
            out,
            self.workspace.sums,
            self.workspace.arrived,
            rows,
            self.columns,
            self.weight.shape[1],
            x.stride(0),
            out.stride(0),
            1 / self.width,
            self.norm.eps if self.norm else 0.0,
            NORMS=self.norm is not None,
            GATED=self.up is not None,
            ADDS=adds,
            SPLITS=self.splits,
            ROWS=self.block_rows,
            COLUMNS=self.block_columns,
            WIDTH=block if self.block_rows < 64 else min(block, 128),
            num_warps=4,
            num_stages=4,
        )
        return out


def _held(weight: Tensor) -> Tensor:
    """Returns the weight with zeros behind its width where it does not have whole blocks; else the weight itself."""
    more = held_width(weight.shape[1]) - weight.shape[1]
    return torch.nn.functional.pad(weight, (0, more)) if more else weight.contiguous()


@triton.jit
def _linear(
    x,
    weight,
    up,
    norm_weight,
    out,
    sums,
    arrived,
    rows,
    columns,
    width,
    x_stride,
    out_stride,
    per_width,
    eps,
    NORMS: tl.constexpr,
    GATED: tl.constexpr,
    ADDS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    is_row, is_column = (row < rows)[:, None], column < columns
    share = tl.cdiv(width // WIDTH, SPLITS) * WIDTH
    first = split * share
    x_at = x + row[:, None] * x_stride + tl.arange(0, WIDTH)[None, :]
    weight_at = column.to(tl.int64)[:, None] * width + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    total_up = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    squares = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(first, tl.minimum(first + share, width), WIDTH):
        values = tl.load(x_at + start, mask=is_row, other=0.0)
        own = tl.load(weight + weight_at + start, mask=is_column[:, None], other=0.0)
        if NORMS:
            wide = values.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            scales = tl.load(norm_weight + start + tl.arange(0, WIDTH)).to(tl.float32)
            values = (wide * scales[None, :]).to(own.dtype)
        total = tl.dot(values, tl.trans(own), total, input_precision="ieee")
        if GATED:
            other = tl.load(up + weight_at + start, mask=is_column[:, None], other=0.0)
            total_up = tl.dot(values, tl.trans(other), total_up, input_precision="ieee")
    place = row[:, None] * columns + column[None, :]
    inside = is_row & is_column[None, :]
    is_last = True
    if SPLITS > 1:
        squares_at = sums + SPLITS * rows * columns + row
        tl.store(sums + split * rows * columns + place, total, mask=inside)
        tl.store(squares_at + split * rows, squares, mask=row < rows)
        tl.debug_barrier()
        count = arrived + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        is_last = tl.atomic_add(count, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        if SPLITS > 1:
            tl.debug_barrier()
            tl.store(count, 0)
            total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            squares = tl.zeros([ROWS], dtype=tl.float32)
            for one in tl.static_range(SPLITS):
                total += tl.load(sums + one * rows * columns + place, mask=inside, other=0.0, cache_modifier=".cg")
                squares += tl.load(squares_at + one * rows, mask=row < rows, other=0.0, cache_modifier=".cg")
        if NORMS:
            norms = tl.rsqrt(squares * per_width + eps)[:, None]
            total *= norms
            total_up *= norms
        if GATED:
            total = total * tl.sigmoid(total) * total_up
        out_at = out + row[:, None] * out_stride + column[None, :]
        if ADDS:
            total += tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_at, total, mask=inside)
