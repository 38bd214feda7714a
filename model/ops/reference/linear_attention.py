"""Linear attention with decays in plain PyTorch: gated (arXiv 2312.06635), or fixed, as retention (arXiv 2307.08621).

Each head has a matrix as its state. A token decays it, and writes there the product of its key and its value:

    state = exp(g) * state + k v^T,  y = q^T state / sqrt(K)

Within a chunk everything is products of matrices. No exponent is ever positive, whatever decays are.

B: batch, L: length, H: heads, K and V: channels of a key and a value, C: tokens of a chunk.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sambalm.model.ops.reference.chunks import ChunkDecays, run_in_chunks

CHUNK_TOKENS = 64
GATE_NORMALIZER = 16


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decays: Tensor,
    *,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence over a sequence, in fp32 (fp64 for fp64).

    Args:
        q, k: [B, L, H, K]. v: [B, L, H, V].
        log_decays: negative or zero, in fp32 or fp64: of each channel of a key, [B, L, H, K]; of each head, [B, L, H];
            or of a head's every token, [H].
        initial_state: [B, H, K, V]; zeros when None.
        resets: bool [B, L], True for tokens before which the state is dropped; none when None.

    Returns:
        The output [B, L, H, V] in v's dtype and the final state [B, H, K, V] in fp32.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    if initial_state is None:
        initial_state = q.new_zeros(len(q), *q.shape[2:], v.shape[3], dtype=work)
    if log_decays.dim() == 1:
        log_decays = log_decays.expand(q.shape[:3])
    sequences = (q, k, v, log_decays.to(work))
    return run_in_chunks(_chunk, sequences, (), initial_state.to(work), resets, like=v, chunk_tokens=CHUNK_TOKENS)


def _chunk(
    sequences: Sequence[Tensor], _: Sequence[Tensor], state: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence over one chunk of q, k, v and decays. Returns output and state."""
    dtype, work = sequences[2].dtype, state.dtype
    q, k, v, log_decays = (t.to(work).transpose(1, 2) for t in sequences)
    decays = ChunkDecays.of(log_decays if log_decays.dim() == 4 else log_decays.unsqueeze(-1), resets)
    q = q / math.sqrt(q.shape[-1])
    y = (q * decays.since_start) @ state + decays.scores(q, k) @ v
    state = decays.kept * state + (k * decays.until_end).transpose(2, 3) @ v
    return y.transpose(1, 2).to(dtype), state


def gated_log_decays(gate: Tensor, bias: Tensor) -> Tensor:
    """The logarithms of gated linear attention's decays, a sixteenth of those of the gates' sigmoids; in bias's dtype.

    Args:
        gate: [..., keys]. bias: fp32 or fp64 [keys].
    """
    return F.logsigmoid(gate.to(bias.dtype) + bias) / GATE_NORMALIZER


def retention_log_decays(heads: int, *, device: torch.device) -> Tensor:
    """The logarithms of retention's decays, fp32 [heads]: head h, from 0, keeps 1 - 2^(-5 - h) a token."""
    numbers = torch.arange(heads, dtype=torch.float64, device=device)
    return torch.log1p(-torch.exp2(-5 - numbers)).float()
