"""Perplexity along documents that are read once, from their beginning on, with the state carried."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from sambalm.evaluation.data import digest, documents, shown
from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.plots import Lines
from sambalm.evaluation.settings import TaskSettings, Tokens
from sambalm.evaluation.task import Item, Outcome, Surroundings, Task
from sambalm.evaluation.tasks.likelihoods import by_position, ends_until, measure, position_line, scores_at

_FIRST_END = 1024  # tokens, from which on the table has rows


class SlidingSettings(TaskSettings):
    """Keys of `sliding`."""

    data: list[str] = Field(
        default=[], description="Prefixes of token shards, or text files; none: the held-out part of the run."
    )
    length: Tokens = Field(
        default=2**20, description="Tokens that are predicted in each document; shorter ones do not count."
    )
    documents: int = Field(
        default=10, gt=0, description="Documents that are read, at most: the first that are as long."
    )
    join: bool = Field(
        default=False, description="Whether all documents are joined, and cut into texts of that length."
    )


class Sliding(Task[SlidingSettings]):
    """The perplexity of long documents by position.

    A document is read in pieces, each of which goes on from the state after the one before, so that every token is
    predicted from all before it as far as the model remembers. Its window slides along; its memory does not grow.
    """

    name: ClassVar[str] = "sliding"
    summary: ClassVar[str] = "perplexity and bits per byte along long documents, with the state carried"
    schema: ClassVar[type[TaskSettings]] = SlidingSettings

    def __init__(self, settings: SlidingSettings, surroundings: Surroundings) -> None:
        super().__init__(settings, surroundings)
        self._texts = self._read(surroundings)

    def _read(self, surroundings: Surroundings) -> list[np.ndarray]:
        settings, texts, longest = self.settings, [], 0
        size = settings.length + 1
        rest, count = [], 0
        for ids in documents(settings.data, surroundings, of=self.name):
            if settings.join:
                rest.append(ids)
                count += len(ids)
                if count >= size:
                    whole = np.concatenate(rest)
                    texts += [whole[start : start + size] for start in range(0, count - size + 1, size)]
                    rest, count = [whole[count // size * size :]], count % size
            else:
                longest = max(longest, len(ids))
                texts += [ids[:size]] if len(ids) >= size else []
            if len(texts) >= settings.documents:
                break
        if not texts:
            where = shown(settings.data, surroundings)
            held = f"{where} holds {count} tokens in all" if settings.join else f"the longest in {where} has {longest}"
            advice = "lower" if settings.join else f"set {self.name}.join=true to read documents as one text, or lower"
            raise EvaluationError(
                f"no text has the {size} tokens that {self.name}.length asks for: {held}; {advice} it"
            )
        return [text.astype(np.int32) for text in texts[: settings.documents]]

    def protocol(self) -> dict[str, Any]:
        return {"method": "each document once, in pieces, with the state carried", "data_sha256": digest(self._texts)}

    def items(self) -> list[Item]:
        return [Item(str(number), len(text), content=text) for number, text in enumerate(self._texts)]

    def measure(self, items: Sequence[Item], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        texts, ends = [item.content.astype(np.int64) for item in items], ends_until(self.settings.length)
        sums = measure(self.model, texts, tick, ends=ends)
        sizes = [self.model.bytes_until(text.tolist()) for text in texts]
        return [
            {"nats": nats, "bytes": [int(size[end] - size[0]) for end in ends]}
            for size, nats in zip(sizes, sums, strict=True)
        ]

    def outcome(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        ends, scores = ends_until(self.settings.length), []
        for number, end in enumerate(ends):
            if end >= _FIRST_END or end == ends[-1]:
                scores += scores_at(records, number, end=end, vocab_size=self.model.vocab_size, at={"length": end})
        positions = by_position(records, ends)
        line = position_line(f"{len(records)} documents", positions)
        plot = Lines(
            "Perplexity by position in the document", [line], y_name="perplexity", x_name="tokens before, up to"
        )
        return Outcome(scores, plot, {"by_position": positions})
