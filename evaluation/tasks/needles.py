"""Needles in a haystack in RULER's manner (arXiv 2404.06654): numbers of things, hidden in a long text."""

import random
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sambalm.evaluation.settings import TaskSettings
from sambalm.evaluation.tasks.long_texts import Cell, Filler, LongTextSettings, LongTextTask, Question
from sambalm.evaluation.tasks.words import different_numbers, different_pairs, noise, pair

Kind = Literal["single", "multi_key", "multi_value", "multi_query"]
_DIGITS = 7
_SEVERAL = 4


class NeedlesSettings(LongTextSettings):
    """Keys of `needles`."""

    kinds: Annotated[list[Kind], Field(min_length=1)] = Field(
        default=["single", "multi_key", "multi_value", "multi_query"],
        description="single: one number in noise; multi_key: among numbers of other things; multi_value: four numbers "
        "of one thing; multi_query: the numbers of four things.",
    )


class Needles(LongTextTask[NeedlesSettings]):
    """Numbers that a text gives to things, asked for by the thing."""

    name: ClassVar[str] = "needles"
    summary: ClassVar[str] = "numbers hidden in a long text: one, among others, several"
    schema: ClassVar[type[TaskSettings]] = NeedlesSettings

    def cells(self) -> list[Cell]:
        settings = self.settings
        return [
            Cell({"kind": kind, "length": length}, chance=1 / (9 * 10 ** (_DIGITS - 1)), samples=settings.samples)
            for kind in dict.fromkeys(settings.kinds)
            for length in settings.lengths
        ]

    def question(self, cell: Cell, draw: random.Random) -> Question:
        kind = cell.at["kind"]
        things = different_pairs(draw, _SEVERAL if kind == "multi_query" else 1)
        values = different_numbers(draw, _SEVERAL if kind in ("multi_value", "multi_query") else 1, digits=_DIGITS)
        of_each = things if len(things) == len(values) else things * len(values)
        needles = [_needle(thing, value) for thing, value in zip(of_each, values, strict=True)]
        draw.shuffle(needles)

        def other_needle() -> str:
            thing = pair(draw)
            while thing in things:
                thing = pair(draw)
            return _needle(thing, different_numbers(draw, 1, digits=_DIGITS)[0])

        filler = Filler(self.model, other_needle if kind == "multi_key" else lambda: noise(draw))
        many = "numbers" if len(values) > 1 else "number"
        end = f"\nQuestion: What {_verb(values)} the {many} of the {_listed(things)} in the text above?\nAnswer:"
        parts = [
            self.model.encode_first(
                "The text below gives numbers to things. Remember them; you will be asked for them.\n"
            ),
            *(self.model.encode_next(needle) for needle in needles),
            self.model.encode_next(f"{end} The {many} of the {_listed(things)} {_verb(values)}"),
        ]
        depths = sorted(draw.random() for _ in needles)
        gaps = [stop - start for start, stop in zip([0.0, *depths], [*depths, 1.0], strict=True)]
        ids = self.with_filler(parts, filler, gaps=gaps, length=int(cell.at["length"]))
        return Question(ids, values, self.new_tokens(", ".join(values)))


def _needle(thing: str, value: str) -> str:
    return f" The number of the {thing} is {value}."


def _verb(values: list[str]) -> str:
    return "are" if len(values) > 1 else "is"


def _listed(things: list[str]) -> str:
    return things[0] if len(things) == 1 else f"{', the '.join(things[:-1])} and the {things[-1]}"
