"""Our tasks on long texts as data sets of lm-eval's, for any model that it runs.

lm-eval hands over what it was told of the model and what `--metadata` says: `tokenizer` or `pretrained` is a folder
with a tokenizer, and the other names that a task knows are its keys, such as `lengths`.
"""

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.models.causal_lm import TokenizerOnly
from sambalm.evaluation.settings import parse_settings
from sambalm.evaluation.task import Surroundings
from sambalm.evaluation.tasks.long_texts import LongTextTask
from sambalm.evaluation.tasks.registry import TASKS

if TYPE_CHECKING:
    import datasets


def documents(name: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a task's texts, each with its answers and with what sets it apart, such as its length.

    Raises:
        EvaluationError: no tokenizer is given, or a key has a value that is not allowed.
    """
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
    return [
        {"text": model.decode(question.ids), "answers": list(question.answers), **cell.at}
        for cell in task.cells()
        for question in (task.numbered_question(cell, sample) for sample in range(cell.samples))
    ]


def _splits(name: str, given: dict[str, Any]) -> dict[str, "datasets.Dataset"]:
    import datasets  # which comes with lm-eval

    return {"test": datasets.Dataset.from_list(documents(name, given))}


def passkey(**given: Any) -> dict[str, "datasets.Dataset"]:
    return _splits("passkey", given)


def phonebook(**given: Any) -> dict[str, "datasets.Dataset"]:
    return _splits("phonebook", given)


def needles(**given: Any) -> dict[str, "datasets.Dataset"]:
    return _splits("needles", given)


def variables(**given: Any) -> dict[str, "datasets.Dataset"]:
    return _splits("variables", given)


def aggregation(**given: Any) -> dict[str, "datasets.Dataset"]:
    return _splits("aggregation", given)


def questions(**given: Any) -> dict[str, "datasets.Dataset"]:
    return _splits("questions", given)


def process_results(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Returns which part of the answers was found, as our own tasks count."""
    return {"accuracy": fmean(answer in results[0] for answer in document["answers"])}
