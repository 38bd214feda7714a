"""The shards behind a DataConfig, checked, with what identifies their content and where the held-out part begins."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .config import DataConfig
from .files import sha256_file
from .shards import Manifest, ShardEntry, ShardIndex, check_shard, read_manifest, shard_prefixes


@dataclass(frozen=True)
class Shard:
    """A checked shard. `content` changes whenever its tokens do; the first `train_documents` are trained on."""

    index: ShardIndex
    content: str
    train_documents: int

    @property
    def prefix(self) -> str:
        """Path prefix of the .bin and .idx files."""
        return self.index.prefix

    def documents(self, *, held_out: bool) -> range:
        """Numbers of the documents of the held-out or of the training part."""
        documents = len(self.index.lengths)
        return range(self.train_documents, documents) if held_out else range(self.train_documents)

    def tokens(self, *, held_out: bool) -> int:
        """Tokens in the held-out or in the training part."""
        part = self.documents(held_out=held_out)
        return int(self.index.lengths[part.start : part.stop].sum(dtype=np.int64))

    def read(self, *, held_out: bool, limit_tokens: int | None = None) -> np.ndarray:
        """Tokens [n] of one part in document order, at most `limit_tokens`, as a read-only memory map."""
        tokens = np.memmap(f"{self.prefix}.bin", dtype=self.index.dtype, mode="r")
        boundary = self.tokens(held_out=False)
        part = tokens[boundary:] if held_out else tokens[:boundary]
        return part[:limit_tokens]


@dataclass(frozen=True)
class Source:
    """One prefix: its shards and, where it was preprocessed by this package, its manifest."""

    prefix: str
    manifest: Manifest | None
    shards: list[Shard]


def open_sources(config: DataConfig) -> list[Source]:
    """Check and open every shard of `config.train`. Raises DataError for missing or damaged files."""
    return [_open_source(prefix, config.validation_fraction) for prefix in config.prefixes]


def _open_source(prefix: str, validation_fraction: float) -> Source:
    manifest = read_manifest(prefix)
    prefixes = shard_prefixes(prefix)
    entries = manifest.shards if manifest else [None] * len(prefixes)
    shards = []
    for shard_prefix, entry in zip(prefixes, entries, strict=True):
        index = check_shard(shard_prefix, entry)
        documents = len(index.lengths)
        # At least one document is held out, but never the only one.
        held_out = min(documents - 1, max(1, round(validation_fraction * documents)))
        shards.append(Shard(index, _content(shard_prefix, entry), train_documents=documents - held_out))
    return Source(prefix, manifest, shards)


def _content(prefix: str, entry: ShardEntry | None) -> str:
    if entry:
        return f"{entry.idx_sha256} {entry.bin_sha256}"
    # Hashing a .bin of another tool could take an hour; its size and time change with it in practice.
    status = Path(f"{prefix}.bin").stat()
    return f"{sha256_file(Path(f'{prefix}.idx'))} {status.st_size} {status.st_mtime_ns}"
