"""A phonebook: the number of one of many names, after two that are looked up as examples.

The task is that of "Repeat After Me" (arXiv 2402.01032), which Samba's authors use.
"""

import random
import string
from typing import ClassVar

from pydantic import Field

from sambalm.data_pipeline.made_documents import PHONEBOOK_HEADER
from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.settings import Lengths, TaskSettings
from sambalm.evaluation.tasks.long_texts import Cell, Ids, LongTextSettings, LongTextTask, Question
from sambalm.evaluation.tasks.words import FIRST_NAMES, LAST_NAMES

_DIGITS, _SHOTS = 10, 2
_NAMES = len(FIRST_NAMES) * len(LAST_NAMES) * len(string.ascii_uppercase)


class PhonebookSettings(LongTextSettings):
    """Keys of `phonebook`."""

    lengths: Lengths = Field(
        default=[512, 1024, 2048, 4096, 8192], description="Tokens of each text, the question included."
    )


class Phonebook(LongTextTask[PhonebookSettings]):
    """The number of a name, of ten digits, all of which must be right."""

    name: ClassVar[str] = "phonebook"
    summary: ClassVar[str] = "the number of one name of a long phonebook"
    schema: ClassVar[type[TaskSettings]] = PhonebookSettings

    def cells(self) -> list[Cell]:
        settings = self.settings
        return [
            Cell({"length": length}, chance=10.0**-_DIGITS, samples=settings.samples) for length in settings.lengths
        ]

    def question(self, cell: Cell, draw: random.Random) -> Question:
        length = int(cell.at["length"])
        numbers = iter(draw.sample(range(_NAMES), min(_NAMES, length)))
        asked = [_entry(next(numbers), draw) for _ in range(_SHOTS + 1)]
        shots = "".join(f"\n{name}: {number}" for name, number in asked[:_SHOTS])
        name, number = asked[_SHOTS]
        end = self.model.encode_next(f"\n\n{PHONEBOOK_HEADER}{shots}\n{name}:")
        lines = [self._line(*entry) for entry in asked]
        room = length - len(self.model.begin_ids) - len(end) - sum(map(len, lines))
        if room < 0:
            raise self.too_short(length, needed=length - room)
        for other in numbers:
            line = self._line(*_entry(other, draw))
            if len(line) > room:
                break
            lines.append(line)
            room -= len(line)
        else:
            raise EvaluationError(
                f"{self.name}.lengths has {length}, but all {_NAMES} names and numbers take {length - room} tokens; "
                "give shorter ones"
            )
        draw.shuffle(lines)
        # What is left is less than a line: the book begins in the middle of one.
        cut = line[len(line) - room :] if room else []
        ids = [*self.model.begin_ids, *cut, *(token for entry in lines for token in entry), *end]
        return Question(ids, [number], self.new_tokens(number))

    def _line(self, name: str, number: str) -> Ids:
        return self.model.encode_next(f"\n{name}: {number}")


def _entry(number: int, draw: random.Random) -> tuple[str, str]:
    """Returns the name of a number below _NAMES, and a telephone number for it."""
    rest, first = divmod(number, len(FIRST_NAMES))
    middle, last = divmod(rest, len(LAST_NAMES))
    name = f"{FIRST_NAMES[first]} {string.ascii_uppercase[middle]}. {LAST_NAMES[last]}"
    return name, "".join(draw.choices(string.digits, k=_DIGITS))
