"""SentencePiece tokenizers: training with Llama-2's settings, and loading."""

import io
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import sentencepiece

from .documents import Document, expand_inputs, read_documents
from .errors import DataError
from .files import atomic_write, sha256_file

# SentencePiece drops longer sentences without a word, so longer lines are cut. A character is at most 4 bytes.
_LINE_CHARACTERS = 4096
_ERRORS_ONLY = 2


class Tokenizer:
    """A SentencePiece model. Text becomes ids without BOS or EOS; a literal "</s>" in it stays text."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, path: Path) -> None:
        self._processor = processor
        self.path = path
        self.sha256 = sha256_file(path)
        self.vocab_size = processor.vocab_size()
        self.bos_id = processor.bos_id()
        self.eos_id = processor.eos_id()

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a `.model` file. Raises DataError if it is missing or not a SentencePiece model."""
        path = Path(path)
        if not path.is_file():
            raise DataError(
                f"the tokenizer {path} does not exist; train one, or give the path of a SentencePiece model"
            )
        if not path.stat().st_size:  # SentencePiece takes an empty file for a model, and logs to stderr when asked
            raise DataError(f"the tokenizer {path} is not a SentencePiece model (an empty file)")
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise DataError(f"the tokenizer {path} is not a SentencePiece model ({_first_line(error)})") from error
        return cls(processor, path)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self._processor.encode(text, num_threads=1)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return self._processor.encode(texts, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; control ids such as EOS add nothing."""
        return self._processor.decode(ids)


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
    paths = expand_inputs(inputs)
    documents = _sample(paths, text_key=text_key, seed=seed, characters=sample_characters, progress=progress)
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

    def __iter__(self) -> "_Sentences":
        return self

    def __next__(self) -> str:
        try:
            return next(self._lines)
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
    paths: list[Path],
    *,
    text_key: str,
    seed: int,
    characters: int,
    progress: Callable[[int, int | None], None] | None,
) -> Iterator[Document]:
    # A character takes at least a byte, so this probability rarely reaches the bound and never by much.
    total_bytes = sum(path.stat().st_size for path in paths)
    probability = characters / max(total_bytes, 1)
    draw = random.Random(seed).random
    read_bytes = 0
    for path in paths:
        for document in read_documents(path, text_key=text_key):
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
