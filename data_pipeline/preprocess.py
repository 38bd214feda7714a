"""JSONL to token shards: worker processes tokenise, this process writes, in the order of the input."""

import functools
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .documents import Document, expand_inputs, read_documents
from .errors import DataError
from .shards import (
    Manifest,
    ShardEntry,
    ShardWriter,
    TokenizerEntry,
    manifest_path,
    write_manifest,
)
from .tokenizer import Tokenizer

_BATCH_BYTES = 1 << 20
_BATCHES_IN_FLIGHT_PER_WORKER = 3


@dataclass(frozen=True)
class PreprocessSummary:
    """What was written. `read_bytes` counts the input's lines, `skipped_documents` those without tokens."""

    documents: int
    skipped_documents: int
    tokens: int
    shards: int
    read_bytes: int
    duration_s: float


@dataclass(frozen=True)
class _TokenBatch:
    """Ids of consecutive documents, tokens [sum of lengths] int32, lengths [documents] int64."""

    tokens: np.ndarray
    lengths: np.ndarray
    read_bytes: int


def preprocess(
    inputs: Iterable[str | Path],
    *,
    tokenizer: str | Path,
    output_prefix: str | Path,
    workers: int = 1,
    shard_tokens: int = 2**30,
    text_key: str = "text",
    append_eos: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> PreprocessSummary:
    """Tokenise documents into shards OUTPUT_PREFIX_00000.bin/.idx, ... and write the manifest OUTPUT_PREFIX.json last.

    A shard takes at most `shard_tokens` tokens, or one longer document. The files are the same bytes for any number
    of `workers`. Until everything is tokenised there are only hidden temporary files, which a failure removes.
    `progress` receives (bytes read, bytes of all inputs).
    Raises DataError for bad input, existing output without `overwrite`, or output that cannot be written.
    """
    for name, value in (("workers", workers), ("shard_tokens", shard_tokens)):
        if value < 1:
            raise DataError(f"{name}={value} must be at least 1")
    start_s = time.perf_counter()
    paths = expand_inputs(inputs)
    model = Tokenizer.load(tokenizer)
    if append_eos and model.eos_id < 0:
        raise DataError(f"the tokenizer {tokenizer} has no EOS; turn off append_eos or use another tokenizer")
    existing = _existing_output(Path(output_prefix))
    if existing and not overwrite:
        raise DataError(f"{existing[0]} exists already; choose another output prefix, or overwrite it")

    total_bytes = sum(path.stat().st_size for path in paths)
    shards = _ShardSet(Path(output_prefix), vocab_size=model.vocab_size, shard_tokens=shard_tokens)
    read_bytes = 0
    try:
        documents = (document for path in paths for document in read_documents(path, text_key=text_key))
        eos_id = model.eos_id if append_eos else None
        with closing(_tokenise(documents, model=model, eos_id=eos_id, workers=workers)) as batches:
            for batch in batches:
                shards.add(batch)
                read_bytes += batch.read_bytes
                if progress:
                    progress(read_bytes, total_bytes)
        options = {"append_eos": append_eos, "shard_tokens": shard_tokens, "text_key": text_key}
        entries = shards.finish()
        manifest = Manifest(
            tokenizer=_tokenizer_entry(model, directory=Path(output_prefix).parent),
            shards=entries,
            skipped_documents=shards.skipped_documents,
            sources=[str(path) for path in paths],
            options=options,
        )
        shards.commit(manifest, replaced=existing)
    except OSError as error:
        raise DataError(f"cannot write {output_prefix}: {error.strerror or error}; check space and rights") from error
    finally:
        shards.discard()
    return PreprocessSummary(
        documents=sum(entry.documents for entry in entries),
        skipped_documents=shards.skipped_documents,
        tokens=sum(entry.tokens for entry in entries),
        shards=len(entries),
        read_bytes=read_bytes,
        duration_s=time.perf_counter() - start_s,
    )


class _ShardSet:
    """The shards of one output: starts the next when one is full, and commits all or none."""

    def __init__(self, prefix: Path, *, vocab_size: int, shard_tokens: int) -> None:
        self.skipped_documents = 0
        self._prefix = prefix
        self._vocab_size = vocab_size
        self._shard_tokens = shard_tokens
        self._writer: ShardWriter | None = None
        self._finished: list[ShardWriter] = []
        self._entries: list[ShardEntry] = []

    def add(self, batch: _TokenBatch) -> None:
        for tokens in np.split(batch.tokens, np.cumsum(batch.lengths)[:-1]):
            if tokens.size:
                self._writer_for(tokens.size).add(tokens)
            else:
                self.skipped_documents += 1

    def _writer_for(self, tokens: int) -> ShardWriter:
        if self._writer and self._writer.tokens + tokens > self._shard_tokens:
            self._close_writer()
        if not self._writer:
            self._writer = ShardWriter(f"{self._prefix}_{len(self._finished):05d}", self._vocab_size)
        return self._writer

    def _close_writer(self) -> None:
        self._entries.append(self._writer.finish())
        self._finished.append(self._writer)
        self._writer = None

    def finish(self) -> list[ShardEntry]:
        if not self._writer:
            raise DataError(f"the inputs hold no tokens: all {self.skipped_documents} documents are empty")
        self._close_writer()
        return self._entries

    def commit(self, manifest: Manifest, *, replaced: list[Path]) -> None:
        # The old manifest goes first and the new one comes last, so that none ever describes other shards.
        manifest_path(self._prefix).unlink(missing_ok=True)
        for path in replaced:
            path.unlink(missing_ok=True)
        try:
            for writer in self._finished:
                writer.commit()
            write_manifest(self._prefix, manifest)
        except BaseException:
            for path in _existing_output(self._prefix):
                path.unlink(missing_ok=True)
            raise

    def discard(self) -> None:
        """Remove temporary files; after `commit` there are none."""
        for writer in [*self._finished, *filter(None, [self._writer])]:
            writer.discard()


def _existing_output(prefix: Path) -> list[Path]:
    """Manifest and shards that a run with this prefix would replace."""
    if not prefix.parent.is_dir():
        return []
    name = re.compile(re.escape(prefix.name) + r"(\.json|_\d{5,}\.(bin|idx))")
    return sorted(path for path in prefix.parent.iterdir() if name.fullmatch(path.name))


def _tokenizer_entry(model: Tokenizer, *, directory: Path) -> TokenizerEntry:
    return TokenizerEntry(
        path=os.path.relpath(model.path.resolve(), directory.resolve()),
        sha256=model.sha256,
        vocab_size=model.vocab_size,
        eos_id=model.eos_id,
    )


def _tokenise(
    documents: Iterable[Document], *, model: Tokenizer, eos_id: int | None, workers: int
) -> Iterator[_TokenBatch]:
    """Batches in the order of the documents. With several workers a bounded number of batches is under way."""
    batches = _batches(documents)
    if workers == 1:
        for texts, read_bytes in batches:
            yield _encode(model, texts, eos_id, read_bytes)
        return
    # spawn: the caller may have threads, such as a progress display's, and their locks would be forked while held.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    pending = deque()
    try:
        for texts, read_bytes in batches:
            pending.append(executor.submit(_encode_in_worker, str(model.path), texts, eos_id, read_bytes))
            if len(pending) >= workers * _BATCHES_IN_FLIGHT_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a tokenising process was killed, perhaps for memory; use fewer workers") from error
    finally:
        executor.shutdown(cancel_futures=True)


def _batches(documents: Iterable[Document]) -> Iterator[tuple[list[str], int]]:
    texts, read_bytes = [], 0
    for document in documents:
        texts.append(document.text)
        read_bytes += document.size_bytes
        if read_bytes >= _BATCH_BYTES:
            yield texts, read_bytes
            texts, read_bytes = [], 0
    if texts:
        yield texts, read_bytes


def _encode(model: Tokenizer, texts: list[str], eos_id: int | None, read_bytes: int) -> _TokenBatch:
    documents = model.encode_batch(texts)
    if eos_id is not None:
        for ids in filter(None, documents):
            ids.append(eos_id)
    return _TokenBatch(
        tokens=np.concatenate([np.array(ids, dtype=np.int32) for ids in documents]),
        lengths=np.array([len(ids) for ids in documents], dtype=np.int64),
        read_bytes=read_bytes,
    )


# Only worker processes, which live as long as one run, may keep a tokenizer by its path.
_load_in_worker = functools.cache(Tokenizer.load)


def _encode_in_worker(path: str, texts: list[str], eos_id: int | None, read_bytes: int) -> _TokenBatch:
    return _encode(_load_in_worker(path), texts, eos_id, read_bytes)


def _start_worker() -> None:
    # The parent handles Ctrl-C and ends its workers; one whose parent was killed would wait for work for ever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
