"""The index of a source: what a run has to know of each shard, found once and kept in a file.

An index belongs to the sizes and times of a source's files, so that other files under the same prefix get another
one. It appears whole or not at all, and two processes that make it at once make the same file.
"""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import DataError
from .files import atomic_write, sha256_file
from .loss_mask import mask_path
from .shards import Manifest, ShardEntry, check_shard, is_masked, manifest_path, read_manifest, shard_prefixes
from .verify import changed_blocks, read_bin

FORMAT_VERSION = 1
Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNK_TOKENS = 1 << 20
# Hashes and network file systems both gain from several at once.
_THREADS = min(32, 4 * (os.cpu_count() or 1))


class IdRange(BaseModel):
    """Lowest and highest token id of a shard and the byte offsets in .bin where they first occur."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lowest: int
    lowest_offset_bytes: int
    highest: int
    highest_offset_bytes: int


class Shard(BaseModel):
    """A checked shard, of which the first `train_documents` are trained on and the others held out.

    `content` changes whenever the tokens do, or which of them count in the loss; `masked` tells
    whether some do not. `dtype` is that of .bin; `ids` is None where data.verify is off.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefix: str
    dtype: str
    documents: int
    tokens: int
    train_documents: int
    train_tokens: int
    content: str
    masked: bool = False
    ids: IdRange | None


class _SourceIndex(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    shards: list[Shard]


@dataclass(frozen=True)
class IndexRequest:
    """Which source to index, how much of it to hold out, whether to read the tokens, and where the index goes."""

    prefix: str
    validation_fraction: float
    verify: bool
    directory: Path


def indexed_shards(request: IndexRequest, *, progress: Callable[[int, int | None], None] | None = None) -> list[Shard]:
    """The shards of a source from its index, which is made where it is missing or its files have changed.

    `progress` receives (shards checked, shards) where the index is made.
    Raises DataError for missing or damaged shards, naming the file and, of a token, its byte.
    """
    manifest = read_manifest(request.prefix)
    prefixes = shard_prefixes(request.prefix)
    path = _index_path(request, prefixes)
    try:
        return _SourceIndex.model_validate_json(path.read_bytes()).shards
    except (OSError, ValidationError):  # none yet, or of another version: it is made anew
        pass
    _check_writable(request.directory)
    shards = _check_shards(request, manifest, prefixes, progress=progress)
    try:
        with atomic_write(path) as file:
            file.write(_SourceIndex(shards=shards).model_dump_json().encode())
    except OSError as error:
        raise _unwritable(request.directory, error.strerror) from error
    return shards


def is_indexed(request: IndexRequest) -> bool:
    """Returns whether `indexed_shards` would find an index. Raises DataError where there are no shards."""
    return _index_path(request, shard_prefixes(request.prefix)).exists()


def _index_path(request: IndexRequest, prefixes: list[str]) -> Path:
    return request.directory / f"{Path(request.prefix).name}-{_key(request, prefixes)}.json"


def _check_writable(directory: Path) -> None:
    """Before the shards are read, which may take long."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(directory, error.strerror) from error
    if not os.access(directory, os.W_OK):
        raise _unwritable(directory, "Permission denied")


def _unwritable(directory: Path, reason: str | None) -> DataError:
    return DataError(f"cannot write the index in {directory}: {reason}; set data.cache_dir to a writable directory")


def _key(request: IndexRequest, prefixes: list[str]) -> str:
    """Name of an index: other content under the same prefix has other sizes or times, or another manifest."""
    manifest = manifest_path(request.prefix)
    parts = [
        FORMAT_VERSION,
        request.prefix,
        request.validation_fraction,
        request.verify,
        sha256_file(manifest) if manifest.exists() else None,
        _on_each(prefixes, _file_states),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _file_states(prefix: str) -> list[int]:
    states = []
    masks = [mask_path(prefix)] if mask_path(prefix).exists() else []
    for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin"), *masks):
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"cannot read the shard file {path}: {error.strerror}; restore it") from error
        states += [status.st_size, status.st_mtime_ns]
    return states


def _check_shards(
    request: IndexRequest,
    manifest: Manifest | None,
    prefixes: list[str],
    *,
    progress: Callable[[int, int | None], None] | None,
) -> list[Shard]:
    entries = manifest.shards if manifest else [None] * len(prefixes)
    vocab_size = manifest.tokenizer.vocab_size if manifest else None

    def check(item: tuple[str, ShardEntry | None]) -> Shard:
        prefix, entry = item
        return _checked(prefix, entry, vocab_size=vocab_size, request=request)

    return _on_each(list(zip(prefixes, entries, strict=True)), check, progress=progress)


def _on_each(
    items: list[Item],
    action: Callable[[Item], Result],
    *,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[Result]:
    """Results in order; the first failure, in order, cancels what has not begun."""
    results = []
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for result in pool.map(action, items):
                results.append(result)
                if progress:
                    progress(len(results), len(items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def _checked(prefix: str, entry: ShardEntry | None, *, vocab_size: int | None, request: IndexRequest) -> Shard:
    index = check_shard(prefix, entry)
    idx_sha256 = sha256_file(Path(f"{prefix}.idx"))
    if entry and idx_sha256 != entry.idx_sha256:
        raise DataError(
            f"{prefix}.idx is not the file that {manifest_path(request.prefix)} describes (its SHA-256 differs); "
            "restore it or preprocess the data again"
        )
    ids = None
    if request.verify:
        ids, bin_sha256 = _scan(prefix, index.dtype)
        if vocab_size is not None:
            check_ids(prefix, ids, vocab_size=vocab_size, of=f"the tokenizer in {manifest_path(request.prefix)}")
        if entry and bin_sha256 != entry.bin_sha256:
            path = Path(f"{prefix}.bin")
            raise DataError(next(changed_blocks(path, read_bin(path).crc32, entry)))
    elif entry:
        bin_sha256 = entry.bin_sha256
    else:
        status = os.stat(f"{prefix}.bin")
        bin_sha256 = f"unread {status.st_size} {status.st_mtime_ns}"
    content, masked = f"{idx_sha256} {bin_sha256}", is_masked(prefix, entry)
    if masked:
        mask_sha256 = sha256_file(mask_path(prefix))
        if entry and mask_sha256 != entry.mask_sha256:
            raise DataError(f"{mask_path(prefix)} has changed since it was written; fetch or preprocess it again")
        content += f" {mask_sha256}"
    documents = len(index.lengths)
    train_documents = documents - _held_out_documents(documents, request.validation_fraction)
    return Shard(
        prefix=prefix,
        dtype=index.dtype.name,
        documents=documents,
        tokens=int(index.lengths.sum(dtype=np.int64)),
        train_documents=train_documents,
        train_tokens=int(index.lengths[:train_documents].sum(dtype=np.int64)),
        content=content,
        masked=masked,
        ids=ids,
    )


def _held_out_documents(documents: int, fraction: float) -> int:
    """At least one document is held out, but never the only one; none where nothing should be."""
    return min(documents - 1, max(1, round(fraction * documents))) if fraction else 0


def check_ids(prefix: str, ids: IdRange, *, vocab_size: int, of: str) -> None:
    """Raises DataError, naming shard, id and byte, unless all ids are below `vocab_size`, the vocabulary `of` what."""
    for bad, value, offset_bytes in (
        (ids.lowest < 0, ids.lowest, ids.lowest_offset_bytes),
        (ids.highest >= vocab_size, ids.highest, ids.highest_offset_bytes),
    ):
        if bad:
            raise DataError(
                f"{prefix}.bin holds token id {value} at byte {offset_bytes}, outside the {vocab_size} ids of {of}; "
                "restore the shard, or preprocess the data with the tokenizer of this model"
            )


def _scan(prefix: str, dtype: np.dtype) -> tuple[IdRange, str]:
    """Range of the ids and SHA-256 of PREFIX.bin, in one pass of bounded memory."""
    digest = hashlib.sha256()
    lowest: tuple[int, int] | None = None
    highest: tuple[int, int] | None = None
    position = 0
    with open(f"{prefix}.bin", "rb", buffering=0) as file:
        while content := file.read(_CHUNK_TOKENS * dtype.itemsize):
            digest.update(content)
            chunk = np.frombuffer(content, dtype=dtype)
            at_low, at_high = int(chunk.argmin()), int(chunk.argmax())
            low, high = (int(chunk[at_low]), position + at_low), (int(chunk[at_high]), position + at_high)
            lowest = min(lowest or low, low)
            highest = high if highest is None or high[0] > highest[0] else highest
            position += len(chunk)
    assert lowest is not None, "check_shard refuses a shard without tokens"
    assert highest is not None
    return (
        IdRange(
            lowest=lowest[0],
            lowest_offset_bytes=lowest[1] * dtype.itemsize,
            highest=highest[0],
            highest_offset_bytes=highest[1] * dtype.itemsize,
        ),
        digest.hexdigest(),
    )
