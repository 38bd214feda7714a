"""The tasks by their names."""

import json
from collections.abc import Sequence
from typing import Any

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.settings import TaskSettings, parse_settings
from sambalm.evaluation.task import Task
from sambalm.evaluation.tasks.aggregation import Aggregation
from sambalm.evaluation.tasks.gsm8k import Gsm8k
from sambalm.evaluation.tasks.harness import Harness
from sambalm.evaluation.tasks.humaneval import HumanEval
from sambalm.evaluation.tasks.needles import Needles
from sambalm.evaluation.tasks.passkey import Passkey
from sambalm.evaluation.tasks.perplexity import Perplexity
from sambalm.evaluation.tasks.phonebook import Phonebook
from sambalm.evaluation.tasks.questions import Questions
from sambalm.evaluation.tasks.short import Short
from sambalm.evaluation.tasks.sliding import Sliding
from sambalm.evaluation.tasks.throughput import Throughput
from sambalm.evaluation.tasks.variables import Variables
from sambalm.pretrain.config_errors import did_you_mean

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Perplexity,
        Sliding,
        Passkey,
        Phonebook,
        Needles,
        Variables,
        Aggregation,
        Questions,
        Short,
        Gsm8k,
        HumanEval,
        Harness,
        Throughput,
    )
}
DATA = "data"


def task_settings(names: Sequence[str], overrides: Sequence[str], *, data: Sequence[str]) -> dict[str, TaskSettings]:
    """Makes the settings of the tasks that are to run.

    Args:
        names: of the tasks.
        overrides: such as "passkey.lengths=[4K,8K]".
        data: for the key `data` of every task that has one.

    Raises:
        EvaluationError: a task or a key is unknown, given twice or not to be run, or a value is not allowed.
    """
    for name in names:
        if name not in TASKS:
            raise EvaluationError(
                f"there is no task {name!r}; the tasks are {', '.join(TASKS)}{did_you_mean(name, list(TASKS))}"
            )
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise EvaluationError(f"--task {twice} is given twice; give it once, with all its keys")
    for override in overrides:
        section = override.partition("=")[0].partition(".")[0]
        if section in TASKS and section not in names:
            raise EvaluationError(
                f"{override!r} is for a task that is not to run; add --task {section} or leave it out"
            )
    schemas = {name: TASKS[name].schema for name in names}
    if data:
        readers = [name for name, schema in schemas.items() if DATA in schema.model_fields]
        if not readers:
            raise EvaluationError(f"--data is given, but {' and '.join(names)} reads none; leave it out")
        overrides = [*(f"{name}.{DATA}={json.dumps(list(data))}" for name in readers), *overrides]  # JSON is YAML
    return parse_settings(schemas, overrides)


def described_keys(schema: type[TaskSettings]) -> list[tuple[str, str, str]]:
    """Returns name, default and description of every key."""
    defaults: Any = schema()
    return [
        (name, str(getattr(defaults, name)), field.description or "") for name, field in schema.model_fields.items()
    ]
