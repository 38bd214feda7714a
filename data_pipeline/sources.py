"""The sources of a run: their checked shards, their shares of the samples, and what identifies their content."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import DataConfig
from .errors import DataError
from .files import sha256_file
from .shard_index import IndexRequest, Shard, check_ids, indexed_shards, is_indexed
from .shards import TokenizerEntry, manifest_path, read_manifest
from .token_stream import ShardFiles, TokenStream


@dataclass(frozen=True)
class Source:
    """One prefix. `name` is short and no other source's; `tokenizer` is None where there is no manifest.

    All sources that were opened together read with the same `files`.
    """

    prefix: str
    name: str
    weight: float
    validation_fraction: float
    tokenizer: TokenizerEntry | None
    shards: list[Shard]
    files: ShardFiles = field(repr=False, compare=False)

    @property
    def masked(self) -> bool:
        """Whether some of its tokens do not count in the loss."""
        return any(shard.masked for shard in self.shards)

    def tokens(self, *, held_out: bool) -> int:
        """Tokens in the held-out or in the training part."""
        train = sum(shard.train_tokens for shard in self.shards)
        return sum(shard.tokens for shard in self.shards) - train if held_out else train

    def stream(self, *, held_out: bool) -> TokenStream:
        """The held-out or the training part, in stored order."""
        return TokenStream(self.shards, held_out=held_out, files=self.files)

    def content(self) -> str:
        """Hexadecimal SHA-256 over the tokens and the documents of all shards in order."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.content}\n".encode())
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of this source, as JSON."""
        return {
            "prefix": self.prefix,
            "weight": self.weight,
            "validation_fraction": self.validation_fraction,
            "content": self.content(),
            "tokenizer": self.tokenizer.sha256 if self.tokenizer else None,
        }


def open_sources(config: DataConfig, *, progress: Callable[[int, int | None], None] | None = None) -> list[Source]:
    """Every source of `config.train`, through its index; what the index lacks is checked first, once.

    `progress` receives (shards checked, shards) while the index of a source is made.
    Raises DataError for missing or damaged files.
    """
    names, files = _names(config.prefixes), ShardFiles()
    sources = []
    weights: Sequence[float | None] = config.weights or [None] * len(names)
    for prefix in config.prefixes:
        _check_whole(prefix)
    for request, weight in zip(_requests(config), weights, strict=True):
        prefix = request.prefix
        shards = indexed_shards(request, progress=progress)
        manifest = read_manifest(prefix)
        train_tokens = float(sum(shard.train_tokens for shard in shards))
        sources.append(
            Source(
                prefix=prefix,
                name=names[prefix],
                weight=train_tokens if weight is None else weight,
                validation_fraction=request.validation_fraction,
                tokenizer=manifest.tokenizer if manifest else None,
                shards=shards,
                files=files,
            )
        )
    return sources


def are_indexed(config: DataConfig) -> bool:
    """Returns whether `open_sources` reads no shard. Raises DataError where data are missing."""
    return all([is_indexed(request) for request in _requests(config)])


def _requests(config: DataConfig) -> list[IndexRequest]:
    fractions = zip(config.prefixes, config.validation_fractions, strict=True)
    return [IndexRequest(prefix, fraction, config.verify, config.cache_path) for prefix, fraction in fractions]


def _check_whole(prefix: str) -> None:
    """Raises DataError for a shard of several, under whose own name the others would be left out without a word."""
    whole, separator, number = prefix.rpartition("_")
    manifest = read_manifest(whole) if separator and number.isdigit() and not manifest_path(prefix).exists() else None
    if manifest and len(manifest.shards) > 1 and Path(prefix).name in {shard.name for shard in manifest.shards}:
        raise DataError(
            f"{prefix} is one of the {len(manifest.shards):,} shards of {whole}: give {whole}, or move the shard away "
            "from its manifest to read it alone"
        )


def _names(prefixes: list[str]) -> dict[str, str]:
    """The last part of each path, or all of it where two sources end alike."""
    times = Counter(Path(prefix).name for prefix in prefixes)
    return {prefix: Path(prefix).name if times[Path(prefix).name] == 1 else prefix for prefix in prefixes}


def check_vocabulary(config: DataConfig, sources: Sequence[Source], *, vocab_size: int) -> None:
    """Check that every id of the data is below `vocab_size`, and that all prefixes have the same tokenizer.

    Raises DataError naming the prefix or the shard, the byte and both numbers.
    """
    _check_tokenizers(config, {source.prefix: source.tokenizer.sha256 for source in sources if source.tokenizer})
    for source in sources:
        tokenizer = source.tokenizer
        if tokenizer and tokenizer.vocab_size > vocab_size:
            raise DataError(
                f"model.vocab_size={vocab_size} is smaller than the {tokenizer.vocab_size} ids of the tokenizer "
                f"{os.path.normpath(Path(source.prefix).parent / tokenizer.path)} that made {source.prefix}; "
                f"set model.vocab_size to at least {tokenizer.vocab_size}"
            )
        for shard in source.shards:
            if shard.ids:
                check_ids(shard.prefix, shard.ids, vocab_size=vocab_size, of="model.vocab_size")


def check_separate(sources: Sequence[Source], validation: Sequence[Source]) -> None:
    """Raises DataError where data to validate on are data that are trained on, under whatever prefix."""
    trained = {source.content(): source.prefix for source in sources}
    for source in validation:
        if source.content() in trained:
            raise DataError(
                f"data.validation {source.prefix} holds the very tokens of {trained[source.content()]} in data.train: "
                "give other data"
            )


def _check_tokenizers(config: DataConfig, made_by: dict[str, str]) -> None:
    if config.tokenizer and Path(config.tokenizer).is_file():
        made_by = {f"data.tokenizer {config.tokenizer}": sha256_file(Path(config.tokenizer)), **made_by}
    names = list(made_by)
    for name in names[1:]:
        if made_by[name] != made_by[names[0]]:
            raise DataError(
                f"{names[0]} and {name} belong to different tokenizers, so that their ids mean different text; "
                "preprocess all data with one tokenizer"
            )
