"""metrics.jsonl, a line a step, for whoever reads it without the packages that train.

JSON knows no infinity: what is not finite is null in the file, and nan where it is read.
"""

import json
import math
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
LOSS_AT = "validation_loss_"  # and the length in tokens: the name of a metric
SOURCE_LOSS_AT = "source_validation_loss_"  # and the length in tokens, a slash and the source's name


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The steps that a run logged, in order; without a last line that a kill cut short."""
    path = run_dir / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [_finite_or_nan(json.loads(line)) for line in lines if line.endswith("\n")]


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
