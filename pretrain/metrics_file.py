"""metrics.jsonl, a line a step, for whoever reads it without the packages that train."""

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The steps that a run logged, in order; without a last line that a kill cut short."""
    path = run_dir / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
