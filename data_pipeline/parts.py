"""Splitting the input over machines: part I of N takes a run of consecutive records, the same on every machine."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .documents import ReadOptions, parquet_rows
from .errors import DataError
from .inputs import InputFile


@dataclass(frozen=True, slots=True)
class Part:
    """Part `index`, from 0, of `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """From "I/N". Raises DataError unless 0 <= I < N."""
        index, _, count = text.partition("/")
        if index.isascii() and index.isdigit() and count.isascii() and count.isdigit() and int(index) < int(count):
            return cls(int(index), int(count))
        raise DataError(f"the part {text!r} is not I/N with I from 0 to N-1, such as 0/16")

    def shard_prefix(self, prefix: Path, number: int) -> Path:
        """Path prefix of one of its shards. Sorted by name, the shards of all parts are in the order of the input."""
        if max(number, self.index) > 99_999:
            raise DataError(f"{prefix} would have more than 100,000 shards in a part; raise shard_tokens")
        part = f"_{self.index:05d}" if self.count > 1 else ""
        return prefix.with_name(f"{prefix.name}{part}_{number:05d}")

    def progress_path(self, prefix: Path) -> Path:
        """Where it keeps its progress until the manifest is written."""
        part = f".{self.index:05d}-of-{self.count:05d}" if self.count > 1 else ""
        return prefix.with_name(f"{prefix.name}{part}.progress")

    def all(self) -> list["Part"]:
        """Every part of the same split."""
        return [Part(index, self.count) for index in range(self.count)]


@dataclass(frozen=True, slots=True)
class Span:
    """Records of file number `source` from position `start` on, up to `stop`, None being the file's end."""

    source: int
    start: int
    stop: int | None


def part_spans(files: list[InputFile], options: ReadOptions, part: Part) -> Iterator[Span]:
    """The part's share of all stored bytes. Uncompressed lines and Parquet rows are split, other files are not.

    Raises DataError for a Parquet file that is split and cannot be read.
    """
    total_bytes = sum(file.size_bytes for file in files)
    low = total_bytes * part.index // part.count
    high = total_bytes * (part.index + 1) // part.count
    begin = 0
    for source, file in enumerate(files):
        end = begin + file.size_bytes
        if low <= begin and end <= high and begin < max(high, 1):
            yield Span(source, 0, None)
        elif begin < high and low < end:
            if file.kind == "parquet":
                rows = parquet_rows(file)
                ends = (max(low - begin, 0), min(high - begin, file.size_bytes))
                start, stop = (end * rows // file.size_bytes for end in ends)
                if start < stop:
                    yield Span(source, start, stop)
            elif options.has_lines(file) and not file.compression:
                yield Span(source, max(low - begin, 0), min(high - begin, file.size_bytes))
            elif low <= begin:
                yield Span(source, 0, None)
        begin = end


def spans_from(spans: Iterable[Span], source: int, position: int) -> Iterator[Span]:
    """What is left of the spans from a position of a file on."""
    for span in spans:
        if span.source > source:
            yield span
        elif span.source == source:
            yield Span(source, max(span.start, position), span.stop)
