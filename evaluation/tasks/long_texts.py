"""Texts made from a seed, of an exact number of tokens, with something in them to be asked for."""

import random
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.models.base import LanguageModel, greedy
from sambalm.evaluation.plots import Line, Lines
from sambalm.evaluation.settings import Lengths, TaskSettings
from sambalm.evaluation.task import Item, Outcome, Score, Surroundings, Task, mean_score

_SPARE_TOKENS = 8  # beyond an answer's own, for words around it

Ids = list[int]


class LongTextSettings(TaskSettings):
    """Keys that all tasks on long texts share."""

    lengths: Lengths = Field(
        default=[4096, 8192, 16384, 32768], description="Tokens of each text, the question included."
    )
    samples: int = Field(default=20, gt=0, description="Texts of each length and kind.")
    seed: int = Field(default=0, ge=0, description="What the texts are drawn from.")


Settings = TypeVar("Settings", bound=LongTextSettings)


@dataclass(frozen=True)
class Question:
    """A text that ends in a question, and what is right.

    Args:
        ids: of the text.
        answers: strings that are each to be found in what the model adds.
        max_new_tokens: that it may add.
    """

    ids: Ids
    answers: Sequence[str]
    max_new_tokens: int


@dataclass(frozen=True)
class Cell:
    """A part of a task that has a score of its own.

    Args:
        at: what sets it apart, the length among it.
        chance: the score of a guess without the text.
    """

    at: Mapping[str, int | float | str]
    chance: float
    samples: int


class LongTextTask(Task[Settings]):
    """Questions on texts of exact lengths, answered by greedy generation.

    A score is the mean part of the answers that were found, as RULER counts.
    """

    schema: ClassVar[type[TaskSettings]] = LongTextSettings
    settings: Settings

    def __init__(self, settings: Settings, surroundings: Surroundings) -> None:
        super().__init__(settings, surroundings)
        self._cells = self.cells()

    @abstractmethod
    def cells(self) -> list[Cell]:
        """Returns the parts of the task, in the order of the table."""

    @abstractmethod
    def question(self, cell: Cell, draw: random.Random) -> Question:
        """Makes a question from a generator of its own.

        Raises:
            EvaluationError: the length is too short for what the text must hold.
        """

    def protocol(self) -> dict[str, Any]:
        return {"method": "greedy generation, answers as substrings", "tokenizer": self.model.tokenizer_hash()}

    def items(self) -> list[Item]:
        self._refuse_short_texts()
        return [
            Item(f"{_name(cell)}/{sample}", int(cell.at["length"]), content=(cell, sample))
            for cell in self._cells
            for sample in range(cell.samples)
        ]

    def _refuse_short_texts(self) -> None:
        """Makes all texts of the smallest length, before the first is answered."""
        errors: list[TooShortError] = []
        for cell in (cell for cell in self._cells if cell.at["length"] == min(self.settings.lengths)):
            for sample in range(cell.samples):
                try:
                    self.numbered_question(cell, sample)
                except TooShortError as error:
                    errors.append(error)
        if errors:
            raise max(errors, key=lambda error: error.needed)

    def measure(self, items: Sequence[Item], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        questions = [self.numbered_question(*item.content) for item in items]
        prompts = torch.tensor([question.ids for question in questions])
        longest = max(question.max_new_tokens for question in questions)
        found = greedy(self.model, prompts, max_new_tokens=longest, progress=tick)
        records = []
        for question, ids in zip(questions, found, strict=True):
            text = self.model.decode(ids[: question.max_new_tokens])
            records.append(
                {"score": self.grade(text, question.answers), "text": text, "answers": list(question.answers)}
            )
        return records

    def grade(self, text: str, answers: Sequence[str]) -> float:
        """Returns which part of the answers a text holds."""
        return fmean(answer in text for answer in answers)

    def outcome(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        scores, rest = [], list(records)
        for cell in self._cells:
            own, rest = rest[: cell.samples], rest[cell.samples :]
            scores.append(mean_score("accuracy", [r["score"] for r in own], at=cell.at, chance=cell.chance))
        return Outcome(scores, by_length(scores, title=self.name))

    def numbered_question(self, cell: Cell, sample: int) -> Question:
        """Makes one of the cell's questions, the same each time."""
        question = self.question(cell, random.Random(f"{self.settings.seed} {_name(cell)} {sample}"))
        assert len(question.ids) == cell.at["length"], "texts are of exact lengths"
        return question

    def new_tokens(self, answer: str) -> int:
        """Returns how many tokens an answer may take."""
        return len(self.model.encode_next(f" {answer}")) + _SPARE_TOKENS

    def with_filler(self, parts: Sequence[Ids], filler: "Filler", *, gaps: Sequence[float], length: int) -> Ids:
        """Puts filler between parts so that the whole has an exact length. Only before the last is a sentence cut.

        Args:
            parts: what the text must hold, in order; the first and the last stand at its ends.
            gaps: of the filler the part that stands after each of `parts` but the last.

        Raises:
            EvaluationError: the parts alone are longer.
        """
        room = length - sum(map(len, parts))
        if room < 0:
            raise self.too_short(length, needed=length - room)
        found, filled = list(parts[0]), 0
        for number, part in enumerate(parts[1:-1], start=1):
            sentences = filler.whole_sentences(round(room * sum(gaps[:number])) - filled)
            filled += len(sentences)
            found += [*sentences, *part]
        return [*found, *filler.cut_sentences(room - filled), *parts[-1]]

    def too_short(self, length: int, *, needed: int) -> "TooShortError":
        """Makes the error of a length that cannot hold what it must."""
        return TooShortError(
            f"{self.name}.lengths has {length}, but what such a text must hold takes up to {needed} tokens; "
            "give longer ones",
            needed,
        )


class TooShortError(EvaluationError):
    """A length that cannot hold what a text of the task must; `needed` counts the tokens of that."""

    def __init__(self, sentence: str, needed: int) -> None:
        super().__init__(sentence, needed)  # all that it is made of, so that it comes whole out of another process
        self.needed = needed

    def __str__(self) -> str:
        return str(self.args[0])


class Filler:
    """Sentences without an end, as ids. Each begins with the space or newline that parts it from the one before."""

    def __init__(self, model: LanguageModel, next_sentence: Callable[[], str]) -> None:
        self._next_sentence = next_sentence
        self._encode = lru_cache(maxsize=1024)(model.encode_next)
        self._next: Ids = self._encode(next_sentence())

    def whole_sentences(self, count: int) -> Ids:
        """Returns so many tokens, or fewer, as whole sentences."""
        found: Ids = []
        while len(found) + len(self._next) <= count:
            found += self._next
            self._next = self._encode(self._next_sentence())
        return found

    def cut_sentences(self, count: int) -> Ids:
        """Returns exactly so many tokens; the last sentence may be cut."""
        found = self.whole_sentences(count)
        return found + self._next[: count - len(found)]


def by_length(scores: Sequence[Score], *, title: str) -> Lines:
    """Makes the plot of scores over the length, with a line for each kind."""
    lines = []
    for kind in dict.fromkeys(str(score.at.get("kind", title)) for score in scores):
        own = [score for score in scores if str(score.at.get("kind", title)) == kind]
        points = [(float(score.at["length"]), score.value) for score in own]
        lines.append(Line(kind, points, [score.standard_error for score in own]))
    return Lines(f"Accuracy of {title} by length", lines, y_name="accuracy", limits=(-0.03, 1.03))


def _name(cell: Cell) -> str:
    return "/".join(f"{key}={value}" for key, value in cell.at.items())
