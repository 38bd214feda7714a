"""metrics.jsonl, a line a step, for whoever reads it without the packages that train.

JSON knows no infinity: what is not finite is null in the file, and nan where it is read.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
LOSS_AT = "validation_loss_"  # and the length in tokens: the name of a metric
STEP_FIELDS = {"loss", "tokens", "step_time_s", "tokens_per_second"}  # of every step
SOURCE_LOSS_AT = "source_validation_loss_"  # and the length in tokens, a slash and the source's name
NAMED_LOSS_AT = "named_validation_loss_"  # the same of data.validation
EVALUATION = (
    "evaluation/"  # and task, score and what it was measured at, with slashes: evaluation/passkey/accuracy/1024
)


def read_metrics(run_dir: Path, *, warn: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """The steps that a run logged, in order; without a last line that a kill cut short.

    Args:
        warn: called with one sentence when lines are left out because they are damaged.
    """
    return [record for _, record in records(run_dir / METRICS, warn=warn)]


def read_steps(run_dir: Path) -> list[dict[str, Any]]:
    """The steps that a run logged, in order, each with all STEP_FIELDS: a record without one is damaged."""
    return [record for record in read_metrics(run_dir) if record.keys() >= STEP_FIELDS]


def last_scores(records: Sequence[Mapping[str, Any]]) -> tuple[int, dict[str, float]]:
    """Returns the step of the last evaluation in the loop and its scores by `TASK/SCORE/...`; (0, {}) without one."""
    for record in reversed(records):
        found = {name.removeprefix(EVALUATION): v for name, v in record.items() if name.startswith(EVALUATION)}
        if found:
            return record["step"], found
    return 0, {}


def records(path: Path, *, warn: Callable[[str], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the records of a file of metrics, each with the byte at which its line ends; see `read_metrics`."""
    end, damaged = 0, 0
    try:
        with path.open("rb") as file:
            for line in file:
                end += len(line)
                record = _record(line)
                if record is not None:
                    yield end, record
                elif line.endswith(b"\n"):
                    damaged += 1
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        warn(f"{path} cannot be read: {error.strerror}")
    if damaged:
        warn(f"{path} has {damaged} damaged lines, which are left out")


def _record(line: bytes) -> dict[str, Any] | None:
    """A line's record; None for a damaged line, or one that is not whole."""
    if not line.endswith(b"\n"):
        return None
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


def plain(value: Any) -> Any:
    """What JSON can hold of a value: None for a number that is not finite, text for keys that are none."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metrics_line(record: dict[str, Any]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
