"""Token shards in megatron-core's IndexedDataset format, written with numpy alone, and the manifest over them.

A shard is a pair of files, STEM.bin with the raw token ids and STEM.idx with where each document lies in it. A
prefix is a manifest PREFIX.json over shards PREFIX_00000, PREFIX_00001, ... or, from other tools, one bare pair.
"""

import hashlib
import json
import os
import struct
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import DataError
from .files import atomic_write, create, flush_to_disk, sha256_file, sync
from .loss_mask import MaskWriter, mask_bytes, mask_path
from .tokenizer import Tokenizer

FORMAT_VERSION = 2
# A flipped bit is found in one of these, and a shard of 2 GiB takes 4 KiB of checksums in the manifest.
CHECKSUM_BLOCK_BYTES = 1 << 22

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
LENGTHS_OFFSET_BYTES = _HEADER.size  # in .idx
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_CHUNK_DOCUMENTS = 1 << 20


class SourceRange(BaseModel):
    """Consecutive records of one input file: `records` of them from number `first` on.

    A record is a line that is not blank, a Parquet row or a whole text file. `skipped` of them have no tokens and
    `malformed` ones hold no document; the others are documents of the shard. `source` numbers Manifest.sources.
    """

    model_config = ConfigDict(extra="forbid")

    source: int
    first: int
    records: int
    skipped: int = 0
    malformed: int = 0


class ShardEntry(BaseModel):
    """One shard in a manifest. `name` is the file stem beside the manifest.

    `text_bytes` are those of its documents' texts, in UTF-8. `bin_crc32` holds 8 hexadecimal digits for every
    CHECKSUM_BLOCK_BYTES of the .bin. `sources` say where its documents come from, in their order. `mask_sha256` is None
    where every token counts in the loss.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    documents: int
    tokens: int
    text_bytes: int | None = None
    bin_bytes: int
    bin_sha256: str
    bin_crc32: str = ""
    idx_sha256: str
    mask_sha256: str | None = None
    sources: list[SourceRange] = []


class TokenizerEntry(BaseModel):
    """The tokenizer that made the shards. `path` is relative to the manifest's directory."""

    model_config = ConfigDict(extra="forbid")

    path: str
    kind: str = "sentencepiece"
    sha256: str
    vocab_size: int
    eos_id: int


def tokenizer_entry(tokenizer: Tokenizer, prefix: Path) -> TokenizerEntry:
    """What a manifest says of a tokenizer."""
    return TokenizerEntry(
        path=os.path.relpath(tokenizer.path.resolve(), prefix.parent.resolve()),
        kind=tokenizer.kind,
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )


class SourceEntry(BaseModel):
    """One input file: its path or URL, stored bytes, and its records as in SourceRange."""

    model_config = ConfigDict(extra="forbid")

    path: str
    size_bytes: int | None = None
    records: int | None = None
    skipped: int = 0
    malformed: int = 0


class Manifest(BaseModel):
    """PREFIX.json: which shards belong together and how they were made."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    tokenizer: TokenizerEntry
    shards: list[ShardEntry]
    skipped_documents: int
    malformed_documents: int = 0
    sources: list[SourceEntry]
    options: dict[str, str | int | bool | None]


@dataclass(frozen=True)
class ShardIndex:
    """What an .idx file says. `lengths` [documents] int32 counts the tokens of each document."""

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray


def token_dtype(vocab_size: int) -> type[np.integer]:
    """uint16 where ids fit with megatron-core's margin, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def narrow_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Integer ids [n] in the dtype of shards. Raises DataError for an id that is not in the vocabulary."""
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise DataError(
            f"token id {bad} is outside the vocabulary of {vocab_size}; use the tokenizer with that vocabulary"
        )
    return ids.astype(token_dtype(vocab_size), copy=False)


class _Checksums:
    """SHA-256 of all bytes and CRC-32 of each block, taken as they pass."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._blocks: list[int] = []
        self._size_bytes = 0

    def update(self, content: memoryview) -> None:
        self._sha256.update(content)
        while content:
            room = CHECKSUM_BLOCK_BYTES - self._size_bytes % CHECKSUM_BLOCK_BYTES
            if room == CHECKSUM_BLOCK_BYTES:
                self._blocks.append(0)
            self._blocks[-1] = zlib.crc32(content[:room], self._blocks[-1])
            self._size_bytes += len(content[:room])
            content = content[room:]

    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def crc32(self) -> str:
        return "".join(f"{block:08x}" for block in self._blocks)


class ShardWriter:
    """Writes one shard under temporary names until `commit`. One process at a time may write a shard.

    Memory grows by 4 bytes a document. The owner calls `finish` and `commit`, or `discard`. With `masked`, each
    document comes with which of its tokens count in the loss, bool [tokens].
    """

    def __init__(self, prefix: str | Path, vocab_size: int, *, masked: bool = False) -> None:
        self.tokens = 0
        self._prefix = str(prefix)
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._lengths = array("i")
        extensions = ("bin", "mask", "idx") if masked else ("bin", "idx")
        self._paths = {extension: Path(f"{prefix}.{extension}") for extension in extensions}
        self._checksums = _Checksums()
        self._bin = create(temporary_shard_file(self._paths["bin"]))
        self._mask = MaskWriter(create(temporary_shard_file(self._paths["mask"]))) if masked else None

    def add(self, tokens: np.ndarray | list[int], counts: np.ndarray | None = None) -> None:
        """Append one document of integer ids [tokens]. Raises DataError for no tokens and ids not in the vocabulary."""
        ids = np.asarray(tokens)
        self.add_documents(ids, np.array([ids.size]), counts)

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Append documents of `lengths` [documents] whose integer ids [sum of lengths] lie in a row.

        Raises DataError for a document without tokens and ids not in the vocabulary.
        """
        if not lengths.all():
            number = len(self._lengths) + int(np.argmin(lengths))
            raise DataError(f"document {number} of {self._prefix} has no tokens; leave it out")
        try:
            content = narrow_ids(tokens, self._vocab_size).data.cast("B")
        except DataError as error:
            bad = int(np.argmax((tokens < 0) | (tokens >= self._vocab_size)))
            number = len(self._lengths) + int(np.searchsorted(np.cumsum(lengths), bad, side="right"))
            raise DataError(f"document {number} of {self._prefix}: {error}") from None
        assert (counts is None) == (self._mask is None), "a masked shard, and no other, is told what counts"
        if self._mask and counts is not None:
            self._mask.add(counts)
        self._bin.write(content)
        self._checksums.update(content)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.tokens += tokens.size

    def finish(self) -> ShardEntry:
        """Complete the files, still under their temporary names."""
        flush_to_disk(self._bin)
        bin_bytes = self._bin.tell()
        self._bin.close()
        mask_sha256 = self._mask.finish() if self._mask else None
        idx = temporary_shard_file(self._paths["idx"])
        with create(idx) as file:
            for content in self._index_parts():
                file.write(content)
            flush_to_disk(file)
        return ShardEntry(
            name=self._paths["bin"].stem,
            documents=len(self._lengths),
            tokens=self.tokens,
            bin_bytes=bin_bytes,
            bin_sha256=self._checksums.sha256(),
            bin_crc32=self._checksums.crc32(),
            idx_sha256=sha256_file(idx),
            mask_sha256=mask_sha256,
        )

    def commit(self) -> None:
        """Move the files to their names, replacing what is there; the .idx, without which no reader starts, last."""
        for path in self._paths.values():
            os.replace(temporary_shard_file(path), path)
        sync(self._paths["bin"].parent)

    def discard(self) -> None:
        """Remove what has not been committed."""
        self._bin.close()
        if self._mask:
            self._mask.close()
        for path in self._paths.values():
            temporary_shard_file(path).unlink(missing_ok=True)

    def _index_parts(self) -> Iterator[bytes]:
        # In chunks, because pointers and document numbers of all documents at once would be 4 times the lengths.
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        yield _HEADER.pack(_MAGIC, 1, _CODES[self._dtype], len(lengths), len(lengths) + 1)
        yield lengths.tobytes()
        for pointers in _pointer_chunks(lengths, itemsize=np.dtype(self._dtype).itemsize):
            yield pointers.tobytes()
        for start in range(0, len(lengths) + 1, _CHUNK_DOCUMENTS):
            stop = min(start + _CHUNK_DOCUMENTS, len(lengths) + 1)
            yield np.arange(start, stop, dtype=np.int64).tobytes()


def temporary_shard_file(path: Path) -> Path:
    """Where a shard's file grows. Without the process in its name, so that the next attempt replaces a killed one's."""
    return path.with_name(f".{path.name}.tmp")


def _pointer_chunks(lengths: np.ndarray, *, itemsize: int) -> Iterator[np.ndarray]:
    """Byte offsets in .bin of consecutive documents, int64."""
    offset = 0
    for start in range(0, len(lengths), _CHUNK_DOCUMENTS):
        ends = offset + np.cumsum(lengths[start : start + _CHUNK_DOCUMENTS], dtype=np.int64) * itemsize
        yield np.concatenate(([offset], ends[:-1]))
        offset = int(ends[-1])


def is_masked(prefix: str | Path, entry: ShardEntry | None) -> bool:
    """Whether a shard has a mask: by its manifest's entry, and without one where the file is there."""
    return entry.mask_sha256 is not None if entry else mask_path(prefix).exists()


def check_shard(prefix: str | Path, entry: ShardEntry | None = None) -> ShardIndex:
    """Check that PREFIX.idx is well formed, that .bin and .mask have the sizes it says, and that `entry` agrees.

    Reads the whole index but no tokens. Raises DataError naming the file.
    """
    idx_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        index = _read_index(idx_path, prefix=str(prefix))
        bin_bytes = bin_path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read the shard file {error.filename}: {error.strerror}; restore it") from error
    tokens = int(index.lengths.sum(dtype=np.int64))
    expected_bytes = tokens * index.dtype.itemsize
    if bin_bytes != expected_bytes:
        raise DataError(f"{bin_path} has {bin_bytes} bytes where its index says {expected_bytes}; preprocess it again")
    if is_masked(prefix, entry):
        _check_mask_size(mask_path(prefix), tokens)
    if tokens == 0:
        raise DataError(f"{bin_path} holds no tokens; preprocess it again")
    if entry and (entry.documents, entry.tokens) != (len(index.lengths), tokens):
        raise DataError(
            f"{idx_path} has {len(index.lengths)} documents and {tokens} tokens where the manifest says "
            f"{entry.documents} and {entry.tokens}; preprocess the data again"
        )
    return index


def _check_mask_size(path: Path, tokens: int) -> None:
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read the loss mask {path}: {error.strerror}; restore it") from error
    if size_bytes != mask_bytes(tokens):
        raise DataError(
            f"{path} has {size_bytes} bytes where {tokens} tokens take {mask_bytes(tokens)}; preprocess the data again"
        )


def _read_index(path: Path, *, prefix: str) -> ShardIndex:
    def corrupt(what: str) -> DataError:
        return DataError(f"{path} is not a valid shard index ({what}); preprocess the data again")

    size_bytes = path.stat().st_size
    if size_bytes < _HEADER.size:
        raise corrupt(f"{size_bytes} bytes")
    with open(path, "rb") as file:
        magic, version, code, sequences, boundaries = _HEADER.unpack(file.read(_HEADER.size))
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise corrupt(f"header {magic!r}, version {version}, dtype code {code}")
        # Multimodal indices end with one more byte a sequence.
        expected_bytes = _HEADER.size + 12 * sequences + 8 * boundaries
        if size_bytes not in (expected_bytes, expected_bytes + sequences):
            raise corrupt(f"{size_bytes} bytes where the header asks for {expected_bytes}")
        dtype = np.dtype(_DTYPES[code])
        lengths = np.fromfile(file, dtype=np.int32, count=sequences)
        if sequences and lengths.min() < 0:
            raise corrupt("a negative length")
        for expected in _pointer_chunks(lengths, itemsize=dtype.itemsize):
            if not np.array_equal(np.fromfile(file, dtype=np.int64, count=len(expected)), expected):
                raise corrupt("pointers that do not follow from the lengths")
        bounds = np.fromfile(file, dtype=np.int64, count=boundaries)
        if not boundaries or bounds[-1] != sequences:
            raise corrupt("document boundaries that do not end at the last sequence")
    return ShardIndex(prefix=prefix, dtype=dtype, lengths=lengths)


def manifest_path(prefix: str | Path) -> Path:
    """PREFIX.json."""
    return Path(f"{prefix}.json")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of a prefix, or None where there is none. Raises DataError for a damaged or newer one."""
    path = manifest_path(prefix)
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the manifest {path} ({error}); preprocess the data again") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if version == 1:
        record, version = _from_version_1(record), FORMAT_VERSION
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format_version {version!r} and this program reads {FORMAT_VERSION}; "
            "preprocess the data again or use the program that wrote it"
        )
    try:
        return Manifest.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {where}: {first['msg']}; preprocess the data again") from error


def check_tokenizer(prefix: str | Path, tokenizer: Tokenizer) -> None:
    """Raises DataError where a tokenizer is not the one that made a prefix's tokens, as far as a manifest tells."""
    manifest = read_manifest(prefix)
    if manifest and manifest.tokenizer.sha256 != tokenizer.sha256:
        raise DataError(
            f"the tokenizer {tokenizer.path} is not the one that made the tokens of {prefix}, whose SHA-256 is "
            f"{manifest.tokenizer.sha256[:12]}... by its manifest: give that one with --tokenizer"
        )


def _from_version_1(record: dict) -> dict:
    """Version 1 knew the inputs' names only, and neither block checksums nor where a document came from."""
    sources = record.get("sources")
    if isinstance(sources, list):
        record = {**record, "sources": [{"path": path} for path in sources]}
    return {**record, "format_version": FORMAT_VERSION}


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Write PREFIX.json atomically."""
    with atomic_write(manifest_path(prefix)) as file:
        file.write(manifest.model_dump_json(indent=2).encode() + b"\n")


def shard_prefixes(prefix: str | Path) -> list[str]:
    """Path prefixes of all shards of PREFIX, in order: from its manifest, else the bare pair PREFIX.bin and .idx.

    Raises DataError where neither exists.
    """
    manifest = read_manifest(prefix)
    if manifest:
        return [str(Path(prefix).parent / shard.name) for shard in manifest.shards]
    if Path(f"{prefix}.bin").exists() and Path(f"{prefix}.idx").exists():
        return [str(prefix)]
    where = "" if Path(prefix).is_absolute() else f", seen from {Path.cwd()}"
    raise DataError(
        f"no data under the prefix {prefix}: neither {prefix}.json nor {prefix}.bin with {prefix}.idx exists{where}; "
        "give the --output of `sambalm data preprocess`, which makes such files of text"
    )
