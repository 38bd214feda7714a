"""Window attention of one token a row over keys and values in rings, which take the token in.

A row's token at position p has the place p % window of its row's ring, so the place of the token that leaves the
window. A program takes the query heads of one kv head and a part of the ring; the last one of a head puts the parts
together.

B: rows, H: query heads, K: kv heads, W: window, d: head dim.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sambalm.model.ops.decode.linear import Workspace

BLOCK_KEYS = 64


class RingAttention:
    """The attention of one layer with its rings `keys` and `values` [B, K, W, d].

    Args:
        query_heads: H, a multiple of K.
        rotary_base: the base of the rotary angles, which are computed in fp64; None: nothing is rotated.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, workspace: Workspace, *, query_heads: int, rotary_base: float | None
    ) -> None:
        self.keys, self.values, self.workspace = keys, values, workspace
        rows, self.kv_heads, self.window, self.head_dim = keys.shape
        self.group = query_heads // self.kv_heads
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=keys.device) / self.head_dim
        # Of each pair, a position.
        self.turns = exponents * 0 if rotary_base is None else rotary_base**-exponents / (2 * math.pi)
        self.splits = workspace.splits(rows * self.kv_heads, most=max(1, self.window // BLOCK_KEYS), waves=2)
        self.heads = max(16, triton.next_power_of_2(self.group))
        self.dims = max(16, triton.next_power_of_2(self.head_dim))
        tiles = rows * self.kv_heads
        workspace.reserve(sums=tiles * self.splits * self.heads * (self.dims + 2), tiles=tiles)

    def __call__(self, qkv: Tensor, positions: Tensor, out: Tensor) -> None:
        """Writes [B, H * d or more] for the token of each row.

        Args:
            qkv: [B, (H + 2 K) * d or more], before the rotation.
            positions: int64 [B].
        """
        share = triton.cdiv(triton.cdiv(self.window, self.splits), BLOCK_KEYS) * BLOCK_KEYS
        _attend[self.kv_heads, len(qkv), self.splits](
            qkv,
            positions,
            self.turns,
            self.keys,
            self.values,
            out,
            self.workspace.sums,
            self.workspace.arrived,
            qkv.stride(0),
            out.stride(0),
            1 / math.sqrt(self.head_dim),
            WINDOW=self.window,
            SHARE=share,
            SPLITS=self.splits,
            GROUP=self.group,
            HEADS=self.heads,
            DIM=self.head_dim,
            DIMS=self.dims,
            KEYS=BLOCK_KEYS,
            LINES=triton.next_power_of_2(triton.cdiv(share * self.head_dim * self.keys.element_size(), 128)),
            PREFETCHES=self.keys.is_cuda,
            num_warps=2,
            num_stages=2,
        )


@triton.jit
def _prefetch(at):
    """Has the cache lines at these addresses brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _rotated(at, dim, other_dim, mask, cos, sin, dtype: tl.constexpr):
    """Rotates pairs of a first and a second half; sin is negative for the first."""
    values = tl.load(at + dim, mask=mask, other=0.0).to(tl.float32)
    others = tl.load(at + other_dim, mask=mask, other=0.0).to(tl.float32)
    return (values * cos + others * sin).to(dtype)


@triton.jit
def _attend(
    qkv,
    positions,
    turns,
    keys,
    values,
    out,
    sums,
    arrived,
    qkv_stride,
    out_stride,
    scale,
    WINDOW: tl.constexpr,
    SHARE: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
    LINES: tl.constexpr,
    PREFETCHES: tl.constexpr,
):
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(0)
    dtype: tl.constexpr = keys.dtype.element_ty
    HALF: tl.constexpr = DIM // 2
    head, dim, key = tl.arange(0, HEADS), tl.arange(0, DIMS), tl.arange(0, KEYS)
    ring = (row.to(tl.int64) * kv_heads + kv_head) * WINDOW * DIM
    keys += ring
    values += ring
    first = split * SHARE
    if PREFETCHES:  # they come while angles and queries are computed
        line = tl.arange(0, LINES) * (128 * 8 // dtype.primitive_bitwidth)
        line = (
            tl.where(line < (tl.minimum(first + SHARE, WINDOW) - first) * DIM, line, 0)
            + tl.minimum(first, WINDOW - 1) * DIM
        )
        _prefetch(keys + line)
        _prefetch(values + line)
    is_dim, is_query = dim < DIM, (head < GROUP)[:, None]
    other_dim = tl.where(dim < HALF, dim + HALF, dim - HALF)
    position = tl.load(positions + row)
    angle = position.to(tl.float64) * tl.load(turns + dim % HALF)
    angle = ((angle - tl.floor(angle)) * 6.283185307179586).to(tl.float32)
    cos, sin = tl.cos(angle), tl.where(dim < HALF, -tl.sin(angle), tl.sin(angle))
    qkv += row * qkv_stride
    query_at = qkv + (kv_head * GROUP + head)[:, None] * DIM
    inside = is_query & is_dim[None, :]
    query = _rotated(query_at, dim[None, :], other_dim[None, :], inside, cos[None, :], sin[None, :], dtype)
    own = position % WINDOW
    greatest = tl.full([HEADS], -1.0e30, dtype=tl.float32)
    weight = tl.zeros([HEADS], dtype=tl.float32)
    total = tl.zeros([HEADS, DIMS], dtype=tl.float32)
    if (own >= first) & (own < first + SHARE):
        new_at = qkv + (kv_heads * GROUP + kv_head) * DIM
        new = _rotated(new_at, dim, other_dim, is_dim, cos, sin, dtype)
        tl.store(keys + own * DIM + dim, new, mask=is_dim)
        value = tl.load(new_at + kv_heads * DIM + dim, mask=is_dim, other=0.0)
        tl.store(values + own * DIM + dim, value, mask=is_dim)
        greatest = tl.sum(query.to(tl.float32) * new.to(tl.float32)[None, :], 1) * scale
        weight += 1
        total += value.to(tl.float32)[None, :]
    for start in range(first, tl.minimum(tl.minimum(first + SHARE, WINDOW), position), KEYS):
        place = start + key
        # The ring's own place holds a key that has left the window, or the one that was stored above.
        is_key = (place < WINDOW) & (place < position) & (place != own)
        at = place[:, None] * DIM + dim[None, :]
        is_inside = is_key[:, None] & is_dim[None, :]
        kept = tl.load(keys + at, mask=is_inside, other=0.0)
        scores = tl.dot(query, tl.trans(kept), input_precision="ieee") * scale
        scores = tl.where(is_key[None, :], scores, -1.0e30)
        greater = tl.maximum(greatest, tl.max(scores, 1))
        shrinks = tl.exp(greatest - greater)
        weights = tl.where(is_key[None, :], tl.exp(scores - greater[:, None]), 0.0)
        value = tl.load(values + at, mask=is_inside, other=0.0)
        weight = weight * shrinks + tl.sum(weights, 1)
        total = total * shrinks[:, None]
        total = tl.dot(weights.to(dtype), value, total, input_precision="ieee")
        greatest = greater
    is_last = True
    if SPLITS > 1:
        tile = row * kv_heads + kv_head
        part = sums + tile * SPLITS * HEADS * (DIMS + 2)
        part_at = part + split * HEADS * (DIMS + 2)
        total_at = head[:, None] * DIMS + dim[None, :]
        tl.store(part_at + total_at, total)
        tl.store(part_at + HEADS * DIMS + head, greatest)
        tl.store(part_at + HEADS * DIMS + HEADS + head, weight)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        if SPLITS > 1:
            tl.debug_barrier()
            tl.store(arrived + tile, 0)
            greatest = tl.full([HEADS], -1.0e30, dtype=tl.float32)
            weight = tl.zeros([HEADS], dtype=tl.float32)
            total = tl.zeros([HEADS, DIMS], dtype=tl.float32)
            for one in range(SPLITS):
                part_at = part + one * HEADS * (DIMS + 2)
                maximum = tl.load(part_at + HEADS * DIMS + head, cache_modifier=".cg")
                greater = tl.maximum(greatest, maximum)
                shrinks, counts = tl.exp(greatest - greater), tl.exp(maximum - greater)
                one_weight = tl.load(part_at + HEADS * DIMS + HEADS + head, cache_modifier=".cg")
                weight = weight * shrinks + one_weight * counts
                one_total = tl.load(part_at + total_at, cache_modifier=".cg")
                total = total * shrinks[:, None] + one_total * counts[:, None]
                greatest = greater
        at = out + row * out_stride + (kv_head * GROUP + head)[:, None] * DIM + dim[None, :]
        tl.store(at, total / weight[:, None], mask=is_query & is_dim[None, :])
