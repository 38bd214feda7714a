"""What is printed of texts that are generated, and what ends the printing."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from sambalm.pretrain.generation.rows import Row


class Output:
    """Writes to stdout at once, as UTF-8. `closed` becomes true when nobody reads there any more."""

    def __init__(self) -> None:
        self.closed = False

    def write(self, text: str) -> None:
        """Writes text; once nobody reads, it does nothing."""
        if self.closed or not text:
            return
        try:
            sys.stdout.flush()
            stream = getattr(sys.stdout, "buffer", None)
            if stream is None:
                sys.stdout.write(text)
            else:
                stream.write(text.encode("utf-8", "replace"))
            sys.stdout.flush()
        except BrokenPipeError:
            self.closed = True
            # The interpreter flushes stdout at its end, which would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class PlainWriter:
    """Prints texts one after the other: the first that has not ended as it comes, the others when it is their turn."""

    def __init__(self, output: Output, rows: Sequence[Row]) -> None:
        self._output, self._rows = output, list(rows)
        self._waiting: dict[int, list[str]] = {id(row): [] for row in rows}
        self._titled = len(self._rows) > 1
        self._begin()

    def _begin(self) -> None:
        if self._titled and self._rows:
            row = self._rows[0]
            self._output.write(f"--- prompt {row.prompt + 1}, sample {row.sample + 1} ---\n")

    def add(self, row: Row, text: str) -> None:
        """Takes more text of a row."""
        if row is self._rows[0]:
            self._output.write(text)
        elif text:
            self._waiting[id(row)].append(text)
        while self._rows and self._rows[0].reason:
            self._output.write("\n")
            self._rows.pop(0)
            self._begin()
            if self._rows:
                waiting = self._waiting[id(self._rows[0])]
                self._output.write("".join(waiting))
                waiting.clear()


class JsonWriter:
    """Prints a line of JSON for each text when it has ended."""

    def __init__(self, output: Output, rows: Sequence[Row]) -> None:
        self._output = output
        self._texts: dict[int, list[str]] = {id(row): [] for row in rows}

    def add(self, row: Row, text: str) -> None:
        """Takes more text of a row."""
        self._texts[id(row)].append(text)
        if row.reason:
            record = {
                "prompt": row.prompt,
                "sample": row.sample,
                "text": "".join(self._texts.pop(id(row))),
                "prompt_tokens": row.prompt_tokens,
                "tokens": row.tokens,
                "reason": row.reason,
                "tokens_per_second": round(row.tokens / row.seconds, 3),
            }
            self._output.write(json.dumps(record, ensure_ascii=False) + "\n")


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields what tells whether Ctrl-C was pressed in the block; the second time it ends the process as ever."""
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        pressed.set()
        give_back()

    def give_back() -> None:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(descriptor)

    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    descriptor = signal.set_wakeup_fd(-1)  # of what would end a process that does not end at Ctrl-C
    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        give_back()
