"""Our tasks on long texts as data sets of lm-eval's, for any model that it runs.

lm-eval hands over what it was told of the model and what `--metadata` says: `tokenizer` or `pretrained` is a folder
with a tokenizer, and the other names that a task knows are its keys, such as `lengths`.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import datasets

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.models.causal_lm import TokenizerOnly
from sambalm.evaluation.settings import parse_settings
from sambalm.evaluation.task import Surroundings
from sambalm.evaluation.tasks.long_texts import LongTextTask
from sambalm.evaluation.tasks.registry import TASKS


def _documents(name: str, given: dict[str, Any]) -> dict[str, datasets.Dataset]:
    folder = given.get("tokenizer") or given.get("pretrained")
    if not isinstance(folder, str):
        raise EvaluationError(
            f"{name} needs a tokenizer: give --metadata with a folder, as in {{'tokenizer': 'FOLDER'}}"
        )
    model, kind = TokenizerOnly(Path(folder)), TASKS[name]
    keys = [f"{name}.{key}={given[key]}" for key in kind.schema.model_fields if key in given]
    settings = parse_settings({name: kind.schema}, keys)[name]
    task = kind(settings, Surroundings(model, None, cache_dir=Path(folder)))
    assert isinstance(task, LongTextTask)
    found = [
        {"text": model.decode(question.ids), "answers": list(question.answers), **cell.at}
        for cell in task.cells()
        for question in (task.numbered_question(cell, sample) for sample in range(cell.samples))
    ]
    return {"test": datasets.Dataset.from_list(found)}


def passkey(**given: Any) -> dict[str, datasets.Dataset]:
    return _documents("passkey", given)


def phonebook(**given: Any) -> dict[str, datasets.Dataset]:
    return _documents("phonebook", given)


def needles(**given: Any) -> dict[str, datasets.Dataset]:
    return _documents("needles", given)


def variables(**given: Any) -> dict[str, datasets.Dataset]:
    return _documents("variables", given)


def aggregation(**given: Any) -> dict[str, datasets.Dataset]:
    return _documents("aggregation", given)


def questions(**given: Any) -> dict[str, datasets.Dataset]:
    return _documents("questions", given)


def process_results(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Returns which part of the answers was found, as our own tasks count."""
    return {"accuracy": fmean(answer in results[0] for answer in document["answers"])}
