"""Aggregation in RULER's manner (arXiv 2404.06654): the words that a long list has most often."""

import itertools
import random
from typing import ClassVar

from pydantic import Field, model_validator

from sambalm.evaluation.settings import TaskSettings
from sambalm.evaluation.tasks.long_texts import Cell, Ids, LongTextSettings, LongTextTask, Question
from sambalm.evaluation.tasks.words import ADJECTIVES, NOUNS

_EXAMPLE = (
    "\nList: pear plum pear fig plum pear\nQuestion: Which 2 words are most frequent in the list?\nAnswer: pear plum\n"
)


class AggregationSettings(LongTextSettings):
    """Keys of `aggregation`."""

    common: int = Field(default=10, gt=0, le=30, description="Frequent words, which are asked for.")
    common_times: int = Field(default=30, gt=1, description="How often each frequent word stands in the list.")
    other_times: int = Field(default=3, gt=0, description="How often each other word does, about.")

    @model_validator(mode="after")
    def _check_times(self) -> "AggregationSettings":
        if self.common_times < 5 * self.other_times:
            raise ValueError(
                f"aggregation.common_times is {self.common_times}: give at least five times aggregation.other_times, "
                f"{5 * self.other_times}, so that the frequent words stand out"
            )
        return self


class Aggregation(LongTextTask[AggregationSettings]):
    """The most frequent words of a list, for which all of it has to be read."""

    name: ClassVar[str] = "aggregation"
    summary: ClassVar[str] = "the most frequent words of a long list"
    schema: ClassVar[type[TaskSettings]] = AggregationSettings

    def cells(self) -> list[Cell]:
        settings = self.settings
        chance = settings.common / len(set(ADJECTIVES + NOUNS))
        return [Cell({"length": length}, chance=chance, samples=settings.samples) for length in settings.lengths]

    def question(self, cell: Cell, draw: random.Random) -> Question:
        settings, length = self.settings, int(cell.at["length"])
        words = sorted(set(ADJECTIVES + NOUNS))
        draw.shuffle(words)
        common, others = words[: settings.common], words[settings.common :]
        begin = self.model.encode_first(f"Count how often each word stands in a list.{_EXAMPLE}\nList:")
        asked = f"\nQuestion: Which {len(common)} words are most frequent in the list?\nAnswer:"
        end = self.model.encode_next(asked)
        room = length - len(begin) - len(end)
        listed, needed = self._list(common, others, room=room)
        if needed > room:
            raise self.too_short(length, needed=len(begin) + len(end) + needed)
        draw.shuffle(listed)
        tokens = [token for word in listed for token in word]
        # What is left is less than a word: the list ends in the middle of one.
        cut = self.model.encode_next(f" {others[-1]}") * (room - len(tokens))
        ids = [*begin, *tokens, *cut[: room - len(tokens)], *end]
        return Question(ids, common, self.new_tokens(" ".join(common)))

    def _list(self, common: list[str], others: list[str], *, room: int) -> tuple[list[Ids], int]:
        """Returns the words of a list as ids, as many as fit in the room, and the tokens that the frequent ones need.

        In a long list all words stand more often than the settings say, the frequent ones by as much as the others.
        """
        settings = self.settings
        often, seldom = ([self.model.encode_next(f" {word}") for word in words] for words in (common, others))
        often_tokens, seldom_tokens = (sum(map(len, words)) for words in (often, seldom))

        def times(rounds: int) -> int:
            return max(settings.common_times, settings.common_times * rounds // settings.other_times)

        rounds = 0
        while times(rounds + 1) * often_tokens + (rounds + 1) * seldom_tokens <= room:
            rounds += 1
        found = often * times(rounds) + seldom * rounds
        used = sum(map(len, found))
        for word in itertools.cycle(seldom):
            if used + len(word) > room:
                break
            found.append(word)
            used += len(word)
        return found, times(rounds) * often_tokens
