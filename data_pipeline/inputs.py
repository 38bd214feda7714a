"""Input files, on this machine or in an object store, and their bytes: in ranges, as a stream, decompressed."""

import glob
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, Protocol

from .errors import DataError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Kind = Literal["jsonl", "text", "parquet"]
Compression = Literal["gzip", "zstandard"]

_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstandard"}
# Small, because what a few compressed bytes unfold to is held at once.
_STREAM_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file as its user names it: a path or a URL. `size_bytes` is as stored; `modified` changes with the content."""

    name: str
    size_bytes: int
    modified: str
    kind: Kind
    compression: Compression | None

    def open(self) -> BinaryIO:
        """The stored bytes. Raises OSError where the file cannot be read."""
        if not _is_url(self.name):
            return open(self.name, "rb")
        filesystem, path = _filesystem(self.name)
        return filesystem.open(path, "rb")

    def read_range(self, start: int, stop: int) -> bytes:
        """Stored bytes [start, stop), fewer where the file ends before."""
        if not _is_url(self.name):
            with open(self.name, "rb") as file:
                return os.pread(file.fileno(), stop - start, start)
        filesystem, path = _filesystem(self.name)
        return filesystem.cat_file(path, start=start, end=min(stop, self.size_bytes))

    def stream(self) -> Iterator[tuple[bytes, int]]:
        """The decompressed content in consecutive parts, each with how many stored bytes it took.

        Raises DataError for a compressed file that is damaged or ends too early.
        """
        with self.open() as file:
            if self.compression is None:
                while content := file.read(_STREAM_BYTES):
                    yield content, len(content)
            else:
                yield from self._decompress(file)

    def _decompress(self, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
        # The libraries' own readers take the end of a cut file for its end.
        decompressor, begun = self._decompressor(), False
        while stored := file.read(_STREAM_BYTES):
            taken = len(stored)
            while stored:
                if decompressor.eof:
                    if not stored.strip(b"\0"):  # padding after the last member
                        break
                    decompressor = self._decompressor()
                begun = True
                try:
                    content = decompressor.decompress(stored)
                except Exception as error:  # zlib.error, zstandard.ZstdError
                    raise DataError(f"{self.name} is damaged ({error}); fetch or compress it again") from error
                stored = decompressor.unused_data if decompressor.eof else b""
                yield content, taken
                taken = 0
        if begun and not decompressor.eof:
            raise DataError(f"{self.name} ends in the middle of its {self.compression} data; fetch it again")

    def _decompressor(self) -> "_Decompressor":
        if self.compression == "gzip":
            return zlib.decompressobj(wbits=31)
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


class _Decompressor(Protocol):
    """What the decompressors of zlib and zstandard have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def expand_inputs(patterns: Iterable[str | Path]) -> list[InputFile]:
    """Files that paths, globs (`**` included), URLs and lists name, in that order, each once.

    A glob's files are sorted by name. `@FILE` stands for the patterns in FILE, one a line, in its order; blank lines
    and lines that begin with `#` are none. URLs are those of fsspec: `s3://bucket/*.jsonl.zst`.
    Raises DataError for a pattern without a match, a directory, an extension that has no reader, or a file that cannot
    be looked at.
    """
    files: dict[str, InputFile] = {}
    for pattern in _patterns(patterns):
        found = _expand_url(pattern) if _is_url(pattern) else _expand_path(pattern)
        if not found:
            raise DataError(f"no file matches the input {pattern!r}; check the path, and quote globs in the shell")
        for file in found:
            files.setdefault(file.name, file)
    if not files:
        raise DataError("the inputs name no file; give at least one path, glob or list")
    return list(files.values())


def input_file(path: str | Path) -> InputFile:
    """The one file of a path or URL. Raises DataError as `expand_inputs` does."""
    (file,) = expand_inputs([path])
    return file


def _patterns(patterns: Iterable[str | Path]) -> Iterator[str]:
    for pattern in map(str, patterns):
        if not pattern.startswith("@") or Path(pattern).exists():
            yield pattern
            continue
        try:
            lines = Path(pattern[1:]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the list of inputs {pattern[1:]}: {error}") from error
        yield from (line.strip() for line in lines if line.strip() and not line.startswith("#"))


def _expand_path(pattern: str) -> list[InputFile]:
    paths = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
    files = []
    for path in map(Path, paths):
        if not _is_text(str(path)):
            raise DataError(f"the name of the input {os.fsencode(path)!r} is not UTF-8; rename the file")
        if path.is_dir():
            raise DataError(_directory(path, (entry.name for entry in path.iterdir())))
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        files.append(_with_format(str(path), size_bytes=status.st_size, modified=str(status.st_mtime_ns)))
    return files


def _directory(path: str | Path, names: Iterable[str]) -> str:
    """Says that an input is a directory, with a glob of text that it holds, if any."""
    endings = sorted({ending for name in names if (ending := os.path.splitext(name)[1]) in _KINDS})
    return f"the input {path} is a directory; name its files by a quoted glob: '{path}/*{(endings or ['.jsonl'])[0]}'"


def _is_text(name: str) -> bool:
    """Whether a name can be written down, as the manifest does."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_url(name: str) -> bool:
    return "://" in name


def _filesystem(url: str) -> tuple["AbstractFileSystem", str]:
    import fsspec

    return fsspec.core.url_to_fs(url)


def _expand_url(pattern: str) -> list[InputFile]:
    protocol = pattern.partition("://")[0]
    try:
        filesystem, path = _filesystem(pattern)
        found = filesystem.glob(path, detail=True) if glob.has_magic(path) else {path: filesystem.info(path)}
    except (ImportError, ValueError) as error:
        raise DataError(f"cannot open {pattern}: {error}; is the fsspec package for {protocol!r} installed?") from error
    except FileNotFoundError:
        return []
    except Exception as error:  # each store has errors of its own
        raise DataError(f"cannot list {pattern}: {error}; check the address and its credentials") from error
    files = []
    for name, information in sorted(found.items()):
        url = filesystem.unstrip_protocol(name)
        if information.get("type") == "directory":
            raise DataError(_directory(url, ()))
        if information.get("size") is None:
            raise DataError(f"the store does not say how large {url} is; copy the file here first")
        modified = next(
            (str(information[key]) for key in ("ETag", "etag", "LastModified", "mtime") if information.get(key)), ""
        )
        files.append(_with_format(url, size_bytes=int(information["size"]), modified=modified))
    return files


def _with_format(name: str, *, size_bytes: int, modified: str) -> InputFile:
    stem, extension = os.path.splitext(name)
    compression = _COMPRESSIONS.get(extension)
    if compression:
        extension = os.path.splitext(stem)[1]
    kind = _KINDS.get(extension)
    if kind is None or (kind == "parquet" and compression):
        whole = name[len(os.path.splitext(stem)[0]) :] if compression else extension
        supported = ", ".join(_KINDS)
        raise DataError(
            f"the input {name} has the extension {whole!r}; supported: {supported}, all but .parquet also with "
            f"{' or '.join(_COMPRESSIONS)}; give plain text of another name the ending .txt, and "
            "extract the text of any other file first"
        )
    return InputFile(name, size_bytes, modified, kind, compression)
