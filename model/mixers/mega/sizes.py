"""The section `model.mixers.mega`, and how a part of a sequence lies in chunks. Imports no torch."""

import math
from dataclasses import dataclass

from pydantic import ConfigDict, Field

from sambalm.model.mixers.step_sizes import StepSizes

POSITION_BASE = 10_000.0  # of the rotations that make the bias of a distance


class MegaSizes(StepSizes):
    """Sizes of Mega with S6 in the place of its moving average; defaults are those of the paper's reference code."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key_dim: int = Field(
        128, gt=0, multiple_of=2, description="Channels of queries and keys; twice as many divide hidden_size"
    )
    chunk_tokens: int = Field(2048, gt=1, description="Tokens of a chunk, within which the attention stays")
    d_state: int = Field(16, gt=0, description="States per channel of S6")
    d_conv: int = Field(4, gt=1, description="Taps of the causal convolution before S6")
    dt_rank: int | None = Field(None, gt=0, description="Rank of S6's step sizes; null: ceil(hidden_size / 32)")

    def heads(self, width: int) -> int:
        """Returns the heads that share queries and keys, for a stream of that width.

        A kernel's head has as many channels of values as of queries: those of queries and keys, and as many that make
        the bias of a distance.

        Raises:
            ValueError: they do not divide the width.
        """
        heads, rest = divmod(width, 2 * self.key_dim)
        if rest:
            raise ValueError(
                f"model.hidden_size is {width}, which is no multiple of 2 x model.mixers.mega.key_dim {self.key_dim}: "
                "change one of them"
            )
        return heads

    def step_rank(self, width: int) -> int:
        """Returns the rank of the step sizes, for a stream of that width."""
        return self.dt_rank or math.ceil(width / 32)


@dataclass(frozen=True)
class Piece:
    """Chunks of one length side by side, or a part of one chunk."""

    chunks: int
    queries: int  # of each chunk
    before: int = 0  # keys of the chunk before the first query, on ranks before this one


def pieces_of(part_tokens: int, *, first: int, chunk_tokens: int) -> list[Piece]:
    """Returns the pieces in which a rank's part of a sequence lies, in order.

    Args:
        first: the place in the sequence of the part's first token.
    """
    before = first % chunk_tokens
    pieces = []
    if before:
        pieces.append(Piece(1, min(part_tokens, chunk_tokens - before), before))
        part_tokens -= pieces[0].queries
    whole, rest = divmod(part_tokens, chunk_tokens)
    if whole:
        pieces.append(Piece(whole, chunk_tokens))
    return [*pieces, Piece(1, rest)] if rest else pieces
