"""How likely a text is, by position: what the tasks on perplexity have in common.

A token's position is the number of tokens before it. Sums are kept at ends that double, 1, 2, 4, ... and the last one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sambalm.evaluation.models.base import LanguageModel
from sambalm.evaluation.plots import Line
from sambalm.evaluation.task import Score, standard_error

_SEGMENT_TOKENS = 1 << 16
_FEWEST_CONTEXT = 16  # tokens, from which on a plot shows positions


def ends_until(last: int) -> list[int]:
    """Returns 1, 2, 4, ... below `last`, and `last`."""
    return [*(1 << power for power in range(last.bit_length()) if 1 << power < last), last]


def measure(
    model: LanguageModel, texts: Sequence[np.ndarray], tick: Callable[[int], None], *, ends: Sequence[int]
) -> list[list[float]]:
    """Reads texts of equal length from their beginning, and adds up how unlikely their tokens were.

    Args:
        texts: int64 [tokens] each, one more token than the last end.
        ends: numbers of tokens, ascending, up to which sums are kept.

    Returns:
        of each text the sums in nats at the ends. The first token counts for nothing, since nothing is before it.
    """
    ids = torch.from_numpy(np.stack(texts))
    reader = model.new_reader(len(texts))
    sums = torch.zeros(len(texts), len(ends), dtype=torch.float64)
    before = 0
    for segment in ids.split(_SEGMENT_TOKENS, dim=1):
        nats = -reader.score(segment, progress=tick).log_likelihoods.double().cpu()
        if before == 0:
            nats[:, 0] = 0
        running = nats.cumsum(dim=1)
        for number, end in enumerate(ends):
            if end >= before:
                sums[:, number] += running[:, min(end - before, segment.shape[1] - 1)]
        before += segment.shape[1]
    return sums.tolist()


def scores_at(
    records: Sequence[Mapping[str, Any]], number: int, *, end: int, vocab_size: int, at: Mapping[str, Any]
) -> list[Score]:
    """Makes the scores of all tokens up to an end, the `number`-th of the records' sums: perplexity, bits per byte.

    The standard errors take the records for independent.
    """
    means = [record["nats"][number] / end for record in records]
    mean, error = sum(means) / len(means), standard_error(means)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    found = [
        Score(
            name="perplexity",
            at=at,
            value=perplexity,
            standard_error=None if error is None else perplexity * error,
            chance=float(vocab_size),
            items=len(records),
        )
    ]
    size = sum(record["bytes"][number] for record in records)
    if size:
        bits = 1 / (math.log(2) * size / (len(records) * end))
        found.append(
            Score(
                name="bits per byte",
                at=at,
                value=mean * bits,
                standard_error=None if error is None else error * bits,
                chance=math.log(vocab_size) * bits,
                items=len(records),
            )
        )
    return found


def by_position(records: Sequence[Mapping[str, Any]], ends: Sequence[int]) -> list[dict[str, float]]:
    """Returns of the tokens between each two ends the mean in nats: {"from", "to", "nats"}, positions inclusive."""
    sums = np.array([record["nats"] for record in records]).mean(axis=0)
    bounds = [0, *ends]
    of_each = np.diff(sums, prepend=0.0) / np.diff(bounds)
    return [
        {"from": start + 1, "to": stop, "nats": float(nats)}
        for start, stop, nats in zip(bounds[:-1], bounds[1:], of_each, strict=True)
    ]


def position_line(name: str, positions: Sequence[Mapping[str, float]]) -> Line:
    """Makes the line of a plot: the perplexity of tokens over their position, those with little context left out."""
    points = [(part["to"], math.exp(min(part["nats"], 700))) for part in positions if part["to"] >= _FEWEST_CONTEXT]
    return Line(name, points)
