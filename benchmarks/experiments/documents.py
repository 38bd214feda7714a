"""Documents of `sambalm evaluate`'s tasks on long texts, each with its answer, as shards to tune a model on.

    python -m benchmarks.experiments.documents --tokenizer tokenizer.model --task needles --task questions \\
        --documents 12800 --tokens 4096 --output data/needles

The kinds of all tasks take turns. The seed is not the one that the tasks have by default, so what a tuned model is
asked for was not among its documents. Only the answer, and the end-of-text after it, count in the loss.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.shards import (
    Manifest,
    ShardWriter,
    SourceEntry,
    SourceRange,
    tokenizer_entry,
    write_manifest,
)
from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.evaluation.models.base import LanguageModel, Reader
from sambalm.evaluation.task import Surroundings
from sambalm.evaluation.tasks.long_texts import LongTextTask, TooShortError
from sambalm.evaluation.tasks.registry import TASKS
from sambalm.pretrain.generation.text import TextStream

from .models import ExperimentError

ANSWER_TOKENS = 64  # that a document leaves free: four numbers of seven digits take fewer
SEED = 1
_CHUNK_DOCUMENTS = 32

Document = tuple[list[int], list[bool]]


class _TokensOnly(LanguageModel):
    """The tokenizer that shards were made with, for tasks that make their texts by a model's."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = load_tokenizer(path)
        self.vocab_size, self.end_id = self.tokenizer.vocab_size, self.tokenizer.eos_id
        self.eos_ids = frozenset([self.end_id])
        self.begin_ids, self.begin_id, self.max_tokens = [], None, None  # training puts nothing before a text

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def new_reader(self, rows: int) -> Reader:
        raise TypeError("this has no weights")

    def new_text(self) -> TextStream:
        raise TypeError("this makes texts and reads none")


def documents_of(tokenizer: Path, tasks: Sequence[str], tokens: int, numbers: range) -> list[Document]:
    """Makes documents, each of which depends on its number alone: ids, and which of them count.

    Args:
        tasks: names of tasks on long texts, whose kinds take turns.
        tokens: of a document at most.

    Raises:
        TooShortError: a task's text takes more.
    """
    model = _TokensOnly(tokenizer)
    turns = []
    for name in tasks:
        settings = TASKS[name].schema(lengths=[tokens - ANSWER_TOKENS], samples=1, seed=SEED)
        task = TASKS[name](settings, Surroundings(model, None, cache_dir=tokenizer.parent))
        assert isinstance(task, LongTextTask)
        turns += [(task, cell) for cell in task.cells()]
    found = []
    for sample, turn in (divmod(number, len(turns)) for number in numbers):
        question = turns[turn][0].numbered_question(turns[turn][1], sample)
        answer = [*model.encode_next(f" {', '.join(question.answers)}"), model.tokenizer.eos_id]
        assert len(answer) <= ANSWER_TOKENS, "room was left for the answer"
        found.append(([*question.ids, *answer], [False] * len(question.ids) + [True] * len(answer)))
    return found


def _made(tokenizer: Path, tasks: Sequence[str], *, documents: int, tokens: int) -> Iterator[Document]:
    """Makes documents in order, on all cores."""
    chunks = [range(first, min(first + _CHUNK_DOCUMENTS, documents)) for first in range(0, documents, _CHUNK_DOCUMENTS)]
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, len(chunks))) as pool:
        for found in pool.imap(partial(documents_of, tokenizer, tasks, tokens), chunks):
            yield from found


def main(words: Sequence[str] | None = None) -> None:
    """Makes the shards of a command line.

    Raises:
        ExperimentError, DataError: one sentence each, for the user.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="that of the model to tune")
    parser.add_argument("--task", action="append", choices=_names(), required=True, help="may be repeated")
    parser.add_argument("--documents", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True, help="of a document at most")
    parser.add_argument("--output", type=Path, required=True, help="prefix of the shards")
    arguments = parser.parse_args(words)
    output, tasks, documents, tokens = arguments.output, arguments.task, arguments.documents, arguments.tokens
    if documents < 1:
        raise ExperimentError(f"--documents is {documents}: give at least 1")
    if tokens <= ANSWER_TOKENS:
        raise ExperimentError(f"--tokens is {tokens}, of which {ANSWER_TOKENS} are for the answer: give more")
    tokenizer = load_tokenizer(arguments.tokenizer)
    output.parent.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(output.with_name(f"{output.name}_00000"), tokenizer.vocab_size, masked=True)
    try:
        for ids, counts in _made(arguments.tokenizer, tasks, documents=documents, tokens=tokens):
            writer.add(np.array(ids), np.array(counts))
    except TooShortError as error:
        writer.discard()
        needed = error.needed + ANSWER_TOKENS
        raise ExperimentError(
            f"--tokens is {tokens}, and a document of these tasks takes {needed} or more with its answer: give as many"
        ) from error
    shard = writer.finish()
    writer.commit()
    whole = SourceRange(source=0, first=0, records=documents)
    manifest = Manifest(
        tokenizer=tokenizer_entry(tokenizer, output),
        shards=[shard.model_copy(update={"sources": [whole]})],
        skipped_documents=0,
        sources=[SourceEntry(path=f"made: {', '.join(tasks)}, seed {SEED}", records=documents)],
        options={"made": ", ".join(tasks), "documents": documents, "tokens": tokens, "seed": SEED},
    )
    write_manifest(output, manifest)
    print(f"{output}: {documents:,} documents, {shard.tokens:,} tokens")


def _names() -> list[str]:
    return sorted(name for name, kind in TASKS.items() if issubclass(kind, LongTextTask))


if __name__ == "__main__":
    try:
        main()
    except (ExperimentError, DataError) as error:
        sys.exit(f"error: {error}")
