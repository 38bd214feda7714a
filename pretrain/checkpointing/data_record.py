"""What a checkpoint remembers of the data that it was trained on: all that decides which sample is which."""

import math
from collections.abc import Sequence
from typing import Any

from sambalm.data_pipeline.phases import DataPart
from sambalm.data_pipeline.sources import Source
from sambalm.pretrain.config import RunConfig

NO_DATA_YET: dict[str, Any] = {}
"""The record of a checkpoint that no data has been read for, such as a converted model's."""


def data_record(config: RunConfig, sources: Sequence[Source], parts: Sequence[DataPart] = ()) -> dict[str, Any]:
    """As JSON: seed, sample length, and of each source its content's hash and its part in the blend.

    Args:
        sources: of data.train.
        parts: of data.phases; a run without phases has no need of them.
    """
    record = {
        "seed": config.run.seed,
        "sequence_length": config.data.sequence_length,
        "packing": config.data.packing,
        "sources": [source.record() for source in sources],
    }
    if config.data.phases is not None:
        record["phases"] = [
            {
                "samples": part.samples,
                "sequence_length": part.config.sequence_length,
                "sources": [source.record() for source in part.sources],
            }
            for part in parts
        ]
    return record


def data_change(saved: dict[str, Any] | None, now: dict[str, Any], *, samples: int = 0) -> str | None:
    """What differs between two records, as the beginning of a sentence; None where sample numbers mean the same.

    A prefix may change, since data may be moved. Phases that have not begun may change.

    Args:
        samples: that the run had consumed when the first record was saved.
    """
    if saved is None:
        return "it is unknown whether the data has changed"
    if saved == NO_DATA_YET:
        return None
    saved, now = ({"packing": "stream"} | record for record in (saved, now))  # of before there was another
    for key, name in {"seed": "run.seed", "packing": "data.packing"}.items():
        if saved[key] != now[key]:
            return f"{name} has changed from {saved[key]} to {now[key]}"
    before, after = _phases(saved), _phases(now)
    if len(before) > 1 and "phases" not in now and before[0]["samples"] < samples:
        return "data.phases, of which one has ended, has been removed"
    start: float = 0
    for number, phase in enumerate(before):
        if number and start >= samples:  # it had not begun
            return None
        key = f"data.phases.{number}" if "phases" in now else "data"
        if number >= len(after):
            return f"data.phases has changed from {len(before)} phases to {len(after)}"
        if change := _phase_change(phase, after[number], key=key):
            return change
        lengths = [one["samples"] or math.inf for one in (phase, after[number])]
        if lengths[0] != lengths[1] and start + min(lengths) < samples:
            tokens = [one["samples"] and one["samples"] * phase["sequence_length"] for one in (phase, after[number])]
            return f"{key}.tokens has changed from {tokens[0]} to {tokens[1]}, which the run is beyond"
        start += lengths[0]
    return None


def _phases(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the phases of a record; a run without any has one that has no end."""
    return record.get("phases") or [record | {"samples": None}]


def _phase_change(saved: dict[str, Any], now: dict[str, Any], *, key: str) -> str | None:
    """Returns what differs between two records of a phase, as `data_change` does.

    Args:
        key: of its section.
    """
    if saved["sequence_length"] != now["sequence_length"]:
        return f"{key}.sequence_length has changed from {saved['sequence_length']} to {now['sequence_length']}"
    if len(saved["sources"]) != len(now["sources"]):
        return f"{key}.train has changed from {len(saved['sources'])} sources to {len(now['sources'])}"
    totals = [sum(source["weight"] for source in record["sources"]) for record in (saved, now)]
    for before, after in zip(saved["sources"], now["sources"], strict=True):
        if before["content"] != after["content"]:
            return f"the data under {after['prefix']} has changed"
        if before["validation_fraction"] != after["validation_fraction"]:
            return (
                f"the validation_fraction of {after['prefix']} has changed from {before['validation_fraction']} to "
                f"{after['validation_fraction']}"
            )
        shares = [source["weight"] / total for source, total in zip((before, after), totals, strict=True)]
        if not math.isclose(*shares, rel_tol=1e-9):
            return f"the share of {after['prefix']} in the samples has changed from {shares[0]:.6g} to {shares[1]:.6g}"
    return None
