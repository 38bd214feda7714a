"""Token ids against the model's vocabulary, before a run starts: a GPU reports them as a crash without a cause."""

import hashlib
import json
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from .config import DataConfig
from .errors import DataError
from .files import atomic_write, sha256_file
from .shards import Manifest
from .sources import Shard, open_sources

_CHUNK_TOKENS = 1 << 24


class _IdRange(BaseModel):
    """Lowest and highest id of a shard and the byte offsets in .bin where they first occur."""

    lowest: int
    lowest_offset_bytes: int
    highest: int
    highest_offset_bytes: int


def check_vocabulary(config: DataConfig, vocab_size: int) -> None:
    """Check that every id of the data is below `vocab_size`, and that all prefixes have the same tokenizer.

    Manifests answer at once. A shard without one is read, once: the result is kept in the cache directory until the
    content changes. One process of a run suffices.
    Raises DataError naming the prefix or shard and both numbers.
    """
    sources = open_sources(config)
    _check_tokenizers(config, {source.prefix: source.manifest for source in sources if source.manifest})
    for source in sources:
        if source.manifest:
            tokenizer = source.manifest.tokenizer
            if tokenizer.vocab_size > vocab_size:
                raise DataError(
                    f"model.vocab_size={vocab_size} is smaller than the {tokenizer.vocab_size} ids of the tokenizer "
                    f"{Path(source.prefix).parent / tokenizer.path} that made {source.prefix}; "
                    f"set model.vocab_size to at least {tokenizer.vocab_size}"
                )
        else:
            for shard in source.shards:
                _check_shard_ids(shard, vocab_size=vocab_size, cache_dir=config.cache_path)


def _check_tokenizers(config: DataConfig, manifests: dict[str, Manifest]) -> None:
    made_by = {prefix: manifest.tokenizer.sha256 for prefix, manifest in manifests.items()}
    if config.tokenizer and Path(config.tokenizer).is_file():
        made_by = {f"data.tokenizer {config.tokenizer}": sha256_file(Path(config.tokenizer)), **made_by}
    names = list(made_by)
    for name in names[1:]:
        if made_by[name] != made_by[names[0]]:
            raise DataError(
                f"{names[0]} and {name} belong to different tokenizers, so that their ids mean different text; "
                "preprocess all data with one tokenizer"
            )


def _check_shard_ids(shard: Shard, *, vocab_size: int, cache_dir: Path) -> None:
    key = hashlib.sha256(f"{shard.prefix} {shard.content}".encode()).hexdigest()[:32]
    path = cache_dir / f"{key}.ids.json"
    if path.exists():
        ids = _IdRange.model_validate(json.loads(path.read_bytes()))
    else:
        ids = _scan(shard)
        with atomic_write(path) as file:
            file.write(ids.model_dump_json().encode())
    for bad, value, offset_bytes in (
        (ids.lowest < 0, ids.lowest, ids.lowest_offset_bytes),
        (ids.highest >= vocab_size, ids.highest, ids.highest_offset_bytes),
    ):
        if bad:
            raise DataError(
                f"{shard.prefix}.bin holds token id {value} at byte {offset_bytes}, outside model.vocab_size="
                f"{vocab_size}; raise model.vocab_size, or tokenise the data with the tokenizer of this model"
            )


def _scan(shard: Shard) -> _IdRange:
    tokens = np.memmap(f"{shard.prefix}.bin", dtype=shard.index.dtype, mode="r")
    lowest = highest = (int(tokens[0]), 0)
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = tokens[start : start + _CHUNK_TOKENS]
        at_low, at_high = int(chunk.argmin()), int(chunk.argmax())
        lowest = min(lowest, (int(chunk[at_low]), start + at_low))
        if chunk[at_high] > highest[0]:
            highest = (int(chunk[at_high]), start + at_high)
    itemsize = shard.index.dtype.itemsize
    return _IdRange(
        lowest=lowest[0],
        lowest_offset_bytes=lowest[1] * itemsize,
        highest=highest[0],
        highest_offset_bytes=highest[1] * itemsize,
    )
