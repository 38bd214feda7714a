"""Tokenizers: what they all do, SentencePiece's, and training one of those with Llama-2's settings."""

import functools
import io
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import sentencepiece

from .documents import Document, read_documents
from .errors import DataError
from .files import atomic_write, sha256_file
from .inputs import InputFile, expand_inputs

if TYPE_CHECKING:
    import gigatoken

# SentencePiece drops longer sentences without a word, so longer lines are cut. A character is at most 4 bytes.
_LINE_CHARACTERS = 4096
_ERRORS_ONLY = 2


class Tokenizer(ABC):
    """Text to ids without BOS or EOS, and back.

    A special token written out in a text, such as "</s>", stays text unless the tokenizer was loaded with
    `special_tokens`. `vocab_size` is the highest id plus one; `bos_id` and `eos_id` are -1 where there is none.
    `literals` are the texts that a faster implementation might take for special tokens. `splits_by_unicode` tells
    whether ids depend on what a library takes for a letter or a digit.
    """

    kind: ClassVar[str]
    splits_by_unicode: ClassVar[bool] = True
    vocab_size: int
    bos_id: int
    eos_id: int
    literals: frozenset[str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = sha256_file(path)

    @classmethod
    def load(cls, path: str | Path, *, eos_token: str | None = None, special_tokens: bool = False) -> "Tokenizer":
        """Load a SentencePiece `.model`, a Hugging Face `.json` or a `.tiktoken` file.

        eos_token: the token that ends a document, where the file does not say it or another one is wanted.
        special_tokens: take special tokens written out in a text for what they name.
        Raises DataError if the file is missing or not what its extension says, or has no such token.
        """
        from .tokenizer_formats import HuggingFaceTokenizer, TiktokenTokenizer

        path = Path(path)
        if not path.is_file():
            raise DataError(
                f"the tokenizer {path} does not exist; train one, or give the path of a SentencePiece model, a Hugging "
                "Face tokenizer.json or a .tiktoken file"
            )
        formats = {".json": HuggingFaceTokenizer, ".tiktoken": TiktokenTokenizer}
        tokenizer = formats.get(path.suffix, SentencePieceTokenizer)(path, special_tokens=special_tokens)
        if eos_token is not None:
            tokenizer.eos_id = tokenizer.id_of(eos_token)
            if tokenizer.eos_id < 0:
                raise DataError(f"the tokenizer {path} has no token {eos_token!r}; name the one that ends a document")
        return tokenizer

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


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, by SentencePiece itself."""

    kind = "sentencepiece"
    splits_by_unicode = False

    def __init__(self, path: Path, *, special_tokens: bool = False) -> None:
        """Raises DataError where the file is no such model, or special tokens are to be read from texts."""
        super().__init__(path)
        if special_tokens:
            raise DataError(
                f"SentencePiece never reads special tokens out of a text, so {path} cannot; leave special_tokens off, "
                "or use a Hugging Face tokenizer.json"
            )
        content = path.read_bytes()
        if not content:  # SentencePiece takes an empty file for a model, and logs to stderr when asked
            raise DataError(f"the tokenizer {path} is not a SentencePiece model (an empty file)")
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            raise DataError(f"the tokenizer {path} is not a SentencePiece model ({_first_line(error)})") from error
        self._processor = processor
        self._content = content
        self.vocab_size = processor.vocab_size()
        self.bos_id = processor.bos_id()
        self.eos_id = processor.eos_id()

    @functools.cached_property
    def literals(self) -> frozenset[str]:
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(self._content)
        kinds = type(proto.pieces[0])
        return frozenset(piece.piece for piece in proto.pieces if piece.type not in (kinds.NORMAL, kinds.BYTE))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def piece(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    def id_of(self, token: str) -> int:
        token_id = self._processor.piece_to_id(token)
        return token_id if self._processor.id_to_piece(token_id) == token else -1

    def fast(self) -> "gigatoken.Tokenizer":
        import gigatoken

        return gigatoken.Tokenizer.from_sentencepiece(self._content)


def train_tokenizer(
    inputs: Iterable[str | Path],
    *,
    vocab_size: int,
    output: Path,
    text_key: str = "text",
    seed: int = 0,
    sample_characters: int = 50_000_000,
    progress: Callable[[int, int | None], None] | None = None,
) -> Tokenizer:
    """Train byte-pair encoding with byte fallback on lines of the documents and write the model to `output`.

    At most `sample_characters` characters are used: of larger inputs, each document is drawn with the same
    probability by `seed`. Newlines are no part of a line and are encoded as a byte piece. The same inputs and
    arguments give the same bytes. `progress` receives (bytes read, bytes of all inputs).
    Raises DataError for bad inputs, a vocabulary the text cannot fill, or an output that cannot be written.
    """
    files = expand_inputs(inputs)
    documents = _sample(files, text_key=text_key, seed=seed, characters=sample_characters, progress=progress)
    sentences = _Sentences(documents)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            character_coverage=0.99995,
            max_sentence_length=4 * _LINE_CHARACTERS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=_ERRORS_ONLY,
        )
    except (RuntimeError, ValueError, OSError) as error:
        if sentences.error:
            raise sentences.error from None
        if not sentences.begun:
            raise DataError("the inputs hold no text to train a tokenizer on; give other inputs") from None
        raise DataError(_training_failure(error, vocab_size=vocab_size)) from error
    if sentences.error:
        raise sentences.error
    with atomic_write(Path(output)) as file:
        file.write(model.getvalue())
    return Tokenizer.load(output)


class _Sentences:
    """Iterates over lines for SentencePiece, which loses the type of an exception; the first is kept in `error`."""

    def __init__(self, documents: Iterator[Document]) -> None:
        self._lines = _lines(documents)
        self.error: BaseException | None = None
        self.begun = False

    def __iter__(self) -> "_Sentences":
        return self

    def __next__(self) -> str:
        try:
            line = next(self._lines)
            self.begun = True
            return line
        except StopIteration:
            raise
        except BaseException as error:
            self.error = error
            raise StopIteration from error


def _lines(documents: Iterable[Document]) -> Iterator[str]:
    for document in documents:
        for line in document.text.split("\n"):
            for start in range(0, len(line), _LINE_CHARACTERS):
                yield line[start : start + _LINE_CHARACTERS]


def _sample(
    files: list[InputFile],
    *,
    text_key: str,
    seed: int,
    characters: int,
    progress: Callable[[int, int | None], None] | None,
) -> Iterator[Document]:
    # A character takes at least a byte, so this probability rarely reaches the bound and never by much.
    total_bytes = sum(file.size_bytes for file in files)
    probability = characters / max(total_bytes, 1)
    draw = random.Random(seed).random
    read_bytes = 0
    for file in files:
        for document in read_documents(file, text_key=text_key):
            read_bytes += document.size_bytes
            if progress:
                progress(read_bytes, total_bytes)
            if draw() < probability and len(document.text) <= characters:
                characters -= len(document.text)
                yield document


def _training_failure(error: Exception, *, vocab_size: int) -> str:
    message = str(error)
    if match := re.search(r"too high.*?<= (\d+)", message, re.DOTALL):
        return f"vocab_size={vocab_size} is too large for this text; set it to at most {match[1]}, or give more text"
    if match := re.search(r"smaller than required_chars.*?vs (\d+)", message, re.DOTALL):
        return f"vocab_size={vocab_size} is too small for the characters of this text; set it above {match[1]}"
    return f"the tokenizer could not be trained with vocab_size={vocab_size}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
