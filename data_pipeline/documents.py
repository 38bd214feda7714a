"""Documents out of input files, in pieces that any process can read. What is wrong with one is named with its place."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import orjson

from .errors import DataError, first_line
from .inputs import InputFile, input_file

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

PIECE_BYTES = 1 << 22
_MARK = b"\xef\xbb\xbf"  # that some programs begin a file of UTF-8 with
_JSON_WORDS = {
    **{"NoneType": "null", "bool": "a boolean", "int": "a number", "float": "a number"},
    **{"list": "a list", "dict": "an object", "str": "a string"},
}
_MAX_TEXT_FILE_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `position` is the offset of its record in the decompressed file in bytes, or its row in Parquet.

    `size_bytes` is what the record takes up there. `messages` is what its JSON has in place of a text, unchecked.
    """

    text: str
    position: int
    size_bytes: int
    messages: Any = None


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that holds no document, and why: a line that is not JSON, a row without text, ..."""

    reason: str
    position: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How files become documents: the key or column of the text, and whether a .txt file is one or one a line.

    With a `messages_key` the lines of JSON hold conversations, and there is no other text.
    """

    text_key: str = "text"
    text_documents: Literal["file", "line"] = "file"
    messages_key: str | None = None

    def has_lines(self, file: InputFile) -> bool:
        """Whether the file's records are lines."""
        return file.kind == "jsonl" or (file.kind == "text" and self.text_documents == "line")


class Piece(Protocol):
    """A part of a file. `size_bytes` are stored ones, for progress."""

    @property
    def file(self) -> InputFile: ...

    @property
    def size_bytes(self) -> int: ...

    def records(self, options: ReadOptions) -> Iterator[Document | BadRecord]:
        """Its records in order; blank lines are none. Raises DataError and OSError for what spoils the file."""


@dataclass(frozen=True, slots=True)
class LineRange:
    """Lines that begin in the bytes [start, stop) of an uncompressed file; whoever takes the piece reads them."""

    file: InputFile
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        return self.stop - self.start

    def records(self, options: ReadOptions) -> Iterator[Document | BadRecord]:
        # One byte more in front tells whether a line begins at `start`.
        before = max(self.start - 1, 0)
        content = self.file.read_range(before, self.stop)
        skipped = content.find(b"\n") + 1 if self.start else 0
        if self.start and not skipped:
            return  # one line covers the whole range, and belongs to the range that it begins in
        if not content.endswith(b"\n"):
            content += self._rest_of_line()
        yield from _lines(content[skipped:], before + skipped, self.file, options)

    def _rest_of_line(self) -> bytes:
        parts, offset = [], self.stop
        while offset < self.file.size_bytes:
            part = self.file.read_range(offset, offset + PIECE_BYTES)
            if not part:
                break
            end = part.find(b"\n")
            if end >= 0:
                parts.append(part[: end + 1])
                break
            parts.append(part)
            offset += len(part)
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class LineBlock:
    """Whole lines that were read already, because their file can only be read from its beginning."""

    file: InputFile
    position: int
    content: bytes
    size_bytes: int

    def records(self, options: ReadOptions) -> Iterator[Document | BadRecord]:
        yield from _lines(self.content, self.position, self.file, options)


@dataclass(frozen=True, slots=True)
class TextFile:
    """A .txt file that is one document."""

    file: InputFile

    @property
    def size_bytes(self) -> int:
        return self.file.size_bytes

    def records(self, options: ReadOptions) -> Iterator[Document | BadRecord]:
        parts, size_bytes = [], 0
        for part, _ in self.file.stream():
            parts.append(part)
            size_bytes += len(part)
            if size_bytes > _MAX_TEXT_FILE_BYTES:
                raise DataError(
                    f"{self.file.name} would be one document of more than {_MAX_TEXT_FILE_BYTES >> 20} MiB; "
                    "take each line for a document (--text-documents line), or split the file"
                )
        yield _decode(b"".join(parts).removeprefix(_MARK), position=0, size_bytes=size_bytes)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [start, stop) of a Parquet file, which lie in the row groups [first_group, stop_group)."""

    file: InputFile
    first_group: int
    stop_group: int
    first_group_row: int
    start: int
    stop: int
    size_bytes: int

    def records(self, options: ReadOptions) -> Iterator[Document | BadRecord]:
        import pyarrow

        with _parquet(self.file) as parquet:
            batches = parquet.iter_batches(
                batch_size=1024,
                row_groups=list(range(self.first_group, self.stop_group)),
                columns=[options.text_key],
                use_threads=False,
            )
            row = self.first_group_row
            for batch in batches:
                if row >= self.stop:
                    return
                column = batch.column(0)
                if pyarrow.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                for content in column.cast(pyarrow.large_binary()).to_pylist():
                    if self.start <= row < self.stop:
                        if content is None:
                            yield BadRecord(f"the value of {options.text_key!r} is null", row, 0)
                        else:
                            yield _decode(content, position=row, size_bytes=len(content))
                    row += 1


def pieces(
    file: InputFile, options: ReadOptions, *, start: int = 0, stop: int | None = None, piece_bytes: int = PIECE_BYTES
) -> Iterator[Piece]:
    """The file's records from position `start` (up to `stop` where they are lines or rows) in pieces, in order.

    Raises DataError for a damaged file and a Parquet file without the column.
    """
    try:
        if file.kind == "parquet":
            yield from _row_pieces(file, options, start=start, stop=stop, piece_bytes=piece_bytes)
        elif not options.has_lines(file):
            if start == 0:
                yield TextFile(file)
        elif file.compression:
            yield from _line_blocks(file, start=start, piece_bytes=piece_bytes)
        else:
            stop = file.size_bytes if stop is None else stop
            for first in range(start, stop, piece_bytes):
                yield LineRange(file, first, min(first + piece_bytes, stop))
    except OSError as error:
        raise DataError(f"cannot read {file.name}: {error.strerror or error}") from error


def read_documents(file: InputFile | str | Path, *, text_key: str = "text") -> Iterator[Document]:
    """Documents of one file, in order. Blank lines are skipped.

    Raises DataError with file and line for malformed JSON, a line that is not an object, a missing or non-string
    `text_key`, text that is not valid Unicode, and an unknown extension.
    """
    file = file if isinstance(file, InputFile) else input_file(file)
    options = ReadOptions(text_key)
    for piece in pieces(file, options):
        try:
            for record in piece.records(options):
                if isinstance(record, BadRecord):
                    raise DataError(f"{place(file, record.position)}: {record.reason}")
                yield record
        except OSError as error:
            raise DataError(f"cannot read {file.name}: {error.strerror or error}") from error


def place(file: InputFile, position: int) -> str:
    """FILE:LINE of a record, for messages; reads the file up to there."""
    if file.kind == "parquet":
        return f"{file.name}: row {position}"
    lines = 1
    for content, _ in file.stream():
        lines += content[:position].count(b"\n")
        position -= len(content)
        if position <= 0:
            break
    return f"{file.name}:{lines}"


def parquet_rows(file: InputFile) -> int:
    """Number of rows of a Parquet file. Raises DataError where it is not one."""
    with _parquet(file) as parquet:
        return parquet.metadata.num_rows


def _lines(content: bytes, position: int, file: InputFile, options: ReadOptions) -> Iterator[Document | BadRecord]:
    text_key = options.text_key
    # The mark goes with the first line, so that records begin where they did without it.
    marked = position == 0 and content.startswith(_MARK)
    for line in content.removeprefix(_MARK if marked else b"").split(b"\n"):
        size_bytes = len(line) + 1 + (len(_MARK) if marked else 0)
        marked = False
        if not line or line.isspace():
            position += size_bytes
            continue
        if options.messages_key is not None:
            yield _conversation(line, options.messages_key, position=position)
        elif file.kind == "text":
            yield _decode(line.removesuffix(b"\r"), position=position, size_bytes=size_bytes)
        else:
            try:
                text = orjson.loads(line)[text_key]
            except (orjson.JSONDecodeError, TypeError, KeyError):
                text = None
            if type(text) is str:
                yield Document(text, position, size_bytes)
            else:
                yield _parse_carefully(line, text_key, position=position)
        position += size_bytes


def _conversation(line: bytes, messages_key: str, *, position: int) -> Document | BadRecord:
    value = _value(line, messages_key, what="messages")
    if isinstance(value, _NoValue):
        return BadRecord(value.reason, position, len(line) + 1)
    contents = [one.get("content") for one in value if isinstance(one, dict)] if isinstance(value, list) else []
    text = "".join(content for content in contents if isinstance(content, str))
    return Document(text, position, len(line) + 1, messages=value)


@dataclass(frozen=True, slots=True)
class _NoValue:
    reason: str


def _value(line: bytes, key: str, *, what: str) -> Any:
    """What a line of JSON has under a key, or why it has nothing there."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _NoValue(f"byte {error.start} of the line is not UTF-8; convert the file to UTF-8")
    except (ValueError, RecursionError) as error:
        return _NoValue(f"malformed JSON ({error}); each line must hold one JSON object")
    if not isinstance(record, dict):
        return _NoValue(f"expected a JSON object, found {_word(record)}")
    if key not in record:
        keys = ", ".join(list(record)[:5]) or "none"
        option = "--text-key" if what == "text" else "--messages-key"
        hint = ", or give a --chat-template for messages" if what == "text" and "messages" in record else ""
        return _NoValue(f"no key {key!r} (keys: {keys}); choose the key of the {what} with {option}{hint}")
    return record[key]


def _parse_carefully(line: bytes, text_key: str, *, position: int) -> Document | BadRecord:
    """What orjson refused or was not what it should be: numbers such as NaN may still be fine."""

    def bad(reason: str) -> BadRecord:
        return BadRecord(reason, position, len(line) + 1)

    text = _value(line, text_key, what="text")
    if isinstance(text, _NoValue):
        return bad(text.reason)
    if not isinstance(text, str):
        return bad(f"the value of {text_key!r} is {_word(text)}, not a string")
    # Only an escape can bring in half of a surrogate pair, which no tokenizer accepts.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return bad(f"character {error.start} of {text_key!r} is an unpaired surrogate")
    return Document(text, position, len(line) + 1)


def _word(value: Any) -> str:
    """What JSON calls the type of a value."""
    name = type(value).__name__
    return _JSON_WORDS.get(name, name)


def _decode(content: bytes, *, position: int, size_bytes: int) -> Document | BadRecord:
    try:
        return Document(content.decode("utf-8"), position, size_bytes)
    except UnicodeDecodeError as error:
        return BadRecord(
            f"byte {error.start} is not UTF-8; convert the file to plain text in UTF-8", position, size_bytes
        )


def _line_blocks(file: InputFile, *, start: int, piece_bytes: int) -> Iterator[LineBlock]:
    parts, held_bytes, stored_bytes, offset = [], 0, 0, 0
    for content, taken in file.stream():
        stored_bytes += taken
        if offset < start:
            dropped = min(start - offset, len(content))
            offset += dropped
            content = content[dropped:]
        parts.append(content)
        held_bytes += len(content)
        if held_bytes < piece_bytes or b"\n" not in content:
            continue
        block = b"".join(parts)
        end = block.rfind(b"\n") + 1
        yield LineBlock(file, offset, block[:end], stored_bytes)
        parts, held_bytes, stored_bytes, offset = [block[end:]], len(block) - end, 0, offset + end
    if held_bytes or stored_bytes:
        yield LineBlock(file, offset, b"".join(parts), stored_bytes)


def _row_pieces(
    file: InputFile, options: ReadOptions, *, start: int, stop: int | None, piece_bytes: int
) -> Iterator[Rows]:
    with _parquet(file) as parquet:
        _check_column(file, parquet, options.text_key)
        metadata = parquet.metadata
        stop = metadata.num_rows if stop is None else stop
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        leaves = [parquet.schema.column(number).path for number in range(len(parquet.schema))]
        column = leaves.index(options.text_key)
    first, first_row, row, held_bytes = 0, 0, 0, 0
    for number, group in enumerate(groups):
        row += group.num_rows
        held_bytes += group.column(column).total_uncompressed_size
        if held_bytes >= piece_bytes or number + 1 == len(groups):
            low, high = max(first_row, start), min(row, stop)
            if low < high:
                stored_bytes = file.size_bytes * (high - low) // max(metadata.num_rows, 1)
                yield Rows(file, first, number + 1, first_row, low, high, stored_bytes)
            first, first_row, held_bytes = number + 1, row, 0


def _check_column(file: InputFile, parquet: "ParquetFile", text_key: str) -> None:
    import pyarrow.types as types

    schema = parquet.schema_arrow
    if text_key not in schema.names:
        raise DataError(
            f"{file.name}: no column {text_key!r} (columns: {', '.join(schema.names)}); choose the column of "
            "the text with --text-key"
        )
    kind = schema.field(text_key).type
    stored = kind.value_type if types.is_dictionary(kind) else kind
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    binaries = (types.is_binary, types.is_large_binary, types.is_binary_view)  # of writers that name no encoding
    if not any(check(stored) for check in (*texts, *binaries)):
        raise DataError(
            f"{file.name}: the column {text_key!r} holds {kind}, not strings; choose the column of the text with "
            "--text-key"
        )


@contextmanager
def _parquet(file: InputFile) -> Iterator["ParquetFile"]:
    import pyarrow
    from pyarrow import parquet

    try:
        # A buffer makes a row group's pages be read one after the other instead of all at once.
        with file.open() as stored, parquet.ParquetFile(stored, buffer_size=1 << 20, pre_buffer=False) as opened:
            yield opened
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's; Arrow's of damaged pages has none
            raise
        raise DataError(f"{file.name} is not a sound Parquet file ({first_line(error)}); fetch it again") from error
