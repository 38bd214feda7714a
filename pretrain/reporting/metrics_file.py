"""metrics.jsonl, a line a step, for whoever reads it without the packages that train.

JSON knows no infinity: what is not finite is null in the file, and nan where it is read.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def read_metrics(run_dir: Path, *, warn: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """The steps that a run logged, in order; without a last line that a kill cut short.

    Args:
        warn: called with one sentence when lines are left out because they are damaged.
    """
    path = run_dir / METRICS
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        warn(f"{path} cannot be read: {error.strerror}")
        return []
    whole = [line for line in lines if line.endswith(b"\n")]
    records = [record for line in whole if (record := _record(line)) is not None]
    if len(records) < len(whole):
        warn(f"{path} has {len(whole) - len(records)} damaged lines, which are left out")
    return records


def _record(line: bytes) -> dict[str, Any] | None:
    """A line's record; None for a damaged line."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    numbers = (int, float, type(None))
    if not isinstance(record, dict) or not all(isinstance(value, numbers) for value in record.values()):
        return None
    return _finite_or_nan(record) if isinstance(record.get("step"), int) else None


def _finite_or_nan(record: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in record.items()}


def metrics_line(record: dict[str, Any]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
