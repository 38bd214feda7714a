"""Pieces of input to token ids: fast where that is proven to make no difference, else by the reference library."""

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .chat import ASSISTANT, ChatEncoder, ChatError, ChatOptions, token_arrays
from .documents import BadRecord, Document, Piece, ReadOptions
from .errors import DataError
from .shards import narrow_ids
from .tokenizer import Tokenizer
from .tokenizer_formats import load_tokenizer

NO_DOCUMENT = -1
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class TokenBatch:
    """The records of a piece, in order.

    tokens [sum of lengths] in the shards' dtype; for each record lengths int64, with NO_DOCUMENT for a bad one,
    positions int64 as in Document, and text_bytes int64 of its UTF-8. `bad` are the bad ones. `counts`, bool [sum of
    lengths], tells which tokens count in the loss; None: all do.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    positions: np.ndarray
    text_bytes: np.ndarray
    bad: list[BadRecord]
    counts: np.ndarray | None = None


@dataclass(frozen=True)
class EncoderConfig:
    """What decides the ids of a text; `fast` is for the one who has proven that it does not.

    With `chat` documents are conversations.
    """

    tokenizer: Path
    reading: ReadOptions
    append_eos: bool = True
    eos_token: str | None = None
    special_tokens: bool = False
    fast: bool = False
    chat: ChatOptions | None = None

    def build(self) -> "Encoder":
        """Load the tokenizer. Raises DataError as `tokenizer_formats.load_tokenizer` does."""
        tokenizer = self.load_tokenizer()
        return Encoder(self, tokenizer, fast_path=FastPath(tokenizer) if self.fast else None)

    @property
    def masks(self) -> bool:
        """Whether some tokens do not count in the loss."""
        return self.chat is not None and self.chat.loss == ASSISTANT

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer alone. Raises DataError where it names no EOS that is to be appended."""
        tokenizer = load_tokenizer(self.tokenizer, eos_token=self.eos_token, special_tokens=self.special_tokens)
        if self.append_eos and tokenizer.eos_id < 0:
            raise DataError(
                f"the tokenizer {self.tokenizer} names no EOS; name the token that ends a document with --eos-token, "
                "or append none with --no-eos"
            )
        return tokenizer


class Encoder:
    """Turns texts and pieces into ids, one process's part of the work."""

    def __init__(self, config: EncoderConfig, tokenizer: Tokenizer, *, fast_path: "FastPath | None") -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._fast = fast_path
        self._chat = ChatEncoder(config.chat, tokenizer, append_eos=config.append_eos) if config.chat else None

    def encode_piece(self, piece: Piece) -> TokenBatch:
        """All records of the piece. Raises DataError for a spoilt file and for ids outside the vocabulary."""
        try:
            records = piece.records(self._config.reading)
            return self._encode_chats(records, self._chat) if self._chat else self.encode_records(records)
        except OSError as error:
            raise DataError(f"cannot read {piece.file.name}: {error.strerror or error}") from error

    def encode_records(self, records: Iterable[Document | BadRecord]) -> TokenBatch:
        """Records that somebody else has read. Raises DataError for ids outside the vocabulary."""
        lengths: list[int] = []
        positions: list[int] = []
        text_bytes: list[int] = []
        bad: list[BadRecord] = []
        parts: list[np.ndarray] = []
        texts: list[str] = []
        documents: list[int] = []
        characters = 0

        def flush() -> None:
            tokens, counts = self.encode(texts)
            parts.append(tokens)
            for number, count in zip(documents, counts, strict=True):
                lengths[number] = count
            texts.clear()
            documents.clear()

        for record in records:
            positions.append(record.position)
            lengths.append(NO_DOCUMENT)
            if isinstance(record, BadRecord):
                bad.append(record)
                text_bytes.append(0)
                continue
            documents.append(len(lengths) - 1)
            texts.append(record.text)
            text_bytes.append(_utf8_bytes(record.text))
            characters += len(record.text)
            if characters >= _BATCH_CHARACTERS:
                flush()
                characters = 0
        flush()
        return TokenBatch(
            tokens=np.concatenate(parts),
            lengths=np.array(lengths, dtype=np.int64),
            positions=np.array(positions, dtype=np.int64),
            text_bytes=np.array(text_bytes, dtype=np.int64),
            bad=bad,
        )

    def _encode_chats(self, records: Iterator[Document | BadRecord], chat: ChatEncoder) -> TokenBatch:
        documents: list[tuple[list[int], list[bool]]] = []
        lengths, positions, text_bytes, bad = [], [], [], []
        for record in records:
            found = None
            if isinstance(record, Document):
                try:
                    found = chat.encode(record.messages)
                except ChatError as error:
                    record = BadRecord(str(error), record.position, record.size_bytes)
            if isinstance(record, BadRecord):
                bad.append(record)
            if found:
                documents.append(found)
            lengths.append(len(found[0]) if found else NO_DOCUMENT)
            text_bytes.append(_utf8_bytes(record.text) if isinstance(record, Document) else 0)
            positions.append(record.position)
        tokens, counts = token_arrays(documents)
        return TokenBatch(
            tokens=narrow_ids(tokens, self._tokenizer.vocab_size),
            lengths=np.array(lengths, dtype=np.int64),
            positions=np.array(positions, dtype=np.int64),
            text_bytes=np.array(text_bytes, dtype=np.int64),
            bad=bad,
            counts=counts if self._config.masks else None,
        )

    def encode(self, texts: list[str]) -> tuple[np.ndarray, list[int]]:
        """Ids [n] of all texts in a row in the shards' dtype, with EOS after each that has any, and their numbers."""
        ids, counts = self._fast.encode(texts) if self._fast else _encode_exactly(self._tokenizer, texts)
        if self._config.append_eos:
            filled = counts > 0
            ids = np.insert(ids, np.cumsum(counts)[filled], self._tokenizer.eos_id)
            counts = counts + filled
        return narrow_ids(ids, self._tokenizer.vocab_size), counts.tolist()


class NotProven(Exception):
    """Why the fast path is not taken."""


class FastPath:
    """gigatoken, with documents that hold special tokens written out left to the tokenizer's own library."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encoder = tokenizer.fast()
        # Looked for first, because few texts hold one, and finding a single character is the fastest search there is.
        self._first_characters = sorted({literal[:1] for literal in tokenizer.literals})
        self._literals = re.compile("|".join(map(re.escape, sorted(tokenizer.literals))) or r"(?!)")

    @classmethod
    def proven(cls, tokenizer: Tokenizer, texts: list[str]) -> "FastPath":
        """One that gives the ids of the tokenizer's own library for each of `texts`. Raises NotProven otherwise."""
        try:
            fast = cls(tokenizer)
        except Exception as error:  # the formats that it does not know raise many
            raise NotProven(f"gigatoken cannot load {tokenizer.path}: {str(error).splitlines()[0]}") from error
        if not any(texts):
            raise NotProven("there was no text to prove the fast path on")
        ids, counts = fast.encode(texts)
        parts = np.split(ids, np.cumsum(counts)[:-1])
        for text, part, expected in zip(texts, parts, tokenizer.encode_batch(texts), strict=True):
            if part.tolist() != expected:
                raise NotProven(f"gigatoken gives other ids for the text that begins with {text[:40]!r}")
        return fast

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids [n] int64 or uint32 and their numbers [texts]."""
        exact = [number for number, text in enumerate(texts) if self._must_be_exact(text)]
        if exact:
            return self._mixed(texts, exact)
        return self._encode(texts)

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        # One thread whatever the caller is: worker processes are what there is several of.
        layout = self._encoder.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    def _mixed(self, texts: list[str], exact: list[int]) -> tuple[np.ndarray, np.ndarray]:
        fast = sorted(set(range(len(texts))).difference(exact))
        parts: list[np.ndarray] = [np.empty(0, dtype=np.uint32)] * len(texts)
        if fast:
            ids, counts = self._encode([texts[number] for number in fast])
            for number, part in zip(fast, np.split(ids, np.cumsum(counts)[:-1]), strict=True):
                parts[number] = part
        exact_ids = self._tokenizer.encode_batch([texts[number] for number in exact])
        for number, text_ids in zip(exact, exact_ids, strict=True):
            parts[number] = np.array(text_ids, dtype=np.uint32)
        return np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64)

    def _must_be_exact(self, text: str) -> bool:
        if any(first in text for first in self._first_characters) and self._literals.search(text) is not None:
            return True
        return self._tokenizer.splits_by_unicode and not text.isascii() and _holds_new_characters(text)


def _holds_new_characters(text: str) -> bool:
    """Whether libraries that know different versions of Unicode may take a character for a letter or not.

    All of them know what Python's version has assigned.
    """
    return bool(_unassigned_characters()[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)].any())


@functools.cache
def _unassigned_characters() -> np.ndarray:
    """bool [0x110000]; from 0x40000 on nothing but private use is or will be assigned soon."""
    table = np.zeros(0x110000, dtype=bool)
    table[[number for number in range(0x40000) if unicodedata.category(chr(number)) == "Cn"]] = True
    return table


def _encode_exactly(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    documents = tokenizer.encode_batch(texts) if texts else []
    counts = np.array([len(ids) for ids in documents], dtype=np.int64)
    parts = [np.array(ids, dtype=np.int64) for ids in documents]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts]), counts


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


# Only worker processes, which live as long as one run, may keep an encoder.
_build_in_worker = functools.cache(EncoderConfig.build)


def start_in_worker(config: EncoderConfig) -> None:
    """Load a worker's tokenizer ahead of its first piece."""
    # The process that started this one fails in the same way, and says why.
    with suppress(Exception):
        _build_in_worker(config)


def encode_in_worker(config: EncoderConfig, piece: Piece) -> TokenBatch:
    """`encode_piece` in a worker process."""
    return _build_in_worker(config).encode_piece(piece)
