"""Where documents begin in packed sequences, in the forms that kernels need, each made once for a micro-batch.

Of starts on the CPU all of them can be made. Starts on the device do for what has one shape whatever the documents are:
a CUDA graph then takes other documents at each launch. What kernels take from the host would wait for the device there.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sambalm.parallel.transfer import to_device


@dataclass(frozen=True)
class VariableLengths:
    """Sequences of a batch, joined end to end, as variable-length attention kernels take them."""

    cu_seqlens_q: Tensor  # int32 [sequences + 1]: where each one's queries begin, and where the last one's end
    cu_seqlens_k: Tensor  # int32 [sequences + 1], the same of its keys
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class AttentionDocuments:
    """The documents of one call of an attention kernel, whose queries are the last of its keys' positions."""

    given_first_keys: Tensor  # int64 [batch, queries], on the CPU or the device
    keys: int
    device: torch.device
    # By window, of a kernel that makes masks of them.
    masks: dict[int, Any] = field(default_factory=dict, init=False, compare=False)

    @cached_property
    def first_keys(self) -> Tensor:
        """Index of the first key that is of the query's document, int64 [batch, queries]."""
        return to_device(self.given_first_keys, self.device)

    @cached_property
    def variable_lengths(self) -> VariableLengths:
        """A sequence for each document of each row. Keys before the first query's document are one without queries.

        Raises:
            RuntimeError: starts were given on a GPU, where a host that reads lengths would wait.
        """
        if self.given_first_keys.is_cuda:
            raise RuntimeError("a kernel reads the documents' lengths on the host")
        batch, queries = self.given_first_keys.shape
        before = self.keys - queries
        numbers = torch.arange(queries)
        begins = self.given_first_keys == before + numbers
        begins[:, 0] = True
        rows = torch.arange(batch).unsqueeze(1)
        first_queries, first_keys = rows * queries + numbers, rows * self.keys + before + numbers
        first_keys[:, 0] = rows[:, 0] * self.keys + self.given_first_keys[:, 0]
        if before:
            begins, first_queries, first_keys = (
                torch.cat((column, rest), dim=1)
                for column, rest in (
                    (torch.ones_like(begins[:, :1]), begins),
                    (rows * queries, first_queries),
                    (rows * self.keys, first_keys),
                )
            )
        ends = torch.tensor([[batch * queries], [batch * self.keys]])
        borders = torch.cat((torch.stack((first_queries[begins], first_keys[begins])), ends), dim=1)
        longest_q, longest_k = borders.diff(dim=1).amax(dim=1).tolist()
        cu_seqlens_q, cu_seqlens_k = to_device(borders.to(torch.int32), self.device)
        return VariableLengths(cu_seqlens_q, cu_seqlens_k, longest_q, longest_k)


@dataclass(frozen=True)
class Documents:
    """The documents of this rank's part of each sequence.

    Args:
        starts: int64 [batch, length] on the CPU or the device: for each token the position in the whole sequence of its
            document's first token.
        first: position in the whole sequence of the part's first token.
        device: where the kernels run.
    """

    starts: Tensor
    first: int
    device: torch.device
    _attention: dict[tuple[range, int], AttentionDocuments] = field(default_factory=dict, init=False, compare=False)
    _in_pieces: dict[int, "Documents"] = field(default_factory=dict, init=False, compare=False)

    @cached_property
    def positions(self) -> Tensor:
        """Each token's position in its document, int64 [batch, length]."""
        numbers = torch.arange(self.first, self.first + self.starts.shape[1], device=self.starts.device)
        return to_device(numbers - self.starts, self.device)

    @cached_property
    def resets(self) -> Tensor:
        """True for a document's first token, before which a state is dropped; bool [batch, length]."""
        return self.positions == 0

    def resets_from(self, tokens: int) -> Tensor:
        """The same with as many tokens before the part, of which only the last document's matter; bool."""
        before = torch.arange(self.first - tokens, self.first, device=self.starts.device)
        return torch.cat((to_device(self.starts[:, :1] == before, self.device), self.resets), dim=1)

    def in_pieces(self, tokens: int) -> "Documents":
        """The same with each document cut, from its start, into pieces of so many tokens that are documents."""
        if tokens not in self._in_pieces:
            numbers = torch.arange(self.first, self.first + self.starts.shape[1], device=self.starts.device)
            starts = numbers - (numbers - self.starts) % tokens
            self._in_pieces[tokens] = Documents(starts, self.first, self.device)
        return self._in_pieces[tokens]

    def attention(self, queries: range, *, keys_before: int) -> AttentionDocuments:
        """The borders of an attention call on some of the part's tokens, with so many keys before the first of them."""
        if (queries, keys_before) not in self._attention:
            starts = self.starts[:, queries.start : queries.stop]
            first_keys = (starts - self.first - queries.start + keys_before).clamp(min=0)
            self._attention[queries, keys_before] = AttentionDocuments(
                first_keys, keys_before + len(queries), self.device
            )
        return self._attention[queries, keys_before]
