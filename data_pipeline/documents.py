"""Reading documents. Whatever is wrong with one is reported with its file and line."""

import glob
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import DataError


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it was read. `size_bytes` is what it took up in its file, for progress."""

    text: str
    path: Path
    line_number: int
    size_bytes: int


def expand_inputs(patterns: Iterable[str | Path]) -> list[Path]:
    """Files that the paths and globs name (`**` included), sorted, each once.

    Raises DataError for a pattern without a match, a directory, or a file whose extension has no reader.
    """
    paths = set()
    for pattern in map(str, patterns):
        matches = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)
        if not matches:
            raise DataError(f"no file matches the input {pattern!r}; check the path, and quote globs in the shell")
        paths.update(map(Path, matches))
    for path in paths:
        if path.is_dir():
            raise DataError(f"the input {path} is a directory; name its files, for example {path}/*.jsonl")
        _reader(path)
    return sorted(paths)


def read_documents(path: Path, *, text_key: str = "text") -> Iterator[Document]:
    """Documents of one file, in order. Blank lines are skipped.

    Raises DataError with file and line for malformed JSON, a line that is not an object, a missing or non-string
    `text_key`, text that is not valid Unicode, a file without documents, and an unknown extension.
    """
    reader = _reader(path)
    try:
        yield from reader(path, text_key)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _read_jsonl(path: Path, text_key: str) -> Iterator[Document]:
    line_number, documents = 0, 0
    with open(path, "rb") as file:
        for line_number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            documents += 1
            text = _parse_line(line, where=f"{path}:{line_number}", text_key=text_key)
            yield Document(text, path, line_number, len(line))
    if not documents:
        raise DataError(f"{path}:{line_number}: the file ends without a document; remove it from the inputs")


def _parse_line(line: bytes, *, where: str, text_key: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} of the line is not UTF-8; convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: malformed JSON ({error}); each line must hold one JSON object") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if text_key not in record:
        keys = ", ".join(list(record)[:5]) or "none"
        raise DataError(f"{where}: no key {text_key!r} (keys: {keys}); choose the key of the text")
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(f"{where}: the value of {text_key!r} is {type(text).__name__}, not a string")
    # Only an escape can bring in half of a surrogate pair, which no tokenizer accepts.
    if b"\\u" in line:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: character {error.start} of {text_key!r} is an unpaired surrogate") from None
    return text


_READERS = {".jsonl": _read_jsonl}


def _reader(path: Path):
    if path.suffix not in _READERS:
        supported = ", ".join(_READERS)
        raise DataError(f"the input {path} has the extension {path.suffix!r}; supported: {supported}")
    return _READERS[path.suffix]
