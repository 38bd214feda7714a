"""What a checkpoint remembers of the data that it was trained on: all that decides which sample is which."""

import math
from collections.abc import Sequence
from typing import Any

from sambalm.data_pipeline.sources import Source
from sambalm.pretrain.config import RunConfig

NO_DATA_YET: dict[str, Any] = {}
"""The record of a checkpoint that no data has been read for, such as a converted model's."""


def data_record(config: RunConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """As JSON: seed, sample length, and of each source its content's hash and its part in the blend."""
    return {
        "seed": config.run.seed,
        "sequence_length": config.data.sequence_length,
        "packing": config.data.packing,
        "sources": [source.record() for source in sources],
    }


def data_change(saved: dict[str, Any] | None, now: dict[str, Any]) -> str | None:
    """What differs between two records, as the beginning of a sentence; None where sample numbers mean the same.

    A prefix may change, since data may be moved.
    """
    if saved is None:
        return "it is unknown whether the data has changed"
    if saved == NO_DATA_YET:
        return None
    saved, now = ({"packing": "stream"} | record for record in (saved, now))  # of before there was another
    keys = {"seed": "run.seed", "sequence_length": "data.sequence_length", "packing": "data.packing"}
    for key, name in keys.items():
        if saved[key] != now[key]:
            return f"{name} has changed from {saved[key]} to {now[key]}"
    if len(saved["sources"]) != len(now["sources"]):
        return f"data.train has changed from {len(saved['sources'])} sources to {len(now['sources'])}"
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
