"""Sliding-window attention through PyTorch's flex_attention, whose kernel is compiled for the window."""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sambalm.model.ops.compiled import compiled
from sambalm.model.ops.documents import AttentionDocuments

BLOCK = 128  # queries, and keys, that are seen or skipped together


def flex_window(q: Tensor, k: Tensor, v: Tensor, *, window: int, documents: AttentionDocuments | None = None) -> Tensor:
    """`window_attention.window_attention` on a GPU in bf16 or fp16."""
    queries, keys = q.shape[2], k.shape[2]
    if documents is None:
        mask = _window_blocks(queries, keys, window, q.device)
    else:
        if window not in documents.masks:  # made once for all layers
            documents.masks[window] = document_blocks(documents.first_keys, keys=keys, window=window)
        mask = documents.masks[window]
    # Else fewer queries than a block are taken for decoding, whose kernel fails for 127 queries of two heads a kv head.
    options = {"FORCE_USE_FLEX_ATTENTION": True} if queries < BLOCK else None
    return _compiled()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options)


@cache
def _compiled() -> Callable[..., Tensor]:
    return compiled(flex_attention)


@lru_cache(maxsize=32)
def _window_blocks(queries: int, keys: int, window: int, device: torch.device) -> BlockMask:
    """The blocks of a window, without a mask of single positions."""
    before = keys - queries

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + before - key
        return (distance >= 0) & (distance < window)

    positions = torch.arange(before, keys, device=device)
    return _blocks((positions - window + 1).unsqueeze(0), positions, keys=keys, sees=sees)


def document_blocks(first_keys: Tensor, *, keys: int, window: int) -> BlockMask:
    """The blocks of a window within documents, made on their device without a word from the host.

    Args:
        first_keys: int64 [batch, queries], as `AttentionDocuments.first_keys`.
    """
    queries = first_keys.shape[1]
    before = keys - queries

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + before - key
        return (distance >= 0) & (distance < window) & (key >= first_keys[batch, query])

    positions = torch.arange(before, keys, device=first_keys.device)
    return _blocks(torch.maximum(first_keys, positions - window + 1), positions, keys=keys, sees=sees)


def _blocks(first_seen: Tensor, positions: Tensor, *, keys: int, sees: Callable[..., Tensor]) -> BlockMask:
    """Which blocks of keys each block of queries sees in part or whole.

    Args:
        first_seen: [batch, queries], the first key that each query sees, which never goes back from query to query.
        positions: [queries], the last.
        sees: flex_attention's mask_mod.
    """
    queries = len(positions)
    first, last = (torch.arange(0, queries, BLOCK, device=positions.device) + end for end in (0, BLOCK - 1))
    last = last.clamp(max=queries - 1)
    key = torch.arange(0, keys, BLOCK, device=positions.device)  # the first of each block
    least, most = (first_seen[:, of].unsqueeze(2) for of in (first, last))  # by a block's first query, and by its last
    seen = (key <= positions[last].unsqueeze(1)) & (key + BLOCK > least)
    whole = (key + BLOCK - 1 <= positions[first].unsqueeze(1)) & (key >= most)
    part_counts, part_blocks = _listed(seen & ~whole)
    whole_counts, whole_blocks = _listed(whole)
    return BlockMask.from_kv_blocks(
        part_counts, part_blocks, whole_counts, whole_blocks, BLOCK, mask_mod=sees, seq_lengths=(queries, keys)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many are True in each row, and their numbers before the others', int32 [batch, 1, rows] and [..., all]."""
    numbers = blocks.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    return blocks.sum(2).to(torch.int32).unsqueeze(1), numbers.to(torch.int32).unsqueeze(1)
