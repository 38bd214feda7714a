"""Causal sliding-window attention and rotary positions in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_BLOCK_QUERIES = 512
MIN_BLOCK_QUERIES = 64


def window_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
    """Attention in which each query sees its own position and the window - 1 before it.

    Queries are taken in blocks and each block meets only the keys that it can see, so time and memory grow with
    length x window. Keys may start earlier than queries (a cache, or a neighbour's tokens); both end together.

    Args:
        q: [batch, query heads, query length, head dim].
        k, v: [batch, kv heads, key length, head dim], key length >= query length; query heads are a multiple of kv
            heads and query head h reads kv head h // (query heads / kv heads).
        window: number of positions that a query sees, itself included.

    Returns:
        [batch, query heads, query length, head dim] in q's dtype; scores are scaled by 1 / sqrt(head dim).
    """
    queries, keys = q.shape[2], k.shape[2]
    before = keys - queries  # how many keys come before the first query
    grouped = q.shape[1] != k.shape[1]
    if before == 0 and keys <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    block_queries = max(MIN_BLOCK_QUERIES, min(window, MAX_BLOCK_QUERIES))
    outputs = []
    for start in range(0, queries, block_queries):
        end = min(start + block_queries, queries)
        first_key, last_key = max(0, before + start - window + 1), before + end
        mask = window_mask(
            torch.arange(before + start, last_key, device=q.device),
            torch.arange(first_key, last_key, device=q.device),
            window=window,
        )
        seen = slice(first_key, last_key)
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, seen], v[:, :, seen], attn_mask=mask, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2)


def window_mask(query_positions: Tensor, key_positions: Tensor, *, window: int) -> Tensor:
    """True where a query at one position sees a key at another; [queries, keys]."""
    distance = query_positions[:, None] - key_positions
    return (distance >= 0) & (distance < window)


def rotary_tables(positions: Tensor, *, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embedding, fp32, [*positions.shape, head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.to(torch.float32).unsqueeze(-1) / base**exponents
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of the last dimension (NeoX style) in fp32; cos and sin broadcast against half of x."""
    work = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(work).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
