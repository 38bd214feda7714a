"""Projections of one token a row: the time is that of reading the weights once, so everything else rides along.

A program computes a few columns for up to 64 rows. Where columns alone would not fill the device, the width is split
over programs, of which the last one to arrive adds up what all have left in memory, in a fixed order: two runs give the
same bits. SwiGLU and the residual sum are computed behind a projection. So is the norm: what writes the residual stream
leaves it multiplied by the next norm's weight, and its sums of squares, and the product is divided by their root.

B: rows, K: width that is read, N: columns, W: width of the residual stream.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK_WIDTH = 128
STREAM_COLUMNS = 32  # of a sum of squares
INTERPRETED_MULTIPROCESSORS = 8  # on a CPU, where Triton's interpreter runs the kernels


class Norm(NamedTuple):
    """The RMS norm of a projection's input."""

    weight: Tensor  # [W]
    eps: float


class HeldWeights:
    """Weights as kernels read them: several joined along their rows, and zeros behind a width without whole blocks."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, *weights: Tensor) -> Tensor:
        """Returns [rows of all, held width]: a weight itself where it is so already, or its one copy."""
        width = weights[0].shape[1]
        more = held_width(width) - width
        if len(weights) == 1 and not more and weights[0].is_contiguous():
            return weights[0]
        places = tuple(weight.data_ptr() for weight in weights)
        if places not in self._copies:
            self._copies[places] = torch.nn.functional.pad(torch.cat(weights), (0, more))
        return self._copies[places]


class Workspace:
    """What the kernels of one stream share, since one runs after the other: sums of splits, and counts of programs.

    Args:
        rows: texts that go on by a token at a time.
        held: the weights that had to be copied, which workspaces of one model share.
    """

    def __init__(self, rows: int, *, device: torch.device, held: "HeldWeights | None" = None) -> None:
        self.rows, self.multiprocessors = rows, INTERPRETED_MULTIPROCESSORS
        self.held = HeldWeights() if held is None else held
        if device.type == "cuda":
            self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self.sums = torch.empty(0, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(0, dtype=torch.int32, device=device)

    def splits(self, tiles: int, *, most: int, waves: float) -> int:
        """Returns over how many programs each of so many tiles is split, a power of two.

        Args:
            most: splits at most.
            waves: programs of a multiprocessor, at least.
        """
        splits = 1
        while splits * 2 <= most and splits * tiles < waves * self.multiprocessors:
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


class ResidualStream:
    """The residual stream of one token a row, and what the next norm needs of it.

    `values` are [B, W]. `scaled` [B, held W] are they times the weight of the norm that comes next. `squares`, fp32
    [tiles, B], are the sums of the squares of STREAM_COLUMNS values each.
    """

    def __init__(self, workspace: Workspace, *, like: Tensor) -> None:
        rows, width = workspace.rows, like.shape[1]
        self.workspace = workspace
        self.values = like.new_zeros(rows, width)
        self.scaled = activations(rows, width, like=like)
        self.squares = like.new_zeros(-(-width // STREAM_COLUMNS), rows, dtype=torch.float32)

    def start(self, ids: Tensor, embeddings: Tensor, following: Tensor) -> None:
        """Becomes the embeddings [V, W] of ids, int64 [B], scaled by the weight [W] of the norm that follows."""
        rows, width = self.values.shape
        block_rows = min(16, triton.next_power_of_2(rows))
        _embed[len(self.squares), triton.cdiv(rows, block_rows)](
            ids,
            embeddings,
            following,
            self.values,
            self.scaled,
            self.squares,
            rows,
            width,
            self.scaled.stride(0),
            ROWS=block_rows,
            COLUMNS=STREAM_COLUMNS,
            num_warps=1,
        )


class Tiling(NamedTuple):
    """What a program computes, and by how much."""

    rows: int
    columns: int
    splits: int
    stages: int  # of loading ahead
    warps: int

    @classmethod
    def of(cls, columns: int, blocks: int, workspace: Workspace, *, gated: bool) -> "Tiling":
        """Chooses it for so many columns and blocks of the width, as measured on an H200 with 16 rows."""
        rows = min(64, max(16, triton.next_power_of_2(workspace.rows)))
        row_tiles, few = triton.cdiv(workspace.rows, rows), rows == 16
        if gated:
            return cls(rows, 16, 1, 4, 1 if few else 4)
        wide_tiles = triton.cdiv(columns, 64) * row_tiles
        if wide_tiles >= 0.95 * workspace.multiprocessors:
            is_one_wave = wide_tiles <= 2 * workspace.multiprocessors
            return cls(rows, 64, 1, 6 if is_one_wave and few else 4, (2 if is_one_wave else 1) if few else 4)
        own = STREAM_COLUMNS if columns >= 1024 else 16
        splits = workspace.splits(triton.cdiv(columns, own) * row_tiles, most=blocks, waves=1.2)
        return cls(rows, own, splits, 5 if few else 4, (1 if own == STREAM_COLUMNS else 2) if few else 4)


class RowLinear:
    """A projection of activations [B, held K] to [B, N], with fp32 sums.

    Args:
        weights: [N, K], or several whose rows are N together.
        up: [N, K] of a second projection; the result is then SiLU(x weight^T) * (x up^T).
    """

    def __init__(self, *weights: Tensor, workspace: Workspace, up: Tensor | None = None) -> None:
        self.columns, self.width = sum(map(len, weights)), weights[0].shape[1]
        self.weight = workspace.held(*weights)
        self.up = None if up is None else workspace.held(up)
        self.workspace = workspace
        blocks = self.weight.shape[1] // block_width(self.width)
        self.tiling = Tiling.of(self.columns, blocks, workspace, gated=up is not None)
        tiles = triton.cdiv(self.columns, self.tiling.columns) * triton.cdiv(workspace.rows, self.tiling.rows)
        workspace.reserve(sums=self.tiling.splits * workspace.rows * self.columns, tiles=tiles)

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """Writes the projection of x [B, held K] to out [B, N or more], and returns out."""
        self._launch(x, out)
        return out

    def of_stream(self, stream: ResidualStream, out: Tensor, *, eps: float) -> Tensor:
        """Writes the projection of the normed stream to out [B, N or more], and returns out."""
        self._launch(stream.scaled, out, normed=stream, eps=eps)
        return out

    def into_stream(self, x: Tensor, stream: ResidualStream, following: Tensor) -> None:
        """Adds the projection of x to the stream, and leaves it scaled by the weight [W] of the norm that follows."""
        self._launch(x, stream.values, added_to=stream, following=following)

    def _launch(
        self,
        x: Tensor,
        out: Tensor,
        *,
        normed: ResidualStream | None = None,
        eps: float = 0.0,
        added_to: ResidualStream | None = None,
        following: Tensor | None = None,
    ) -> None:
        rows, stream, tiling = self.workspace.rows, normed or added_to, self.tiling
        if added_to:  # a program makes one sum of squares
            tiling = tiling._replace(columns=STREAM_COLUMNS)
        grid = (triton.cdiv(self.columns, tiling.columns), tiling.splits, triton.cdiv(rows, tiling.rows))
        _linear[grid](
            x,
            self.weight,
            self.weight if self.up is None else self.up,
            out,
            self.workspace.sums,
            self.workspace.arrived,
            stream.squares if stream else self.workspace.sums,
            stream.scaled if stream else out,
            self.weight if following is None else following,
            rows,
            self.columns,
            self.weight.shape[1],
            x.stride(0),
            out.stride(0),
            stream.scaled.stride(0) if stream else 0,
            1 / self.width,
            eps,
            NORM_TILES=len(normed.squares) if normed else 0,
            NORM_BLOCK=triton.next_power_of_2(len(normed.squares)) if normed else 1,
            ADDS=added_to is not None,
            GATED=self.up is not None,
            SPLITS=tiling.splits,
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            WIDTH=block_width(self.width),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )


@triton.jit
def _into_stream(values, out_at, stream_at, squares_at, weight, is_row, is_column, row_inside, out_dtype: tl.constexpr):
    """Stores a tile of the residual stream, scaled for the next norm too, and its sums of squares."""
    inside = is_row & is_column[None, :]
    values = values.to(out_dtype)
    tl.store(out_at, values, mask=inside)
    values = values.to(tl.float32)
    tl.store(stream_at, values * weight.to(tl.float32)[None, :], mask=inside)
    tl.store(squares_at, tl.sum(tl.where(inside, values * values, 0.0), 1), mask=row_inside)


@triton.jit
def _embed(
    ids,
    embeddings,
    following,
    values,
    scaled,
    squares,
    rows,
    width,
    scaled_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row, is_column = (row < rows)[:, None], column < width
    number = tl.load(ids + row, mask=row < rows, other=0)
    tile = tl.load(embeddings + number[:, None] * width + column[None, :], mask=is_row & is_column[None, :], other=0.0)
    _into_stream(
        tile,
        values + row[:, None] * width + column[None, :],
        scaled + row[:, None] * scaled_stride + column[None, :],
        squares + tl.program_id(0) * rows + row,
        tl.load(following + column, mask=is_column, other=0.0),
        is_row,
        is_column,
        row < rows,
        values.dtype.element_ty,
    )


@triton.jit
def _linear(
    x,
    weight,
    up,
    out,
    sums,
    arrived,
    squares,
    scaled,
    following,
    rows,
    columns,
    width,
    x_stride,
    out_stride,
    scaled_stride,
    per_width,
    eps,
    NORM_TILES: tl.constexpr,
    NORM_BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    GATED: tl.constexpr,
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
    for start in range(first, tl.minimum(first + share, width), WIDTH):
        values = tl.load(x_at + start, mask=is_row, other=0.0)
        own = tl.load(weight + weight_at + start, mask=is_column[:, None], other=0.0)
        total = tl.dot(values, tl.trans(own), total, input_precision="ieee")
        if GATED:
            other = tl.load(up + weight_at + start, mask=is_column[:, None], other=0.0)
            total_up = tl.dot(values, tl.trans(other), total_up, input_precision="ieee")
    place = row[:, None] * columns + column[None, :]
    inside = is_row & is_column[None, :]
    is_last = True
    if SPLITS > 1:
        tl.store(sums + split * rows * columns + place, total, mask=inside)
        tl.debug_barrier()
        count = arrived + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        is_last = tl.atomic_add(count, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        if SPLITS > 1:
            tl.debug_barrier()
            tl.store(count, 0)
            total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            for one in tl.static_range(SPLITS):
                total += tl.load(sums + one * rows * columns + place, mask=inside, other=0.0, cache_modifier=".cg")
        if NORM_TILES > 0:
            tile = tl.arange(0, NORM_BLOCK)
            of_tiles = (tile < NORM_TILES)[:, None] & (row < rows)[None, :]
            parts = tl.load(squares + tile[:, None] * rows + row[None, :], mask=of_tiles, other=0.0)
            norms = tl.rsqrt(tl.sum(parts, 0) * per_width + eps)[:, None]
            total *= norms
            total_up *= norms
        if GATED:
            total = total * tl.sigmoid(total) * total_up
        out_at = out + row[:, None] * out_stride + column[None, :]
        if ADDS:
            _into_stream(
                total + tl.load(out_at, mask=inside, other=0.0).to(tl.float32),
                out_at,
                scaled + row[:, None] * scaled_stride + column[None, :],
                squares + tl.program_id(0) * rows + row,
                tl.load(following + column, mask=is_column, other=0.0),
                is_row,
                is_column,
                row < rows,
                out.dtype.element_ty,
            )
        else:
            tl.store(out_at, total, mask=inside)
