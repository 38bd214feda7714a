"""Documents of token shards in an order drawn from a seed, in bounded memory, however many there are.

A document's key is a hash of its number under the seed, and documents are sorted by their keys. So the order depends on
the seed and the documents' own order alone. The sort is external: a first pass deals documents to files by the highest
bits of their keys, in the folder of the shards, and a second one sorts each of these buckets in memory.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .encoding import TokenBatch
from .errors import DataError
from .files import atomic_write, remove, sync
from .loss_mask import mask_path, unpacked
from .shards import Manifest, check_shard, is_masked, token_dtype

BUCKET_BYTES = 1 << 26  # of tokens in one bucket, on average
_BUFFER_BYTES = 1 << 26  # of tokens that wait to be written to buckets
_READ_BYTES = 1 << 24


@dataclass(frozen=True)
class _Documents:
    """Documents in a row: tokens [sum of lengths], lengths int64, keys uint64, and counts bool [sum of lengths]."""

    tokens: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray
    counts: np.ndarray | None

    def taken(self, order: np.ndarray) -> "_Documents":
        """These documents in another order, or some of them."""
        ends = np.cumsum(self.lengths)
        pairs = list(zip((ends - self.lengths)[order].tolist(), ends[order].tolist(), strict=True))

        def gathered(values: np.ndarray) -> np.ndarray:
            return np.concatenate([values[:0], *(values[start:stop] for start, stop in pairs)])

        counts = None if self.counts is None else gathered(self.counts)
        return _Documents(gathered(self.tokens), self.lengths[order], self.keys[order], counts)


def document_keys(first: int, count: int, *, seed: int) -> np.ndarray:
    """Keys of consecutive documents, uint64 [count]; no two documents have the same."""
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=16).digest()
    found = np.arange(first, first + count, dtype=np.uint64)
    for secret in np.frombuffer(digest, dtype="<u8"):
        found ^= secret
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):  # the finalizer of MurmurHash3, which is a permutation
            found ^= found >> np.uint64(33)
            found *= np.uint64(factor)
        found ^= found >> np.uint64(33)
    return found


class Buckets:
    """The documents of a manifest's shards in buckets, which `fill` makes once; the shards are gone then.

    Args:
        prefix: of the shards; buckets lie beside them.
    """

    def __init__(self, prefix: Path, manifest: Manifest, *, seed: int) -> None:
        self.folder, self._manifest, self._seed = prefix.parent, manifest, seed
        self._entries = {self.folder / shard.name: shard for shard in manifest.shards}
        self.masked = any(shard.mask_sha256 for shard in manifest.shards)
        size = sum(shard.bin_bytes for shard in manifest.shards)
        self._bits = max(0, math.ceil(math.log2(size / BUCKET_BYTES)))
        self.count = 1 << self._bits
        self._done = self.folder / "buckets"  # written when all are complete

    def fill(self) -> None:
        """Deals all documents to buckets, unless an earlier call has; then removes the shards."""
        if not self._done.exists():
            for path in self.folder.glob("bucket-*"):
                path.unlink()  # of an attempt that ended early
            waiting: list[_Documents] = []
            for documents in self._documents():
                waiting.append(documents)
                if sum(one.tokens.nbytes for one in waiting) >= _BUFFER_BYTES:
                    self._deal(waiting)
                    waiting = []
            self._deal(waiting)
            for path in self.folder.glob("bucket-*"):
                sync(path)
            with atomic_write(self._done) as file:
                file.write(b"complete\n")
        for shard in self._entries:
            for suffix in (".bin", ".idx", ".mask"):
                remove(Path(f"{shard}{suffix}"))

    def batches(self, *, bucket: int, document: int) -> Iterator[tuple[int, TokenBatch]]:
        """Each bucket's number and its documents in their order, from a document of a bucket on."""
        for number in range(bucket, self.count):
            read = self._read(number)
            order = np.argsort(read.keys)[document if number == bucket else 0 :]
            found, first = read.taken(order), document if number == bucket else 0
            yield (
                number,
                TokenBatch(
                    tokens=found.tokens,
                    lengths=found.lengths,
                    positions=np.arange(first, first + len(order)),
                    text_bytes=np.zeros(len(order), dtype=np.int64),
                    bad=[],
                    counts=found.counts,
                ),
            )

    def _documents(self) -> Iterator[_Documents]:
        """All documents in stored order, some MiB at a time."""
        number = 0
        for shard, entry in self._entries.items():
            index = check_shard(shard, entry)
            lengths = index.lengths.astype(np.int64)
            ends = np.cumsum(lengths)
            mask = mask_path(shard).read_bytes() if is_masked(shard, entry) else None
            start = token = 0
            with open(f"{shard}.bin", "rb") as file:
                while start < len(lengths):
                    room = token + _READ_BYTES // index.dtype.itemsize
                    stop = max(start + 1, int(np.searchsorted(ends, room, side="right")))
                    count = int(ends[stop - 1]) - token
                    tokens = np.fromfile(file, dtype=index.dtype, count=count)
                    if len(tokens) < count:
                        raise DataError(f"{shard}.bin has become shorter while it was read; preprocess the data again")
                    counts = None
                    if self.masked:
                        counts = np.ones(count, dtype=bool)
                        if mask is not None:
                            counts = unpacked(mask[token // 8 : -(-(token + count) // 8)], first=token % 8, count=count)
                    keys = document_keys(number, stop - start, seed=self._seed)
                    yield _Documents(tokens, lengths[start:stop], keys, counts)
                    number, start, token = number + stop - start, stop, token + count

    def _deal(self, waiting: list[_Documents]) -> None:
        """Appends documents to the files of their buckets, each opened once."""
        if not waiting:
            return
        counts = [one.counts for one in waiting if one.counts is not None]
        documents = _Documents(
            np.concatenate([one.tokens for one in waiting]),
            np.concatenate([one.lengths for one in waiting]),
            np.concatenate([one.keys for one in waiting]),
            np.concatenate(counts) if counts else None,
        )
        buckets = documents.keys >> np.uint64(64 - self._bits) if self._bits else np.zeros_like(documents.keys)
        order = np.argsort(buckets, kind="stable")
        bounds = np.searchsorted(buckets[order], np.arange(self.count + 1, dtype=np.uint64))
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if start == stop:
                continue
            taken = documents.taken(order[start:stop])
            for what, values in self._columns(taken).items():
                with open(self._path(number, what), "ab") as file:
                    file.write(values.tobytes())

    def _read(self, number: int) -> _Documents:
        def column(what: str, dtype: type[np.generic]) -> np.ndarray:
            path = self._path(number, what)
            return np.fromfile(path, dtype=dtype) if path.exists() else np.empty(0, dtype=dtype)

        tokens = column("tokens", token_dtype(self._manifest.tokenizer.vocab_size))
        counts = column("counts", np.bool_) if self.masked else None
        return _Documents(tokens, column("lengths", np.int64), column("keys", np.uint64), counts)

    def _columns(self, documents: _Documents) -> dict[str, np.ndarray]:
        columns = {"tokens": documents.tokens, "lengths": documents.lengths, "keys": documents.keys}
        return columns | ({"counts": documents.counts} if documents.counts is not None else {})

    def _path(self, number: int, what: str) -> Path:
        return self.folder / f"bucket-{number:06d}.{what}"
