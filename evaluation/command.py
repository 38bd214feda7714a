"""From a model's path and the names of tasks to tables and files: what the command does."""

import json
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.models.loading import open_model
from sambalm.evaluation.ranks import main_first, started
from sambalm.evaluation.results import RESULT, Result, table
from sambalm.evaluation.runner import Bar, Plan, evaluate, silent
from sambalm.evaluation.task import Surroundings
from sambalm.evaluation.tasks.registry import TASKS, described_keys, task_settings
from sambalm.pretrain.checkpointing.format import MANIFEST
from sambalm.pretrain.errors import Interrupted

FOLDER, CACHE = "evaluation", ".index_cache"


def evaluate_model(
    path: Path,
    *,
    tasks: Sequence[str],
    overrides: Sequence[str],
    data: Sequence[str],
    output: Path | None,
    batch_tokens: int,
    device: str | None,
    dtype: str | None,
    tokenizer: Path | None,
    step: int | None,
    as_json: bool,
    bar: Bar,
) -> None:
    """Runs tasks on a model, prints their results and leaves them on disk.

    Args:
        path: as `open_model` takes it, and likewise device, dtype, tokenizer and step.
        tasks, overrides, data, batch_tokens: as in `Plan`.
        output: the folder; None for `evaluation` in the run, and for one beside a Hugging Face folder.
        as_json: whether one JSON list is printed at the end instead of tables.
        bar: shows how far a task is.

    Raises:
        EvaluationError and those of `open_model`: one sentence each, for the user.
    """
    if not tasks:
        raise EvaluationError(f"there is nothing to measure: give --task, once or several times, of {', '.join(TASKS)}")
    task_settings(tasks, overrides, data=data)  # before a model is loaded, which may take minutes
    folder = output or _default_output(path)
    plan = Plan(tasks, overrides, data, folder, batch_tokens)
    with started(device) as (ranks, place):
        # The main one first, since opening may leave files behind that the others read.
        opened = main_first(ranks, lambda: open_model(path, device=place, dtype=dtype, tokenizer=tokenizer, step=step))
        surroundings = Surroundings(opened.model, opened.run, cache_dir=folder / CACHE)
        results = evaluate(plan, surroundings, bar=bar if ranks.is_main else silent, ranks=ranks)
        try:
            if ranks.is_main:
                _show(results, as_json=as_json)
            else:
                deque(results, maxlen=0)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped; what is done is kept in {folder}, and the same command goes on from there"
            ) from None


def _show(results: Iterable[Result], *, as_json: bool) -> None:
    """Prints each result when it is there, or all as JSON at the end."""
    console, records = Console(), []
    for result in results:
        if as_json:
            records.append(json.loads((result.folder / RESULT).read_text("utf-8")))
        else:
            console.print(table(result))
    if as_json:
        print(json.dumps(records, indent=2))


def print_tasks() -> None:
    """Prints every task with its keys, their defaults and what they mean."""
    shown = Table("key", "default", "meaning", title="Tasks of sambalm evaluate", show_lines=False)
    for name, task in TASKS.items():
        shown.add_section()
        shown.add_row(f"[bold]{name}[/bold]", "", task.summary)
        for key, default, meaning in described_keys(task.schema):
            shown.add_row(f"{name}.{key}", default, meaning)
    Console().print(shown)


def _default_output(path: Path) -> Path:
    """Returns a folder in the run, also for one of its checkpoints; of a Hugging Face folder one beside it.

    A conversion that is repeated replaces the whole Hugging Face folder.
    """
    whole = path.absolute()
    if (path / MANIFEST).is_file() and whole.parent.name == "checkpoints":
        return whole.parent.parent / FOLDER
    if (path / "config.json").is_file():
        return (path if path.name else whole).with_name(f"{whole.name}-{FOLDER}")
    return path / FOLDER
