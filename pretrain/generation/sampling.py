"""Logits to the next tokens, by transformers' own processors.

V: vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the likeliest token; top_k, top_p and min_p then have no part.
        top_k: so many of the likeliest tokens; 0 for all.
        top_p: the likeliest tokens that hold this probability together.
        min_p: tokens at least this likely relative to the likeliest; 0 for all.
        repetition_penalty: divides the logits of tokens that were read or generated before; 1 for none.
        seed: of the first sample of every prompt; the next has the next seed.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def warpers(self) -> LogitsProcessorList:
        """What changes the logits before a token is drawn, in the order of transformers' generate()."""
        warpers = LogitsProcessorList()
        if self.temperature not in (0, 1):
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers


class Sampler:
    """Draws the next token of each row.

    A row draws from a generator of its own, so it is the same whichever rows are beside it.
    """

    def __init__(self, sampling: Sampling, *, samples: Sequence[int], device: torch.device) -> None:
        """Args: samples: of each row which sample of its prompt it is, from 0."""
        self._sampling, self._warpers = sampling, sampling.warpers()
        self._generators = [torch.Generator(device).manual_seed(sampling.seed + number) for number in samples]
        self._penalty = (
            RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty) if sampling.repetition_penalty != 1 else None
        )
        self._known = [_KnownIds() for _ in samples]
        self._buffer = torch.zeros(len(samples), 1, dtype=torch.int64, device=device)

    def note(self, row: int, ids: Iterable[int]) -> None:
        """Takes ids that a row has read, for the repetition penalty."""
        self._known[row].add(ids)

    def known(self, row: int) -> list[int]:
        """The ids that a row has read or generated, each once."""
        return self._known[row].ids

    def __call__(self, logits: Tensor) -> Tensor:
        """Returns the next token of each row, int64 [rows], for logits [rows, V]."""
        scores = logits.float()
        if self._penalty:
            scores = self._penalty(self._known_ids(), scores)
        if not self._sampling.temperature:
            return scores.argmax(-1)
        scores = self._warpers(None, scores)
        probabilities = scores.softmax(-1)
        # What torch.multinomial does for one draw, with a generator for each row.
        noise = torch.empty_like(probabilities)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(1, generator=generator)
        return (probabilities / noise).argmax(-1)

    def _known_ids(self) -> Tensor:
        """Returns int64 [rows, at most V]: of each row every id that it has met, some of them several times."""
        longest = max(len(known.ids) for known in self._known)
        if longest > self._buffer.shape[1]:
            self._buffer = torch.zeros(len(self._known), 2 * longest, dtype=torch.int64, device=self._buffer.device)
            for known in self._known:
                known.copied = 0
        for row, known in zip(self._buffer, self._known, strict=True):
            if known.copied == 0:
                row.fill_(known.ids[0])
            new = known.ids[known.copied :]
            if new:
                row[known.copied : len(known.ids)] = torch.tensor(new, device=row.device)
            known.copied = len(known.ids)
        return self._buffer


class _KnownIds:
    """Different ids in the order in which they came."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._set: set[int] = set()
        self.copied = 0  # of them, to the device

    def add(self, ids: Iterable[int]) -> None:
        for number in ids:
            if number not in self._set:
                self._set.add(number)
                self.ids.append(number)
