"""One part of a source, the trained or the held-out one, as a single run of tokens across its shards."""

import bisect
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .errors import DataError
from .loss_mask import mask_bytes, mask_path, unpacked
from .shard_index import Shard
from .shards import LENGTHS_OFFSET_BYTES

_BOUNDS_AT_ONCE = 256
# Of the files that the process may have open (`ulimit -n`), one set of shards takes an eighth at most: a run reads two,
# trained and held-out data, and other packages open files too.
_SHARE_OF_OPEN_FILES = 8
_MOST_OPEN_FILES = 1024


def allow_open_files() -> None:
    """Raises this process's own limit of open files, as far as it may, to what ShardFiles makes use of."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_OPEN_FILES * _SHARE_OF_OPEN_FILES
    wanted = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


class _OpenFile:
    """A file as long as anyone holds on to it; cheaper than io.FileIO."""

    __slots__ = ("number",)

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class ShardFiles:
    """Reads byte ranges of any number of files while a bounded number of them is open; any thread may read.

    Reads, not memory maps: a file that is cut off while it is in use raises, where a map would kill the process.
    """

    def __init__(self) -> None:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = _MOST_OPEN_FILES if limit == resource.RLIM_INFINITY else limit // _SHARE_OF_OPEN_FILES
        self._most = max(1, min(limit, _MOST_OPEN_FILES))
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["ShardFiles"], tuple[()]]:
        """Goes to another process without the files that are open here: each has its own."""
        return ShardFiles, ()

    def read(self, path: str, offset_bytes: int, size_bytes: int) -> bytes:
        """Exactly that range. Raises DataError naming path and offset where the file is missing or shorter."""
        try:
            file = self._open(path)
            content = os.pread(file.number, size_bytes, offset_bytes)
            while len(content) < size_bytes:  # Linux reads 2 GiB at most at once
                more = os.pread(file.number, size_bytes - len(content), offset_bytes + len(content))
                if not more:
                    raise DataError(
                        f"{path} ends at byte {offset_bytes + len(content)} where {size_bytes} bytes from "
                        f"{offset_bytes} on were to be read: it was cut short after the run began; restore it"
                    )
                content += more
        except OSError as error:
            raise DataError(f"cannot read {path} at byte {offset_bytes}: {error.strerror}; restore it") from error
        return content

    def _open(self, path: str) -> _OpenFile:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _OpenFile(path)
                if len(self._files) > self._most:
                    # Closed once the last thread that reads it lets go of it.
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return file


class _DocumentEnds:
    """Ends of a shard's documents in tokens, as a sequence that `bisect` searches without reading all of it."""

    def __init__(self, files: ShardFiles, shard: Shard) -> None:
        self._files, self._shard = files, shard
        self._path, self._itemsize = f"{shard.prefix}.idx", np.dtype(shard.dtype).itemsize

    def __len__(self) -> int:
        return self._shard.documents

    def __getitem__(self, document: int) -> int:
        return int(self.block(document, document + 1)[0])

    def block(self, start: int, stop: int) -> np.ndarray:
        """Ends of documents `start` to `stop`, int64."""
        # The index holds where documents begin, so an end is the next one's beginning.
        stop = min(stop, len(self))
        inner = min(stop, len(self) - 1)
        offset_bytes = LENGTHS_OFFSET_BYTES + 4 * len(self) + 8 * (start + 1)
        begins = np.frombuffer(self._files.read(self._path, offset_bytes, 8 * (inner - start)), dtype=np.int64)
        ends = begins // self._itemsize
        return ends if inner == stop else np.append(ends, self._shard.tokens)


@dataclass(frozen=True)
class _Piece:
    """Tokens `start` to `stop` of a shard."""

    shard: Shard
    start: int
    stop: int


class TokenStream:
    """A part of consecutive shards; `len` counts its tokens. Any thread may read.

    Args:
        files: that other streams may read with as well, so that all of them together have a bounded number open.
    """

    def __init__(self, shards: list[Shard], *, held_out: bool, files: ShardFiles) -> None:
        self.held_out = held_out
        self._files = files
        self._begins = [shard.train_tokens if held_out else 0 for shard in shards]
        ends = [shard.tokens if held_out else shard.train_tokens for shard in shards]
        counts = np.subtract(ends, self._begins, dtype=np.int64)
        self._shards = shards
        self._bounds = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [count], int64, from `start` on. Raises DataError where a shard was cut short after it was checked."""
        parts = []
        for piece in self._pieces(start, count):
            dtype = np.dtype(piece.shard.dtype)
            offset_bytes, size_bytes = piece.start * dtype.itemsize, (piece.stop - piece.start) * dtype.itemsize
            content = self._files.read(f"{piece.shard.prefix}.bin", offset_bytes, size_bytes)
            parts.append(np.frombuffer(content, dtype=dtype))
        return np.concatenate(parts, dtype=np.int64)

    def counts(self, start: int, count: int) -> np.ndarray:
        """Which of `count` tokens from `start` on count in the loss, bool [count]. Raises DataError as `read` does."""
        parts = []
        for piece in self._pieces(start, count):
            tokens = piece.stop - piece.start
            if not piece.shard.masked:
                parts.append(np.ones(tokens, dtype=bool))
                continue
            first = piece.start // 8
            path = str(mask_path(piece.shard.prefix))
            content = self._files.read(path, first, mask_bytes(piece.stop) - first)
            parts.append(unpacked(content, first=piece.start - 8 * first, count=tokens))
        return np.concatenate(parts)

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """For each of `count` tokens from `start` on, where among them its document begins (0 for the first one).

        int64 [count].
        """
        begins, position = [0], 0
        for piece in self._pieces(start, count):
            begins.append(position)  # no document goes on in the next shard
            for end in self._ends_within(piece):
                begins.append(position + end - piece.start)
            position += piece.stop - piece.start
        marks = np.zeros(count, dtype=np.int64)
        marks[begins] = begins
        return np.maximum.accumulate(marks)

    def document_ends(self) -> np.ndarray:
        """Where each document ends in the stream, int64 [documents]."""
        parts = [np.empty(0, dtype=np.int64)]
        for number, shard in enumerate(self._shards):
            first = shard.train_documents if self.held_out else 0
            last = shard.documents if self.held_out else shard.train_documents
            if first < last:
                ends = _DocumentEnds(self._files, shard).block(first, last)
                parts.append(ends + (int(self._bounds[number]) - self._begins[number]))
        return np.concatenate(parts)

    def documents(self) -> Iterator[np.ndarray]:
        """Every document in stored order, int64 [tokens] each."""
        for number, shard in enumerate(self._shards):
            start, stop = (int(bound) for bound in self._bounds[number : number + 2])
            first = shard.train_documents if self.held_out else 0
            last = shard.documents if self.held_out else shard.train_documents
            ends, position = _DocumentEnds(self._files, shard), start
            for block in range(first, last, _BOUNDS_AT_ONCE):
                for end in ends.block(block, min(block + _BOUNDS_AT_ONCE, last)):
                    stop = start + int(end) - self._begins[number]
                    yield self.read(position, stop - position)
                    position = stop

    def place(self, token: int) -> tuple[str, int]:
        """Path of the .bin file that holds a token, and the byte at which it lies there."""
        (piece,) = self._pieces(token, 1)
        return f"{piece.shard.prefix}.bin", piece.start * np.dtype(piece.shard.dtype).itemsize

    def _pieces(self, start: int, count: int) -> Iterator[_Piece]:
        """Where tokens lie. Raises IndexError unless all of them are in the stream."""
        stop = start + count
        if start < 0 or stop > len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        number = int(np.searchsorted(self._bounds, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self._bounds[number + 1]))
            shift = self._begins[number] - int(self._bounds[number])
            if end > start:
                yield _Piece(self._shards[number], start + shift, end + shift)
            start, number = end, number + 1

    def _ends_within(self, piece: _Piece) -> Iterator[int]:
        """Ends of documents after the first token of a piece and before its end."""
        ends = _DocumentEnds(self._files, piece.shard)
        document = bisect.bisect_right(ends, piece.start)
        while document < len(ends):
            for end in ends.block(document, document + _BOUNDS_AT_ONCE):
                if end >= piece.stop:
                    return
                yield int(end)
            document += _BOUNDS_AT_ONCE
