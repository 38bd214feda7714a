"""Causal sliding-window attention and rotary positions in plain PyTorch."""

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_BLOCK_QUERIES = 512
MIN_BLOCK_QUERIES = 64


class DocumentKeys(Protocol):
    """Which keys are of a query's document."""

    @property
    def first_keys(self) -> Tensor:
        """The index of the first one, int64 [batch, queries]."""


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    documents: DocumentKeys | None = None,
    real_keys: Tensor | None = None,
) -> Tensor:
    """Attention in which each query sees its own position and the window - 1 before it.

    Queries are taken in blocks and each block meets only the keys that it can see, so time and memory grow with
    length x window. Keys may start earlier than queries (a cache, or a neighbour's tokens); both end together.

    Args:
        q: [batch, query heads, query length, head dim].
        k, v: [batch, kv heads, key length, head dim], key length >= query length; query heads are a multiple of kv
            heads and query head h reads kv head h // (query heads / kv heads).
        window: number of positions that a query sees, itself included.
        documents: where the keys of each query's document begin, before which it sees none; None for one document.
        real_keys: bool [batch, key length], False for padding, which no query but its own sees; None without padding.

    Returns:
        [batch, query heads, query length, head dim] in q's dtype; scores are scaled by 1 / sqrt(head dim).
    """
    queries, keys = q.shape[2], k.shape[2]
    unseen = max(0, keys - queries - window + 1)  # by the first query, and so by all
    k, v = k[:, :, unseen:], v[:, :, unseen:]
    before = k.shape[2] - queries  # how many keys come before the first query
    grouped = q.shape[1] != k.shape[1]
    whole = documents is None and real_keys is None
    if whole and queries == 1:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    if whole and before == 0 and queries <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    block_queries = max(MIN_BLOCK_QUERIES, min(window, MAX_BLOCK_QUERIES))
    # Keys and values are split once and joined for each block of queries. A slice for each block would have a gradient
    # as long as the whole sequence, so that the backward grew with the square of the length.
    q_blocks = q.split(block_queries, dim=2)
    sizes = [block.shape[2] for block in q_blocks]
    sizes[0] += before
    starts = [0, *itertools.accumulate(sizes)]
    k_blocks, v_blocks = k.split(sizes, dim=2), v.split(sizes, dim=2)
    outputs = []
    for number, q_block in enumerate(q_blocks):
        end = starts[number + 1]
        first_query = end - q_block.shape[2]
        first_block = max(0, number * block_queries - window + 1) // block_queries
        key_numbers = torch.arange(starts[first_block], end, device=q.device)
        query_numbers = torch.arange(first_query, end, device=q.device)
        mask = window_mask(query_numbers, key_numbers, window=window)
        if documents is not None:
            first_keys = documents.first_keys[:, first_query - before : end - before, None] - unseen
            mask = (mask & (key_numbers >= first_keys)).unsqueeze(1)
        if real_keys is not None:
            real = real_keys[:, None, None, unseen + starts[first_block] : unseen + end]
            mask = mask & (real | (key_numbers == query_numbers[:, None]))
        seen_k, seen_v = (_join(blocks[first_block : number + 1]) for blocks in (k_blocks, v_blocks))
        outputs.append(F.scaled_dot_product_attention(q_block, seen_k, seen_v, attn_mask=mask, enable_gqa=grouped))
    return _join(outputs)


def _join(blocks: Sequence[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks), dim=2)


def window_mask(query_positions: Tensor, key_positions: Tensor, *, window: int) -> Tensor:
    """True where a query at one position sees a key at another; [queries, keys]."""
    distance = query_positions[:, None] - key_positions
    return (distance >= 0) & (distance < window)


def rotary_tables(positions: Tensor, *, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embedding, fp32, [*positions.shape, head_dim / 2].

    Angles are fp64, exact to fp32's rounding for positions up to 1e9. In fp32 neighbours beyond 16,777,216 would have
    one angle. Apple's GPUs lack fp64, so the CPU makes the tables for them.
    """
    device = positions.device
    places = positions.cpu() if device.type == "mps" else positions
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=places.device) / head_dim
    angles = places.to(torch.float64).unsqueeze(-1) / base**exponents
    return angles.cos().to(device, torch.float32), angles.sin().to(device, torch.float32)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of the last dimension (NeoX style) in fp32; cos and sin broadcast against half of x."""
    work = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(work).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
