"""The text of tokenised documents."""

from collections.abc import Iterator

from .config import DataConfig
from .errors import DataError
from .sources import open_sources
from .tokenizer import Tokenizer


def stored_documents(config: DataConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """Every document of the data as text: each shard's held-out part, then its training part.

    Raises DataError where the data is missing or damaged, or a token id is not the tokenizer's.
    """
    for source in open_sources(config):
        for shard in source.shards:
            for held_out in (True, False):
                tokens = shard.read(held_out=held_out)
                start = 0
                for number in shard.documents(held_out=held_out):
                    end = start + int(shard.index.lengths[number])
                    ids = [int(token) for token in tokens[start:end]]
                    if max(ids, default=0) >= tokenizer.vocab_size:
                        raise DataError(
                            f"document {number} of {shard.prefix} holds token id {max(ids)}, beyond the "
                            f"{tokenizer.vocab_size} pieces of {tokenizer.path}: name the tokenizer of this data"
                        )
                    yield tokenizer.decode([token for token in ids if token != tokenizer.eos_id])
                    start = end
