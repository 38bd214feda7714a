"""What a preprocessing run has committed, a line a shard, so that the next attempt goes on after the last one."""

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import DataError
from .files import sync
from .shards import FORMAT_VERSION, ShardEntry, SourceRange


class RunIdentity(BaseModel):
    """What decides the shards' bytes. Runs and parts may continue each other only where all of it is equal."""

    model_config = ConfigDict(extra="forbid")

    tokenizer_sha256: str
    options: dict[str, str | int | bool | None]
    inputs_sha256: str
    parts: int

    def differences(self, other: "RunIdentity") -> str:
        """What differs, in words."""
        mine, theirs = self.model_dump(), other.model_dump()
        names = {
            "tokenizer_sha256": "the tokenizer",
            "inputs_sha256": "the input files",
            "parts": "the number of parts",
        }
        found = [name for key, name in names.items() if mine[key] != theirs[key]]
        keys = {*self.options, *other.options}
        found += [key for key in sorted(keys) if self.options.get(key) != other.options.get(key)]
        return ", ".join(found)


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    run: RunIdentity


class Position(BaseModel):
    """Where the next shard begins: a file's number, a record's position in it and how many records were before it."""

    model_config = ConfigDict(extra="forbid")

    source: int
    position: int
    record: int


class _Commit(BaseModel):
    model_config = ConfigDict(extra="forbid")

    shard: ShardEntry
    next: Position


class _End(BaseModel):
    """The last line: records without tokens that belong to no shard, because there was none.

    `sources` name the input files where only who has read them knows.
    """

    model_config = ConfigDict(extra="forbid")

    rest: list[SourceRange]
    sources: list[str] = []


@dataclass
class Progress:
    """A log's content."""

    run: RunIdentity
    shards: list[ShardEntry]
    next: Position | None = None
    rest: list[SourceRange] | None = None
    sources: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.rest is not None


def read_progress(path: Path) -> Progress | None:
    """The content of a log, or None where there is none. A line that a crash cut off does not count.

    Raises DataError for a damaged log.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return _parse(content, path)[0]


def _parse(content: bytes, path: Path) -> tuple[Progress | None, int]:
    """The progress and how many bytes of whole lines describe it."""
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    if not lines:
        return None, 0
    try:
        progress = Progress(_Header.model_validate_json(lines[0]).run, [])
        for line in lines[1:]:
            if "rest" in json.loads(line):
                end = _End.model_validate_json(line)
                progress.rest, progress.sources = end.rest, end.sources
            else:
                commit = _Commit.model_validate_json(line)
                progress.shards.append(commit.shard)
                progress.next = commit.next
    except (ValidationError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({str(error).splitlines()[0]}); begin again with overwrite") from error
    return progress, sum(map(len, lines))


class ProgressLog:
    """The log of one run, held by one process at a time. Close it when done."""

    def __init__(self, path: Path, run: RunIdentity, *, overwrite: bool) -> None:
        """Continue the log of the same run, or begin one.

        Raises DataError where another process holds it, or it belongs to another run and is not to be overwritten.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - held until `close`
        except OSError as error:
            raise DataError(f"cannot write in {path.parent}: {error.strerror}; choose a writable directory") from error
        try:
            self._lock()
            self._file.seek(0)
            self.progress = self._continue(self._file.read(), run, overwrite=overwrite)
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process is writing what {self.path} describes; wait for it, or give another output or part"
            ) from None
        except OSError:  # some network file systems have no locks
            pass

    def _continue(self, content: bytes, run: RunIdentity, *, overwrite: bool) -> Progress:
        try:
            progress, whole_bytes = _parse(content, self.path)
        except DataError:
            if not overwrite:
                raise
            progress, whole_bytes = None, 0
        if progress and progress.run != run:
            if not overwrite:
                raise DataError(
                    f"{self.path} belongs to an unfinished run with other values of "
                    f"{progress.run.differences(run)}; repeat that one, choose another output prefix, or overwrite it"
                )
            progress = None
        if progress:
            self._file.truncate(whole_bytes)
            progress = self._sound(progress)
        else:
            self._file.truncate(0)
            progress = Progress(run, [])
            self._append(_Header(run=run))
            sync(self.path.parent)
        return progress

    def _sound(self, progress: Progress) -> Progress:
        """Go on after the last shard before one that is gone or has another size."""
        for number, shard in enumerate(progress.shards):
            path = self.path.with_name(f"{shard.name}.bin")
            if (
                path.exists()
                and path.stat().st_size == shard.bin_bytes
                and all(
                    path.with_suffix(suffix).exists() for suffix in (".idx", *([".mask"] if shard.mask_sha256 else []))
                )
            ):
                continue
            self._file.seek(0)
            kept = self._file.read().splitlines(keepends=True)[: number + 1]
            self._file.truncate(sum(map(len, kept)))
            sound, _ = _parse(b"".join(kept), self.path)
            assert sound is not None, "the header is always kept"
            return sound
        return progress

    def commit(self, shard: ShardEntry, following: Position) -> None:
        """Record a shard that is under its final name."""
        self._append(_Commit(shard=shard, next=following))
        self.progress.shards.append(shard)
        self.progress.next = following

    def finish(self, rest: list[SourceRange], sources: Sequence[str] = ()) -> None:
        """Record that nothing is left. `sources` as in `_End`."""
        self._append(_End(rest=rest, sources=list(sources)))
        self.progress.rest, self.progress.sources = rest, list(sources)

    def restart(self) -> None:
        """Forget all shards, which are to be made again."""
        # The header stays whatever happens: without it the shards would look like somebody else's.
        self._file.seek(0)
        self._file.truncate(self._file.read().index(b"\n") + 1)
        os.fsync(self._file.fileno())
        self.progress = Progress(self.progress.run, [])

    def _append(self, line: BaseModel) -> None:
        content = memoryview(line.model_dump_json().encode() + b"\n")
        while content:
            content = content[self._file.write(content) :]
        os.fsync(self._file.fileno())

    def remove_if_empty(self) -> None:
        """Leave nothing behind of a run that failed before its first shard."""
        if not self.progress.shards and not self.progress.complete:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others have it."""
        self._file.close()
