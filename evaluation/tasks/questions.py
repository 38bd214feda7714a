"""Questions on a long text of facts about people, made from a seed: one fact, or two that have to be joined."""

import random
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sambalm.evaluation.settings import TaskSettings
from sambalm.evaluation.tasks.long_texts import Cell, Filler, LongTextSettings, LongTextTask, Question
from sambalm.evaluation.tasks.words import CITIES, FIRST_NAMES, JOBS, LAST_NAMES, different_pairs, pair

Kind = Literal["one_fact", "two_facts"]


class QuestionsSettings(LongTextSettings):
    """Keys of `questions`."""

    kinds: Annotated[list[Kind], Field(min_length=1)] = Field(
        default=["one_fact", "two_facts"],
        description="one_fact: where somebody lives; two_facts: where the shop is that somebody works in.",
    )


class Questions(LongTextTask[QuestionsSettings]):
    """A city, asked for by a person, among facts of the same form about others."""

    name: ClassVar[str] = "questions"
    summary: ClassVar[str] = "questions on facts about people in a long text, of one fact and of two"
    schema: ClassVar[type[TaskSettings]] = QuestionsSettings

    def cells(self) -> list[Cell]:
        settings = self.settings
        return [
            Cell({"kind": kind, "length": length}, chance=1 / len(CITIES), samples=settings.samples)
            for kind in dict.fromkeys(settings.kinds)
            for length in settings.lengths
        ]

    def question(self, cell: Cell, draw: random.Random) -> Question:
        person, shop, city = _person(draw), different_pairs(draw, 1)[0], draw.choice(CITIES)
        job = draw.choice(JOBS)
        if cell.at["kind"] == "one_fact":
            facts, asked = [_home(person, job, city)], f"In which city does {person} live?\nAnswer: {person} lives in"
        else:
            facts = [_work(person, shop), _place(shop, city)]
            draw.shuffle(facts)
            asked = f"In which city does {person} work?\nAnswer: {person} works in"

        def other_fact() -> str:
            other, elsewhere = _person(draw), pair(draw)
            while other == person or elsewhere == shop:
                other, elsewhere = _person(draw), pair(draw)
            if cell.at["kind"] == "one_fact":
                return _home(other, draw.choice(JOBS), draw.choice(CITIES))
            return draw.choice([_work(other, elsewhere), _place(elsewhere, draw.choice(CITIES))])

        parts = [
            self.model.encode_first("Read these facts about people; a question about them follows.\n"),
            *(self.model.encode_next(fact) for fact in facts),
            self.model.encode_next(f"\nQuestion: {asked}"),
        ]
        depths = sorted(draw.random() for _ in facts)
        gaps = [stop - start for start, stop in zip([0.0, *depths], [*depths, 1.0], strict=True)]
        filler = Filler(self.model, other_fact)
        ids = self.with_filler(parts, filler, gaps=gaps, length=int(cell.at["length"]))
        return Question(ids, [city], self.new_tokens(city))


def _person(draw: random.Random) -> str:
    return f"{draw.choice(FIRST_NAMES)} {draw.choice(LAST_NAMES)}"


def _home(person: str, job: str, city: str) -> str:
    return f" {person}, a {job}, lives in {city}."


def _work(person: str, shop: str) -> str:
    return f" {person} works in the shop of the {shop}."


def _place(shop: str, city: str) -> str:
    return f" The shop of the {shop} is in {city}."
