"""Tasks to results: what `sambalm evaluate` does."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sambalm.data_pipeline.files import atomic_write
from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.plots import draw
from sambalm.evaluation.ranks import Alone, Ranks, main_first, on_each
from sambalm.evaluation.records import Records, unwritable
from sambalm.evaluation.results import PLOT, RESULT, Result, package_versions
from sambalm.evaluation.task import Item, Surroundings, Task
from sambalm.evaluation.tasks.registry import TASKS, task_settings

HASH_DIGITS = 12
# Shows what a task of that name is at while it is entered, and is told (tokens done, tokens in all).
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@contextmanager
def silent(_: str) -> Iterator[Callable[[int, int], None]]:
    """Shows nothing; a `Bar`."""
    yield lambda done, total: None


@dataclass(frozen=True)
class Plan:
    """Which tasks to run, and how.

    Args:
        tasks: names, in order.
        overrides: such as "passkey.lengths=[4K,8K]".
        data: what every task reads that has a key `data` and none set.
        output: a folder, in which each protocol has one of its own.
        batch_tokens: that are read together at most, where an item has not more by itself.
    """

    tasks: Sequence[str]
    overrides: Sequence[str]
    data: Sequence[str]
    output: Path
    batch_tokens: int


@dataclass(frozen=True)
class Prepared:
    """A task whose items are known, and what its results depend on."""

    task: Task
    items: Sequence[Item]
    protocol: dict[str, Any]


def prepare(plan: Plan, surroundings: Surroundings, *, ranks: Ranks) -> list[Prepared]:
    """Finds everything that cannot be measured before the first task takes its hours. Collective.

    Raises:
        EvaluationError, DataError: on every rank, one sentence each, for the user.
    """

    def prepared() -> list[Prepared]:
        settings = task_settings(plan.tasks, plan.overrides, data=plan.data)
        tasks = [TASKS[name](settings[name], surroundings) for name in plan.tasks]
        found = [Prepared(task, task.items(), _protocol(task, surroundings)) for task in tasks]
        for each in found:
            _refuse_long_items(each.task, each.items, surroundings)
        return found

    return main_first(ranks, prepared)


def evaluate(plan: Plan, surroundings: Surroundings, *, bar: Bar, ranks: Ranks | None = None) -> Iterator[Result]:
    """Yields the result of each task as soon as it is there; it is then on disk too. Collective.

    Args:
        ranks: the processes that share the items, each with the whole model; None: this one alone.

    Raises:
        EvaluationError, DataError: on every rank, one sentence each, for the user.
    """
    ranks = ranks or Alone()
    for prepared in prepare(plan, surroundings, ranks=ranks):
        task, items, digest = prepared.task, prepared.items, _digest(prepared.protocol)
        folder = plan.output / f"{task.name}-{digest}"
        with Records(folder, ranks=ranks).opened() as records:
            with bar(task.name) as progress:
                _measure(task, items, records, batch_tokens=plan.batch_tokens, progress=progress, ranks=ranks)
            found = records.of([item.id for item in items])
        tokens = sum(record.get("tokens", item.tokens) for record, item in zip(found, items, strict=True))
        result = Result(
            task=task.name,
            model=surroundings.model.identity,
            outcome=task.outcome(found),
            tokens=tokens,
            seconds=round(sum(record["seconds"] for record in found), 3),
            folder=folder,
        )
        ranks.of_main(partial(_write, result, prepared.protocol, digest))
        yield result


def _refuse_long_items(task: Task, items: Sequence[Item], surroundings: Surroundings) -> None:
    limit, longest = surroundings.model.max_tokens, max(item.tokens // item.rows for item in items)
    if limit is not None and longest > limit:
        raise EvaluationError(
            f"{task.name} reads {longest} tokens at once, but {surroundings.model.identity.path} has learned positions "
            f"for {limit}; give shorter lengths"
        )


def _protocol(task: Task, surroundings: Surroundings) -> dict[str, Any]:
    return {
        "task": task.name,
        "version": task.version,
        "settings": task.settings.model_dump(),
        "weights": surroundings.model.identity.fingerprint,
        **task.protocol(),
    }


def _digest(protocol: dict[str, Any]) -> str:
    text = json.dumps(protocol, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]


def _measure(
    task: Task,
    items: Sequence[Item],
    records: Records,
    *,
    batch_tokens: int,
    progress: Callable[[int, int], None],
    ranks: Ranks,
) -> None:
    """Measures what no record is there of: a batch on each rank at a time. Collective."""
    total = sum(item.tokens for item in items)
    done = sum(item.tokens for item in items if item.id in records.known)

    def tick(tokens: int) -> None:
        nonlocal done
        done = min(total, done + tokens)
        progress(done, total)

    tick(0)
    batches = list(_batches([i for i in items if i.id not in records.known], batch_tokens=batch_tokens, pads=task.pads))
    for first in range(0, len(batches), ranks.size):
        own = batches[first : first + ranks.size][ranks.rank : ranks.rank + 1]
        found = on_each(ranks, partial(_records, task, own, tick))
        records.add({item: record for of_rank in found for item, record in of_rank.items()})


def _records(task: Task, batches: Sequence[Sequence[Item]], tick: Callable[[int], None]) -> dict[str, dict[str, Any]]:
    """Measures batches; returns the records of their items by id, each with the seconds that it took."""
    return {
        item.id: {**record, "seconds": seconds / len(part)}
        for batch in batches
        for part, found, seconds in _in_memory(task, batch, tick)
        for item, record in zip(part, found, strict=True)
    }


def _batches(items: Sequence[Item], *, batch_tokens: int, pads: bool) -> Iterator[list[Item]]:
    """Yields consecutive items whose rows, all as long as the longest, have no more tokens; one by itself may."""
    batch: list[Item] = []
    for item in items:
        longest = max(part.tokens // part.rows for part in [*batch, item])
        is_full = sum(part.rows for part in [*batch, item]) * longest > batch_tokens
        if batch and (is_full or not (pads or item.tokens == batch[0].tokens)):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _in_memory(
    task: Task, batch: Sequence[Item], tick: Callable[[int], None]
) -> Iterator[tuple[Sequence[Item], list[dict[str, Any]], float]]:
    """Yields the records of a batch with the seconds that they took; by halves where the device lacks memory."""
    began_s = time.perf_counter()
    try:
        found = task.measure(batch, tick)
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise EvaluationError(
                f"{task.name}: an item of {batch[0].tokens} tokens does not fit the device's memory; give shorter "
                "lengths, another --dtype or another --device"
            ) from error
    else:
        yield batch, found, time.perf_counter() - began_s
        return
    torch.cuda.empty_cache()
    middle = len(batch) // 2
    for part in (batch[:middle], batch[middle:]):
        yield from _in_memory(task, part, tick)


def _write(result: Result, protocol: dict[str, Any], digest: str) -> None:
    """Draws the plot and writes the JSON, which is there once the result is complete."""
    record = result.as_record(protocol, digest) | {"packages": package_versions()}
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    try:
        draw(result.outcome.plot, result.folder / PLOT)
        with atomic_write(result.folder / RESULT) as file:
            file.write(text.encode())
    except OSError as error:
        raise unwritable(result.folder / RESULT, error) from error
