"""The text of tokenised documents."""

from collections.abc import Iterator

from .config import DataConfig
from .errors import DataError
from .sources import open_sources
from .tokenizer import Tokenizer


def stored_documents(config: DataConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """Every document of the data as text: of each source the held-out part, then the training part.

    Raises DataError where the data is missing or damaged, or a token id is not the tokenizer's.
    """
    for source in open_sources(config):
        for held_out in (True, False):
            for number, ids in enumerate(source.stream(held_out=held_out).documents()):
                if ids.max() >= tokenizer.vocab_size:
                    raise DataError(
                        f"document {number} of the {'held-out' if held_out else 'training'} part of {source.prefix} "
                        f"holds token id {ids.max()}, beyond the {tokenizer.vocab_size} pieces of {tokenizer.path}: "
                        "name the tokenizer of this data"
                    )
                yield tokenizer.decode(ids[ids != tokenizer.eos_id].tolist())
