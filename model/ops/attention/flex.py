"""Sliding-window attention through PyTorch's flex_attention, whose kernel is compiled for the window."""

from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sambalm.model.ops.errors import KernelError

BLOCK = 128  # queries, and keys, that are seen or skipped together


def flex_window(q: Tensor, k: Tensor, v: Tensor, *, window: int, documents: None = None) -> Tensor:
    """`window_attention.window_attention` on a GPU in bf16 or fp16, of one document; raises KernelError for several."""
    if documents is not None:
        raise KernelError("the attention 'flex' does not keep packed documents apart: set kernels.attention to 'auto'")
    mask = _window_blocks(q.shape[2], k.shape[2], window, q.device)
    # Else fewer queries than a block are taken for decoding, whose kernel fails for 127 queries of two heads a kv head.
    options = {"FORCE_USE_FLEX_ATTENTION": True} if q.shape[2] < BLOCK else None
    return _compiled()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options)


@cache
def _compiled():
    return torch.compile(flex_attention)


@lru_cache(maxsize=32)
def _window_blocks(queries: int, keys: int, window: int, device: torch.device) -> BlockMask:
    """Which blocks of keys each block of queries sees in part or whole, without a mask of single positions."""
    before = keys - queries

    def sees(batch, head, query, key):
        distance = query + before - key
        return (distance >= 0) & (distance < window)

    first_query = torch.arange(before, keys, BLOCK, device=device).unsqueeze(1)
    first_key = torch.arange(0, keys, BLOCK, device=device)
    last_query, last_key = (first_query + BLOCK - 1).clamp(max=keys - 1), first_key + BLOCK - 1
    seen = (first_key <= last_query) & (last_key > first_query - window)
    whole = (last_key <= first_query) & (first_key > last_query - window)
    part_counts, part_blocks = _listed(seen & ~whole)
    whole_counts, whole_blocks = _listed(whole)
    return BlockMask.from_kv_blocks(
        part_counts, part_blocks, whole_counts, whole_blocks, BLOCK, mask_mod=sees, seq_lengths=(queries, keys)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many are True in each row, and their numbers before the others', int32 [1, 1, rows] and [1, 1, rows, all]."""
    numbers = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).to(torch.int32)[None, None], numbers.to(torch.int32)[None, None]
