"""Files that survive a power loss: a rename alone may reach the disk before what it names."""

import json
import os
from pathlib import Path
from typing import Any


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON and flushes it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    flush(path)
