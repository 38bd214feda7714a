"""Packing token batches into consecutive shards, each committed as soon as it is full."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .encoding import TokenBatch
from .progress import Position, ProgressLog
from .shards import ShardWriter, SourceRange


class ShardSequence:
    """The shards of one part. Goes on after those that the log has.

    A shard takes at most `shard_tokens` tokens, or one longer document. Each ends where the next document would not
    fit, so that the shards depend on the documents alone. `before_first_commit` runs once, before anything appears.
    `masked`: batches say which tokens count in the loss.
    The owner calls `finish`, and `discard` in any case.
    """

    def __init__(
        self,
        log: ProgressLog,
        *,
        shard_prefix: Callable[[int], Path],
        vocab_size: int,
        shard_tokens: int,
        before_first_commit: Callable[[], None],
        masked: bool = False,
    ) -> None:
        self._log = log
        self._shard_prefix = shard_prefix
        self._vocab_size = vocab_size
        self._shard_tokens = shard_tokens
        self._masked = masked
        self._before_first_commit: Callable[[], None] | None = before_first_commit
        self._writer: ShardWriter | None = None
        self._ranges: list[SourceRange] = []
        self._text_bytes = 0
        self._next = log.progress.next or Position(source=0, position=0, record=0)

    def add(self, source: int, batch: TokenBatch) -> None:
        """Append the records of a piece of file number `source`. Raises OSError where they cannot be written."""
        counts = np.maximum(batch.lengths, 0)
        ends = np.cumsum(counts)
        start, records = 0, len(counts)
        while start < records:
            used = int(ends[start - 1]) if start else 0
            held = self._writer.tokens if self._writer else 0
            stop = int(np.searchsorted(ends, used + self._shard_tokens - held, side="right"))
            if stop == start and not held:
                stop = start + 1  # a document longer than a shard is one
            if stop > start:
                self._append(source, batch, slice(start, stop), used)
                start = stop
            if start < records:
                # The records in front of this one are the shard's, this one is the next shard's.
                self._next = Position(source=source, position=int(batch.positions[start]), record=self._record(source))
                self._commit()

    def _record(self, source: int) -> int:
        return self._next.record if self._next.source == source else 0

    def _append(self, source: int, batch: TokenBatch, records: slice, token: int) -> None:
        lengths = batch.lengths[records]
        documents = lengths[lengths > 0]
        first, count = self._record(source), len(lengths)
        if documents.size:
            if self._writer is None:
                prefix = self._shard_prefix(len(self._log.progress.shards))
                self._writer = ShardWriter(prefix, self._vocab_size, masked=self._masked)
            taken = slice(token, token + int(documents.sum()))
            counts = None if batch.counts is None else batch.counts[taken]
            self._writer.add_documents(batch.tokens[taken], documents, counts)
        self._text_bytes += int(batch.text_bytes[records][lengths > 0].sum())
        skipped, malformed = int((lengths == 0).sum()), int((lengths < 0).sum())
        if self._ranges and self._ranges[-1].source == source:
            self._ranges[-1].records += count
            self._ranges[-1].skipped += skipped
            self._ranges[-1].malformed += malformed
        else:
            found = SourceRange(source=source, first=first, records=count, skipped=skipped, malformed=malformed)
            self._ranges.append(found)
        self._next = Position(source=source, position=0, record=first + count)

    def _commit(self) -> None:
        writer = self._writer
        assert writer is not None, "only a shard with a document is committed"
        entry = writer.finish()
        if self._before_first_commit:
            self._before_first_commit()
            self._before_first_commit = None
        writer.commit()
        self._writer = None
        entry = entry.model_copy(update={"text_bytes": self._text_bytes, "sources": self._ranges})
        self._log.commit(entry, self._next)
        self._ranges, self._text_bytes = [], 0

    def finish(self, end: Position, sources: Sequence[str] = ()) -> None:
        """Commit the last shard; `end` is where no record is left. `sources` as in ProgressLog.finish."""
        if self._writer:
            self._next = end
            self._commit()
        self._log.finish(self._ranges, sources)

    def discard(self) -> None:
        """Remove what is not committed; after `finish` there is nothing."""
        if self._writer:
            self._writer.discard()
