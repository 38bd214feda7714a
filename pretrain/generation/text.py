"""Tokens to text as they come, with the very characters that a tokenizer decodes the whole of them to.

Text that a later token may still change is held back. That is little: the bytes of an unfinished character, and of a
Hugging Face tokenizer with byte fallback a run of byte tokens, for such a decoder rejects a run as a whole.
"""

import codecs
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from sambalm.data_pipeline.tokenizer import Tokenizer
from sambalm.data_pipeline.tokenizer_formats import TiktokenTokenizer
from sambalm.model.hf.tokenization_samba import SambaTokenizer
from sambalm.model.hf.tokenizer import FolderTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextStream(Protocol):
    """The text of a growing list of tokens."""

    def push(self, token_id: int) -> str:
        """Takes a token; returns the text that it settles, which is often none."""

    def flush(self) -> str:
        """Returns the text that was held back, as if no token followed. One that does follow comes after that text."""


class BytesText:
    """The text of tokens that are bytes, put together and decoded as UTF-8, with U+FFFD for what is not."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        """Args: bytes_of: the bytes of a token, none for one that is not shown."""
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class ContextText:
    """The text of tokens whose decoder looks at their neighbours: at the start of the text, and at runs of bytes.

    A few settled tokens are decoded with the new ones and without them, and the difference is what the new ones add.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        byte_of: Callable[[int], int | None],
        is_hidden: Callable[[int], bool],
        settles: Callable[[bytes], bool],
        unfinished: str | None = None,
    ) -> None:
        """Makes the stream of a decoder.

        Args:
            decode: the text of tokens.
            byte_of: the value of a token that stands for a byte, None for others.
            is_hidden: whether the decoder leaves a token out before it does anything else.
            settles: whether the text of a run of bytes is certain, whatever comes after it.
            unfinished: how a text ends whose last character may lack bytes; None where byte_of tells.
        """
        self._decode, self._byte_of, self._is_hidden, self._settles = decode, byte_of, is_hidden, settles
        self._unfinished = unfinished
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []
        self._run = bytearray()  # the bytes at the end of what is held

    def push(self, token_id: int) -> str:
        if self._is_hidden(token_id):
            return ""
        self._held.append(token_id)
        byte = self._byte_of(token_id)
        if byte is None:
            return self._release()
        self._run.append(byte)
        return self._release() if self._settles(bytes(self._run)) else ""

    def flush(self) -> str:
        return self._release(is_end=True) if self._held else ""

    def _release(self, *, is_end: bool = False) -> str:
        whole = self._decode(self._context + self._held)
        if self._unfinished and whole.endswith(self._unfinished) and not is_end:
            return ""
        own = self._decode(self._held)
        new = whole[len(self._context_text) :]
        # Tokens that have no text by themselves, such as a first space, are no context unless there is no other; nor
        # are bytes of which more bytes would make something else.
        is_cut = is_end and bool(self._run) and bool(self._context_text)
        if own and not is_cut:
            self._context, self._context_text = self._held, own
        elif not self._context_text:
            self._context, self._context_text = self._context + self._held, whole
        self._held = []
        self._run.clear()
        return new


def is_whole_utf8(run: bytes) -> bool:
    """Whether bytes end with a character, where each that begins none is taken for one by itself."""
    place = 0
    while place < len(run):
        first = run[place]
        length = 2 if 0xC0 <= first < 0xE0 else 3 if 0xE0 <= first < 0xF0 else 4 if 0xF0 <= first < 0xF8 else 1
        if place + length > len(run):
            return False
        try:
            run[place : place + length].decode("utf-8")
        except UnicodeDecodeError:
            length = 1
        place += length
    return True


def training_text(tokenizer: Tokenizer) -> Callable[[], TextStream]:
    """Returns what makes text streams of a tokenizer that training takes, which equal its `decode`."""
    if isinstance(tokenizer, TiktokenTokenizer):
        return lambda: BytesText(tokenizer.bytes_of)
    if tokenizer.kind == "huggingface":
        return huggingface_text(tokenizers.Tokenizer.from_file(str(tokenizer.path)))
    return sentencepiece_text(tokenizer.path)


def folder_text(tokenizer: FolderTokenizer) -> Callable[[], TextStream]:
    """Returns what makes text streams of a Hugging Face folder's tokenizer."""
    if isinstance(tokenizer, SambaTokenizer):
        return sentencepiece_text(Path(tokenizer.vocab_file))
    return huggingface_text(tokenizer.backend_tokenizer)


def sentencepiece_text(model: Path) -> Callable[[], TextStream]:
    """Returns what makes text streams of a SentencePiece model. A model may have more ids than it; they are no text."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    size = processor.vocab_size()

    def byte_of(token_id: int) -> int | None:
        return int(processor.id_to_piece(token_id)[3:5], 16) if processor.is_byte(token_id) else None

    return lambda: ContextText(
        processor.decode, byte_of=byte_of, is_hidden=lambda token_id: token_id >= size, settles=is_whole_utf8
    )


def huggingface_text(tokenizer: tokenizers.Tokenizer) -> Callable[[], TextStream]:
    """Returns what makes text streams of a tokenizer.json, without its special tokens."""
    kinds = set(_decoder_kinds(json.loads(tokenizer.decoder.__getstate__()))) if tokenizer.decoder else set()
    hidden = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        return lambda: BytesText(_ByteLevel(tokenizer, hidden))

    def byte_of(token_id: int) -> int | None:
        found = _BYTE_TOKEN.fullmatch(tokenizer.id_to_token(token_id) or "") if "ByteFallback" in kinds else None
        return int(found[1], 16) if found else None

    def is_hidden(token_id: int) -> bool:
        return token_id in hidden or tokenizer.id_to_token(token_id) is None

    return lambda: ContextText(
        tokenizer.decode,
        byte_of=byte_of,
        is_hidden=is_hidden,
        settles=lambda run: False,
        unfinished="\ufffd" if "ByteLevel" in kinds else None,
    )


def _decoder_kinds(decoder: dict[str, Any]) -> list[str]:
    if decoder["type"] == "Sequence":
        return [kind for one in decoder["decoders"] for kind in _decoder_kinds(one)]
    return [decoder["type"]]


class _ByteLevel:
    """The bytes of tokens in the alphabet of GPT-2, which writes every byte as a character that can be seen."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, hidden: set[int]) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = dict.fromkeys(hidden, b"")
        seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(0x100) if byte not in seen]
        self._bytes = {chr(byte): byte for byte in seen} | {chr(0x100 + n): byte for n, byte in enumerate(others)}

    def __call__(self, token_id: int) -> bytes:
        if token_id not in self._known:
            token = self._tokenizer.id_to_token(token_id) or ""
            in_alphabet = all(character in self._bytes for character in token)
            self._known[token_id] = bytes(self._bytes[c] for c in token) if in_alphabet else token.encode()
        return self._known[token_id]


class StopStrings:
    """Ends a text before the first of some strings, also where a string comes in pieces."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Takes more text; returns what is certain to stand before every one of the strings."""
        if not self._strings:
            return text
        self._held += text
        places = [place for string in self._strings if (place := self._held.find(string)) >= 0]
        if places:
            self.found = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        kept = max(_longest_beginning(self._held, string) for string in self._strings)
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return shown

    def finish(self) -> str:
        """Returns the text that was held back, which turned out to begin none of the strings."""
        held, self._held = self._held, ""
        return held


def _longest_beginning(text: str, string: str) -> int:
    """The most characters, fewer than all, with which a string begins and the text ends."""
    lengths = range(min(len(text), len(string) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(string[:length])), 0)
