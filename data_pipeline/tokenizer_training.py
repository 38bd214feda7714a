"""Training a SentencePiece tokenizer with Llama-2's settings."""

import io
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import sentencepiece

from .documents import Document, read_documents
from .errors import DataError, first_line
from .files import check_new, output_file
from .inputs import InputFile, expand_inputs
from .tokenizer import Tokenizer
from .tokenizer_formats import SentencePieceTokenizer, format_of

# SentencePiece drops longer sentences without a word, so longer lines are cut. A character is at most 4 bytes.
_LINE_CHARACTERS = 4096
_ERRORS_ONLY = 2


def train_tokenizer(
    inputs: Iterable[str | Path],
    *,
    vocab_size: int,
    output: str | Path,
    text_key: str = "text",
    overwrite: bool = False,
    seed: int = 0,
    sample_characters: int = 50_000_000,
    progress: Callable[[int, int | None], None] | None = None,
) -> Tokenizer:
    """Train byte-pair encoding with byte fallback on lines of the documents and write the model to `output`.

    At most `sample_characters` characters are used: of larger inputs, each document is drawn with the same
    probability by `seed`. Newlines are no part of a line and are encoded as a byte piece. The same inputs and
    arguments give the same bytes. `progress` receives (bytes read, bytes of all inputs).
    Raises DataError for bad inputs, a vocabulary the text cannot fill, an output that cannot be
    written or exists without `overwrite`, or one whose extension is another format's.
    """
    output = Path(output)
    check_new(output, overwrite=overwrite)
    if format_of(output) is not SentencePieceTokenizer:
        raise DataError(
            f"the output {output} is a SentencePiece model, and the extension {output.suffix} would have it read as "
            "another format; let it end in .model"
        )
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
    with output_file(output) as file:
        file.write(model.getvalue())
    return SentencePieceTokenizer(output)


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
        except Exception as error:
            self.error = error
            raise StopIteration from error
        except BaseException as error:  # Ctrl-C, after which nothing is to be trained
            self.error = error
            raise


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
    return f"the tokenizer could not be trained with vocab_size={vocab_size}: {first_line(error)}"
