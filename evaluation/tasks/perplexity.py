"""Perplexity by whole contexts: the same text cut into windows of several lengths, each read from nothing."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from sambalm.evaluation.data import digest, documents, shown
from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.plots import Lines
from sambalm.evaluation.settings import Lengths, TaskSettings, Tokens, shown_tokens
from sambalm.evaluation.task import Item, Outcome, Surroundings, Task
from sambalm.evaluation.tasks.likelihoods import by_position, ends_until, measure, position_line, scores_at


class PerplexitySettings(TaskSettings):
    """Keys of `perplexity`."""

    data: list[str] = Field(
        default=[], description="Prefixes of token shards, or text files; none: the held-out part of the run."
    )
    lengths: Lengths = Field(default=[4096, 8192, 16384], description="Tokens that are predicted in each window.")
    tokens: Tokens = Field(default=2**20, description="Tokens of the text that are predicted at each length, at most.")


class Perplexity(Task[PerplexitySettings]):
    """The perplexity of one text at several lengths of context.

    Documents follow each other as in training. The text is cut into windows that do not overlap; a window of a length
    has one token more, the first, which is read and not predicted. Lengths that divide the longest predict the same
    tokens, so that nothing but context differs.
    """

    name: ClassVar[str] = "perplexity"
    summary: ClassVar[str] = "perplexity and bits per byte by length of the whole context"
    schema: ClassVar[type[TaskSettings]] = PerplexitySettings

    def __init__(self, settings: PerplexitySettings, surroundings: Surroundings) -> None:
        super().__init__(settings, surroundings)
        self._tokens = self._read(surroundings)

    def _read(self, surroundings: Surroundings) -> np.ndarray:
        """Returns the text: so many tokens that every length cuts them into whole windows, and one more."""
        settings, parts, count = self.settings, [], 0
        longest = max(settings.lengths)
        wanted = max(settings.tokens, longest) + 1
        for ids in documents(settings.data, surroundings, of=self.name):
            parts.append(ids)
            count += len(ids)
            if count >= wanted:
                break
        if count <= longest:
            raise EvaluationError(
                f"{self.name}.lengths has {longest}, but {shown(settings.data, surroundings)} holds {count} tokens; "
                "give shorter lengths, as in perplexity.lengths=[512,1K], or more data"
            )
        # A multiple of the longest is one of the others where those divide it.
        kept = (min(count, wanted) - 1) // longest * longest
        return np.concatenate(parts)[: kept + 1]

    def protocol(self) -> dict[str, Any]:
        return {"method": "whole context in windows without overlap", "data_sha256": digest([self._tokens])}

    def items(self) -> list[Item]:
        last = len(self._tokens) - 1
        return [
            Item(f"{length}/{number}", length + 1, content=(length, number * length))
            for length in self.settings.lengths
            for number in range(last // length)
        ]

    def measure(self, items: Sequence[Item], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        length, ends = items[0].content[0], ends_until(items[0].content[0])
        starts = [start for _, start in (item.content for item in items)]
        sums = measure(self.model, [self._tokens[start : start + length + 1] for start in starts], tick, ends=ends)
        size = self._bytes_until
        return [
            {"length": length, "nats": nats, "bytes": [int(size[start + end] - size[start]) for end in ends]}
            for start, nats in zip(starts, sums, strict=True)
        ]

    @cached_property
    def _bytes_until(self) -> np.ndarray:
        return self.model.bytes_until(self._tokens.tolist())

    def outcome(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        scores, lines, details = [], [], []
        for length in self.settings.lengths:
            own = [record for record in records if record["length"] == length]
            ends = ends_until(length)
            at = {"length": length}
            scores += scores_at(own, len(ends) - 1, end=length, vocab_size=self.model.vocab_size, at=at)
            positions = by_position(own, ends)
            details.append({"length": length, "positions": positions})
            lines.append(position_line(f"windows of {shown_tokens(length)}", positions))
        plot = Lines("Perplexity by position in the window", lines, y_name="perplexity", x_name="tokens before, up to")
        return Outcome(scores, plot, {"by_position": details})
