"""TensorBoard's event file of a run. TensorBoard's own writer has a thread that ends for good when the disk is full."""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from sambalm.pretrain.reporting.appended_file import AppendedFile

FILE_VERSION = "brain.Event:2"


class TensorBoardFile:
    """Scalars by step.

    Args:
        folder: of the run's event files; each attempt adds one.
        first_step: whatever earlier attempts logged of this step and later ones is no longer shown.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / name)
        self._append(Event(file_version=FILE_VERSION))
        self._append(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalars(self, scalars: Mapping[str, float], *, step: int) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._append(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())
