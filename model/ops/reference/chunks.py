"""What the recurrences over chunks of tokens share: running and differentiating them, and decays within a chunk.

B: batch, L: length, H: heads, K: channels of a key, C: tokens of a chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_TOKENS = 16  # within which decays of channels are taken for each pair of tokens

# Of a chunk's tokens, the weights, the state before the chunk and its resets: the output and the state after it.
Chunk = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor | None], tuple[Tensor, Tensor]]


def run_in_chunks(
    chunk: Chunk,
    sequences: Sequence[Tensor],
    weights: Sequence[Tensor],
    state: Tensor,
    resets: Tensor | None,
    *,
    like: Tensor,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Runs a recurrence chunk by chunk. Its backward has the inputs and the states between chunks, and no more.

    Args:
        sequences: [B, L, ...]. weights: without tokens.
        state: before the first token, in the dtype that is computed in.
        resets: bool [B, L]; none when None.
        like: a tensor of the output's shape and dtype, [B, L, ...].

    Returns:
        The output, and the state after the last token.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a compiler finds a backward of its own
        return _Chunks.apply(chunk, chunk_tokens, like.detach(), len(sequences), resets, state, *sequences, *weights)
    y, state, _ = _run(chunk, sequences, weights, state, resets, like=like, chunk_tokens=chunk_tokens)
    return y, state


class _Chunks(torch.autograd.Function):
    """Keeps its inputs and the states between chunks, and computes each chunk again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        chunk: Chunk,
        chunk_tokens: int,
        like: Tensor,
        count: int,
        resets: Tensor | None,
        state: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.chunk, ctx.chunk_tokens, ctx.count = chunk, chunk_tokens, count
        sequences, weights = inputs[:count], inputs[count:]
        y, state, states = _run(chunk, sequences, weights, state, resets, like=like, chunk_tokens=chunk_tokens)
        ctx.save_for_backward(resets, *inputs, *states)
        return y, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        *_, is_state_wanted = ctx.needs_input_grad[:6]
        wanted = ctx.needs_input_grad[6:]
        resets, *saved = ctx.saved_tensors  # once: recomputation unpacks them once
        inputs, states = saved[: len(wanted)], saved[len(wanted) :]
        grads = [torch.zeros_like(t) if is_wanted else None for t, is_wanted in zip(inputs, wanted, strict=True)]
        spans = list(_spans(grad_y.shape[1], ctx.chunk_tokens))
        for state, span in reversed(list(zip(states, spans, strict=True))):
            parts = [t[:, span] if number < ctx.count else t for number, t in enumerate(inputs)]
            given = [t.detach().requires_grad_(need) for t, need in zip((*parts, state), (*wanted, True), strict=True)]
            *tensors, before = given
            with torch.enable_grad():
                part_resets = None if resets is None else resets[:, span]
                results = ctx.chunk(tensors[: ctx.count], tensors[ctx.count :], before, part_resets)
            *found, grad_state = torch.autograd.grad(
                results, [t for t in given if t.requires_grad], (grad_y[:, span], grad_state)
            )
            numbers = [number for number, is_wanted in enumerate(wanted) if is_wanted]
            for number, grad in zip(numbers, found, strict=True):
                whole = grads[number]
                assert whole is not None, "it is wanted"
                (whole[:, span] if number < ctx.count else whole).add_(grad)
        return None, None, None, None, None, grad_state if is_state_wanted else None, *grads


def _run(
    chunk: Chunk,
    sequences: Sequence[Tensor],
    weights: Sequence[Tensor],
    state: Tensor,
    resets: Tensor | None,
    *,
    like: Tensor,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns the output, the state after the last token and the states before each chunk."""
    y, states = torch.empty_like(like), []
    for span in _spans(like.shape[1], chunk_tokens):
        states.append(state)
        parts = [t[:, span] for t in sequences]
        y[:, span], state = chunk(parts, weights, state, None if resets is None else resets[:, span])
    return y, state, states


def _spans(length: int, chunk_tokens: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk_tokens, length)) for start in range(0, length, chunk_tokens))


@dataclass(frozen=True)
class ChunkDecays:
    """What is left of one thing at another within a chunk. No exponent is ever positive, whatever the decays are."""

    total: Tensor  # fp64 [B, H, C, K or 1]: the logarithm of the decay from the chunk's beginning to each token
    since_start: Tensor  # of the state before the chunk at each token, [B, H, C, K or 1]
    until_end: Tensor  # of what each token writes at the chunk's end, [B, H, C, K or 1]
    kept: Tensor  # of the state before the chunk at its end, [B, H, K or 1, 1]
    others: Tensor | None  # bool [B, 1, C, C]: tokens of two documents

    @classmethod
    def of(cls, log_decays: Tensor, resets: Tensor | None) -> "ChunkDecays":
        """Makes them of the decays' logarithms [B, H, C, K or 1] in the dtype to compute in."""
        # From the chunk's beginning to each token, itself included; fp32 would lose what differs after a strong decay.
        total = log_decays.double().cumsum(2)
        since_start, until_end = (
            exponents.to(log_decays.dtype).exp() for exponents in (total, total[:, :, -1:] - total)
        )
        kept = since_start[:, :, -1].unsqueeze(-1)
        if resets is None:
            return cls(total, since_start, until_end, kept, None)
        documents = resets.cumsum(1)
        since_start = since_start.masked_fill((documents > 0)[:, None, :, None], 0)
        until_end = until_end.masked_fill((documents < documents[:, -1:])[:, None, :, None], 0)
        kept = kept.masked_fill((documents[:, -1] > 0)[:, None, None, None], 0)
        others = (documents.unsqueeze(2) != documents.unsqueeze(1)).unsqueeze(1)
        return cls(total, since_start, until_end, kept, others)

    def scores(self, x: Tensor, k: Tensor) -> Tensor:
        """Products [B, H, C, C] of each token's x with its document's keys up to its own, as they have decayed."""
        found = self._by_head(x, k) if self.total.shape[3] == 1 else self._by_channel(x, k)
        return found if self.others is None else found.masked_fill(self.others, 0)

    def _by_head(self, x: Tensor, k: Tensor) -> Tensor:
        return x @ k.transpose(2, 3) * _decay_between(self.total, self.total, k.dtype).squeeze(-1)

    def _by_channel(self, x: Tensor, k: Tensor) -> Tensor:
        tokens, total, rows = x.shape[2], self.total, []
        for start in range(0, tokens, BLOCK_TOKENS):
            block = slice(start, min(start + BLOCK_TOKENS, tokens))
            x_block, until = x[:, :, block], total[:, :, block]
            pairs = _decay_between(until, until, k.dtype)
            row = [torch.einsum("bhik,bhjk,bhijk->bhij", x_block, k[:, :, block], pairs)]
            if start:  # what decays from a key to the block, and from there to a query, are two factors
                at_block = total[:, :, start - 1 : start]
                earlier = k[:, :, :start] * (at_block - total[:, :, :start]).to(k.dtype).exp()
                row.insert(0, x_block * (until - at_block).to(k.dtype).exp() @ earlier.transpose(2, 3))
            rows.append(F.pad(torch.cat(row, dim=-1), (0, tokens - block.stop)))
        return torch.cat(rows, dim=2)


def _decay_between(later: Tensor, earlier: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(later - earlier) [B, H, C, C, K] of each pair of tokens in order; zero for others."""
    exponents = (later.unsqueeze(3) - earlier.unsqueeze(2)).to(dtype)
    after = torch.ones(exponents.shape[2:4], dtype=torch.bool, device=later.device).triu(1)
    return exponents.masked_fill(after.unsqueeze(-1), -torch.inf).exp()
