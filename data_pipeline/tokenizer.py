"""What all tokenizers do. tokenizer_formats.py reads them from files."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .files import sha256_file

if TYPE_CHECKING:
    import gigatoken


class Tokenizer(ABC):
    """Text to ids without BOS or EOS, and back.

    A special token written out in a text, such as "</s>", stays text unless the tokenizer was loaded with
    `special_tokens`. `vocab_size` is the highest id plus one; `bos_id` and `eos_id` are -1 where there is none.
    `splits_by_unicode` tells whether ids depend on what a library takes for a letter or a digit.
    """

    kind: ClassVar[str]
    splits_by_unicode: ClassVar[bool] = True
    vocab_size: int
    bos_id: int
    eos_id: int

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = sha256_file(path)

    @property
    @abstractmethod
    def literals(self) -> frozenset[str]:
        """Texts that a faster implementation might take for special tokens."""

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of the ids; control ids such as EOS add nothing."""

    @abstractmethod
    def piece(self, token_id: int) -> str:
        """How one id is written, for people to read."""

    @abstractmethod
    def id_of(self, token: str) -> int:
        """The id of a token, -1 where there is none."""

    @abstractmethod
    def fast(self) -> "gigatoken.Tokenizer":
        """The same tokenizer in gigatoken. Raises an exception of its own where it has no such thing."""

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self.encode_batch([text])[0]
