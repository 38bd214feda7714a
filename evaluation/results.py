"""Results as JSON and as tables."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from sambalm.evaluation.models.base import Identity
from sambalm.evaluation.settings import shown_tokens
from sambalm.evaluation.task import Outcome, Score
from sambalm.pretrain.packages import installed_versions
from sambalm.pretrain.reporting.durations import duration

FORMAT_VERSION = 1
RESULT, PLOT = "results.json", "plot.png"


@dataclass(frozen=True)
class Result:
    """What one task found of one model.

    Args:
        tokens: that the model read.
        seconds: that measuring took, over all attempts and of all processes together.
        folder: holds results.json, plot.png and the records of the items.
    """

    task: str
    model: Identity
    outcome: Outcome
    tokens: int
    seconds: float
    folder: Path

    @property
    def scores(self) -> Sequence[Score]:
        """The rows of the table."""
        return self.outcome.scores

    def as_record(self, protocol: dict[str, Any], digest: str) -> dict[str, Any]:
        """Returns plain values for JSON, in which a number that is not finite is null."""
        scores = [{"score": score.name, **score.at, **_numbers(score)} for score in self.scores]
        return {
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "model": asdict(self.model),
            "protocol": protocol,
            "protocol_hash": digest,
            "seed": protocol["settings"].get("seed"),
            "scores": scores,
            "details": _finite(dict(self.outcome.details)),
            "tokens": self.tokens,
            "seconds": self.seconds,
        }


def package_versions() -> dict[str, str]:
    """Returns the versions of this package and of those that scores depend on."""
    return installed_versions(("sambalm", "torch", "transformers", "tokenizers"))


def table(result: Result) -> Table:
    """Returns a result as a table for a terminal."""
    model = result.model
    where = model.path if model.step is None else f"{model.path}, step {model.step}"
    keys = list(dict.fromkeys(key for score in result.scores for key in score.at))
    shown = Table("score", *keys, title=f"{result.task}: {where}", caption=_caption(result))
    has_chance = any(score.chance is not None for score in result.scores)
    for name in ("value", "standard error", *(["chance"] if has_chance else []), "items"):
        shown.add_column(name, justify="right")
    for score in result.scores:
        at = [_shown_key(key, score.at.get(key)) for key in keys]
        chance = [_shown(score.chance)] if has_chance else []
        shown.add_row(score.name, *at, _shown(score.value), _shown(score.standard_error), *chance, f"{score.items:,}")
    return shown


def _caption(result: Result) -> str:
    return f"{result.tokens:,} tokens in {duration(result.seconds)}; {result.folder}"


def _shown_key(key: str, value: Any) -> str:
    if value is None:
        return ""
    return shown_tokens(value) if key == "length" else str(value)


def _shown(value: float | None) -> str:
    """Writes a number with four digits that tell something."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.0f}" if abs(value) >= 9_999.5 else f"{value:#.4g}".rstrip(".")


def _numbers(score: Score) -> dict[str, Any]:
    names = ("value", "standard_error", "chance", "items")
    return {name: _finite(getattr(score, name)) for name in names}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
