"""A file that grows by whole records, for reports: a full or failing disk never ends the run that writes them."""

import contextlib
import os
from collections import deque
from pathlib import Path

from sambalm.pretrain.errors import print_warning

_WAITING_BYTES = 1 << 24


class AppendedFile:
    """Appends records to a file. One that cannot be written waits for the next, and nothing half-written stays.

    The first failure of a series is told once. Beyond 16 MiB the oldest records that wait are given up.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor, self._fails = path, -1, False
        self._waiting: deque[bytes] = deque()

    def append(self, record: bytes) -> None:
        """Writes a record and those that wait, as far as the disk takes them."""
        self._waiting.append(record)
        while sum(map(len, self._waiting)) > _WAITING_BYTES:
            self._waiting.popleft()
        try:
            self._write(b"".join(self._waiting))
        except OSError as error:
            if not self._fails:
                print_warning(f"{self._path} cannot be written, and the run goes on: {error.strerror}")
            self._fails = True
        else:
            self._fails = False
            self._waiting.clear()

    def close(self) -> None:
        """Closes the file; what still waits is lost."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
        self._descriptor = -1

    def _write(self, content: bytes) -> None:
        if self._descriptor < 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        before = os.fstat(self._descriptor).st_size
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, before)
            raise
