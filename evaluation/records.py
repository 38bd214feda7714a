"""The records of items that are done: a line of JSON each, appended, so that a killed evaluation goes on."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.ranks import Ranks

FILE_NAME = "items.jsonl"


class Records:
    """The records of one protocol, by the ids of their items. Another process waits for none: it is refused.

    Args:
        ranks: those that measure together. All know every record, and the main one alone reads and writes the file.
    """

    def __init__(self, folder: Path, *, ranks: Ranks) -> None:
        self.path, self._ranks = folder / FILE_NAME, ranks
        self.known: dict[str, dict[str, Any]] = {}
        self._descriptor = -1

    @contextmanager
    def opened(self) -> Iterator["Records"]:
        """Reads what is there, and lets `add` append to it. Collective.

        Raises:
            EvaluationError: the folder cannot be written, or another process writes there.
        """
        try:
            self.known = self._ranks.of_main(self._open)
            yield self
        finally:
            if self._descriptor >= 0:
                os.close(self._descriptor)

    def add(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Appends the records of some items, the same on every rank. Collective.

        Raises:
            EvaluationError: the disk does not take them.
        """
        self._ranks.of_main(lambda: self._append(records))
        self.known |= {item: dict(record) for item, record in records.items()}

    def of(self, items: Sequence[str]) -> list[dict[str, Any]]:
        """Returns the records of items, in that order."""
        return [self.known[item] for item in items]

    def _open(self) -> dict[str, dict[str, Any]]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._lock()
            return self._read()
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _append(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps({"item": item, **record}) + "\n" for item, record in records.items()).encode()
        try:
            while lines:
                lines = lines[os.write(self._descriptor, lines) :]
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EvaluationError(
                f"another process evaluates into {self.path.parent}; wait for it or give another --output"
            ) from None

    def _read(self) -> dict[str, dict[str, Any]]:
        """Takes the lines that are whole, and cuts off what a kill left of the last one."""
        whole, known = 0, {}
        for line in self.path.read_bytes().splitlines(keepends=True):
            record = _record(line)
            if record is None:
                break
            known[record.pop("item")] = record
            whole += len(line)
        os.ftruncate(self._descriptor, whole)
        return known


def unwritable(path: Path, error: OSError) -> EvaluationError:
    """Makes the error of a file that cannot be written."""
    return EvaluationError(f"{path} cannot be written ({error.strerror}); make room or give another --output")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("item"), str) else None
