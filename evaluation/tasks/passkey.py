"""Passkey retrieval: five digits hidden in text that repeats itself, by length of the text and depth of the key.

Wording and lines are those of the Landmark attention paper (arXiv 2305.16300), which Samba's authors use, and those of
the documents that `sambalm data passkey` makes to train on (sambalm.data_pipeline.made_documents).
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from sambalm.data_pipeline.made_documents import PASSKEY_FILLER, PASSKEY_LINE, PASSKEY_QUESTION, PASSKEY_TASK
from sambalm.evaluation.plots import HeatMap
from sambalm.evaluation.settings import Lengths, TaskSettings, shown_tokens
from sambalm.evaluation.task import Outcome, mean_score
from sambalm.evaluation.tasks.long_texts import Cell, Filler, LongTextSettings, LongTextTask, Question

_LOWEST, _HIGHEST = 10_000, 99_999


class _Line:
    """A line of sentences that say nothing, each with what parts it from the text before it."""

    def __init__(self, *, first: int) -> None:
        self._first = self.next = first

    def __call__(self) -> str:
        parted = "\n" if self.next == self._first else " "
        sentence = PASSKEY_FILLER[self.next % len(PASSKEY_FILLER)]
        self.next += 1
        return parted + sentence


class PasskeySettings(LongTextSettings):
    """Keys of `passkey`."""

    lengths: Lengths = Field(
        default=[4096, 8192, 16384, 32768, 65536, 131072, 262144],
        description="Tokens of each text, the question included.",
    )
    samples: int = Field(default=5, gt=0, description="Keys at each length and depth.")
    depths: int = Field(default=11, gt=1, description="Depths, evenly from the text's beginning to its end.")


class Passkey(LongTextTask[PasskeySettings]):
    """Whether a model says the key that it has read somewhere in a long text."""

    name: ClassVar[str] = "passkey"
    summary: ClassVar[str] = "a key of five digits, found at any depth of a long text"
    schema: ClassVar[type[TaskSettings]] = PasskeySettings

    def cells(self) -> list[Cell]:
        settings = self.settings
        depths = [round(number / (settings.depths - 1), 4) for number in range(settings.depths)]
        chance = 1 / (_HIGHEST - _LOWEST + 1)
        return [
            Cell({"length": length, "depth": depth}, chance=chance, samples=settings.samples)
            for length in settings.lengths
            for depth in depths
        ]

    def question(self, cell: Cell, draw: random.Random) -> Question:
        key, depth = str(draw.randint(_LOWEST, _HIGHEST)), float(cell.at["depth"])
        task = self.model.encode_first(PASSKEY_TASK)
        hidden, asked = (
            self.model.encode_next(f"\n{line}") for line in (PASSKEY_LINE.format(key=key), PASSKEY_QUESTION)
        )
        length = int(cell.at["length"])
        room = length - len(task) - len(hidden) - len(asked)
        if room < 0:
            raise self.too_short(length, needed=length - room)
        line = _Line(first=0)
        before = Filler(self.model, line).whole_sentences(round(room * depth))
        after = Filler(self.model, _Line(first=line.next - 1)).cut_sentences(room - len(before))  # one is drawn ahead
        return Question([*task, *before, *hidden, *after, *asked], [key], self.new_tokens(key))

    def outcome(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        cells = super().outcome(records).scores
        lengths = self.settings.lengths
        depths = [cell.at["depth"] for cell in cells[: self.settings.depths]]
        of_length = {length: [cell for cell in cells if cell.at["length"] == length] for length in lengths}
        values = [[of_length[length][number].value for length in lengths] for number in range(len(depths))]
        each = self.settings.depths * self.settings.samples
        scores = [
            mean_score(
                "accuracy",
                [record["score"] for record in records[number * each : (number + 1) * each]],
                at={"length": length},
                chance=cells[0].chance,
            )
            for number, length in enumerate(lengths)
        ]
        details = {"cells": [{**cell.at, "accuracy": cell.value, "items": cell.items} for cell in cells]}
        plot = HeatMap(
            "Passkey retrieval",
            rows=[f"{float(depth):.0%}" for depth in depths],
            columns=[shown_tokens(length) for length in lengths],
            values=values,
            row_name="depth of the key",
            column_name="tokens of the text",
        )
        return Outcome(scores, plot, details)
