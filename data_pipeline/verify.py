"""Every byte of a prefix against its manifest, and every id against the vocabulary."""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from .errors import DataError
from .files import sha256_file
from .loss_mask import mask_path
from .output import shard_files_of_any_part
from .shards import CHECKSUM_BLOCK_BYTES, Manifest, ShardEntry, ShardIndex, check_shard, read_manifest, shard_prefixes


@dataclass(frozen=True)
class Verification:
    """What was read, and a sentence for each thing that is wrong."""

    shards: int
    tokens: int
    problems: list[str]


def verify(
    prefix: str | Path,
    *,
    vocab_size: int | None = None,
    workers: int = 1,
    progress: Callable[[int, int | None], None] | None = None,
) -> Verification:
    """Read all files of a prefix. `vocab_size` is for data without a manifest, which knows its own.

    Finds shards that are missing, cut, changed, exchanged or of nobody, ids outside the vocabulary and a tokenizer that
    is another than the one that made the data. `progress` receives (bytes read, bytes of all shards).
    Raises DataError where there is no data under the prefix or its manifest cannot be read.
    """
    prefix = Path(prefix)
    manifest = read_manifest(prefix)
    prefixes = [Path(path) for path in shard_prefixes(prefix)]
    entries = manifest.shards if manifest else [None] * len(prefixes)
    vocab_size = manifest.tokenizer.vocab_size if manifest else vocab_size
    by_content = {entry.bin_sha256: entry.name for entry in entries if entry}
    total_bytes = sum(path.stat().st_size for path in map(_bin, prefixes) if path.exists())
    read_bytes, problems = 0, _problems_of_the_prefix(prefix, manifest)

    def check(prefix: Path, entry: ShardEntry | None) -> tuple[list[str], int, int]:
        found = list(_problems_of_a_shard(prefix, entry, by_content=by_content, vocab_size=vocab_size))
        size_bytes = _bin(prefix).stat().st_size if _bin(prefix).exists() else 0
        return found, size_bytes, _tokens(prefix)

    tokens = 0
    with ThreadPoolExecutor(workers) as pool:
        for found, size_bytes, shard_tokens in pool.map(check, prefixes, entries):
            problems += found
            tokens += shard_tokens
            read_bytes += size_bytes
            if progress:
                progress(read_bytes, total_bytes)
    return Verification(len(prefixes), tokens, problems)


def _bin(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.bin")


def _tokens(prefix: Path) -> int:
    try:
        return int(check_shard(prefix).lengths.sum(dtype=np.int64))
    except DataError:
        return 0


def _problems_of_the_prefix(prefix: Path, manifest: Manifest | None) -> list[str]:
    if manifest is None:
        return []
    names = {entry.name for entry in manifest.shards}
    problems = [
        f"{path} is no shard of the manifest: another tool or run put it there, so remove it"
        for path in shard_files_of_any_part(prefix)
        if path.stem not in names
    ]
    tokenizer = prefix.parent / manifest.tokenizer.path
    if tokenizer.is_file() and sha256_file(tokenizer) != manifest.tokenizer.sha256:
        problems.append(f"{tokenizer} is not the tokenizer that made {prefix}: its content has changed")
    return problems


def _problems_of_a_shard(
    prefix: Path, entry: ShardEntry | None, *, by_content: dict[str, str], vocab_size: int | None
) -> Iterator[str]:
    index = None
    try:
        index = check_shard(prefix, entry)
    except DataError as error:
        yield str(error)
    idx = prefix.with_name(f"{prefix.name}.idx")
    if entry and idx.exists() and sha256_file(idx) != entry.idx_sha256:
        yield f"{idx} has changed since it was written; fetch or preprocess it again"
    if (
        entry
        and entry.mask_sha256
        and mask_path(prefix).exists()
        and sha256_file(mask_path(prefix)) != entry.mask_sha256
    ):
        yield f"{mask_path(prefix)} has changed since it was written; fetch or preprocess it again"
    if not _bin(prefix).exists():
        return
    dtype = index.dtype if index else None
    read = read_bin(_bin(prefix), dtype=dtype, vocab_size=vocab_size)
    if entry and read.sha256 != entry.bin_sha256:
        if read.sha256 in by_content:
            yield f"{_bin(prefix)} holds the content of {by_content[read.sha256]}"
        else:
            yield from changed_blocks(_bin(prefix), read.crc32, entry)
    if index and read.bad is not None:
        token_id, offset_bytes = read.bad
        yield (
            f"{_bin(prefix)} holds token id {token_id} at byte {offset_bytes}{_document(index, offset_bytes)}, outside "
            f"the vocabulary of {vocab_size}"
        )


@dataclass(frozen=True)
class BinContent:
    """What one pass over a .bin found: checksums, and the first id outside the vocabulary with its offset in bytes."""

    sha256: str
    crc32: list[int]
    bad: tuple[int, int] | None


def read_bin(path: Path, *, dtype: np.dtype | None = None, vocab_size: int | None = None) -> BinContent:
    """Read a whole .bin in bounded memory; ids are compared where dtype and vocabulary are known."""
    sha256, crc32, bad, offset = hashlib.sha256(), [], None, 0
    with open(path, "rb") as file:
        while content := file.read(CHECKSUM_BLOCK_BYTES):
            sha256.update(content)
            crc32.append(zlib.crc32(content))
            if dtype is not None and vocab_size is not None and bad is None:
                ids = np.frombuffer(content, dtype=dtype, count=len(content) // dtype.itemsize)
                if ids.size and (ids.max() >= vocab_size or ids.min() < 0):
                    first = int(np.argmax((ids >= vocab_size) | (ids < 0)))
                    bad = (int(ids[first]), offset + first * dtype.itemsize)
            offset += len(content)
    return BinContent(sha256.hexdigest(), crc32, bad)


def changed_blocks(path: Path, crc32: list[int], entry: ShardEntry) -> Iterator[str]:
    """A sentence for each run of blocks of a .bin whose checksums now differ from those of its entry."""
    if not entry.bin_crc32:
        yield f"{path} has changed since it was written; fetch or preprocess it again"
        return
    written = [int(entry.bin_crc32[start : start + 8], 16) for start in range(0, len(entry.bin_crc32), 8)]
    different = [n for n, (now, then) in enumerate(zip(crc32, written, strict=False)) if now != then]
    for _, run in groupby(enumerate(different), lambda pair: pair[1] - pair[0]):
        blocks = [block for _, block in run]
        start = blocks[0] * CHECKSUM_BLOCK_BYTES
        stop = min((blocks[-1] + 1) * CHECKSUM_BLOCK_BYTES, path.stat().st_size)
        yield f"{path} has changed since it was written, in bytes {start} to {stop}; fetch or preprocess it again"


def _document(index: ShardIndex, offset_bytes: int) -> str:
    ends = np.cumsum(index.lengths, dtype=np.int64) * index.dtype.itemsize
    return f" in document {int(np.searchsorted(ends, offset_bytes, side='right'))}"
