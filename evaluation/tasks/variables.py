"""Variable tracking in RULER's manner (arXiv 2404.06654): which names hold a value, through chains of assignments."""

import random
import string
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from sambalm.evaluation.settings import TaskSettings
from sambalm.evaluation.tasks.long_texts import Cell, Filler, LongTextSettings, LongTextTask, Question
from sambalm.evaluation.tasks.words import different_numbers, noise

_LETTERS, _DIGITS = 5, 5


class VariablesSettings(LongTextSettings):
    """Keys of `variables`."""

    hops: int = Field(default=4, gt=0, description="Assignments of one name to the next, after that of the value.")
    chains: int = Field(default=2, gt=0, description="Chains with values of their own, one of which is asked for.")


class Variables(LongTextTask[VariablesSettings]):
    """Which variables hold a value, where most were assigned another variable."""

    name: ClassVar[str] = "variables"
    summary: ClassVar[str] = "variables that hold a value, through chains of assignments in a long text"
    schema: ClassVar[type[TaskSettings]] = VariablesSettings

    def cells(self) -> list[Cell]:
        settings = self.settings
        chance = float(len(string.ascii_uppercase)) ** -_LETTERS
        return [Cell({"length": length}, chance=chance, samples=settings.samples) for length in settings.lengths]

    def question(self, cell: Cell, draw: random.Random) -> Question:
        settings = self.settings
        names = _names(draw, (settings.hops + 1) * settings.chains)
        values = different_numbers(draw, settings.chains, digits=_DIGITS)
        chains = [names[number :: settings.chains] for number in range(settings.chains)]
        lines = [_assignments(chain, value) for chain, value in zip(chains, values, strict=True)]
        mixed = _mixed(lines, draw)
        example_names, example_value = _names(draw, 2), different_numbers(draw, 1, digits=_DIGITS)[0]
        example = (
            f"{''.join(_assignments(example_names, example_value))}{_ask(example_value)} {' '.join(example_names)}"
        )
        parts = [
            self.model.encode_first(
                f"Assignments of variables are hidden in a text. An example:{example}\n\nThe text:"
            ),
            *(self.model.encode_next(line) for line in mixed),
            self.model.encode_next(_ask(values[0])),
        ]
        depths = sorted(draw.random() for _ in mixed)
        gaps = [stop - start for start, stop in zip([0.0, *depths], [*depths, 1.0], strict=True)]
        filler = Filler(self.model, lambda: noise(draw))
        ids = self.with_filler(parts, filler, gaps=gaps, length=int(cell.at["length"]))
        return Question(ids, chains[0], self.new_tokens(" ".join(chains[0])))


def _names(draw: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choices(string.ascii_uppercase, k=_LETTERS))] = None
    return list(found)


def _assignments(names: Sequence[str], value: str) -> list[str]:
    return [f"\nVAR {name} = {before}\n" for name, before in zip(names, [value, *names[:-1]], strict=True)]


def _ask(value: str) -> str:
    return f"\nQuestion: Which variables hold the value {value}?\nAnswer:"


def _mixed(lines: Sequence[Sequence[str]], draw: random.Random) -> list[str]:
    """Returns all lines in an order that leaves each chain's own as it is."""
    turns = [number for number, chain in enumerate(lines) for _ in chain]
    draw.shuffle(turns)
    rest = [iter(chain) for chain in lines]
    return [next(rest[number]) for number in turns]
