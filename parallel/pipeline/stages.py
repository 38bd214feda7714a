"""Which layers each pipeline stage holds."""

import itertools
import math
from collections.abc import Sequence


def balanced_stages(costs: Sequence[float], *, chunks: int, first: float = 0.0, last: float = 0.0) -> list[int]:
    """Cuts a row of layers into contiguous chunks so that the dearest chunk is as cheap as possible.

    Args:
        costs: of each layer.
        chunks: as many as there are layers at most; each gets one layer at least.
        first: what the first chunk costs besides its layers, for the embedding.
        last: what the last chunk costs besides its layers, for head and loss.

    Returns:
        Layers of each chunk. Ties go to the earliest cut.
    """
    count = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    # best[end]: the lowest cost of the dearest of the chunks so far when they hold the first `end` layers. No chunk is
    # empty: it would hold the model's end as well as its neighbour does.
    alone = first + (last if chunks == 1 else 0.0)
    best = [math.inf, *(total + alone for total in sums[1:])]
    starts: list[list[int]] = []
    for chunk in range(1, chunks):
        more = last if chunk == chunks - 1 else 0.0
        options = [_last_cut(sums, best, end, more=more) for end in range(count + 1)]
        best, choice = [cost for cost, _ in options], [start for _, start in options]
        starts.append(choice)
    ends = [count]
    for choice in reversed(starts):
        ends.append(choice[ends[-1]])
    bounds = [0, *reversed(ends)]
    return [end - start for start, end in itertools.pairwise(bounds)]


def _last_cut(sums: Sequence[float], best: Sequence[float], end: int, *, more: float) -> tuple[float, int]:
    """Finds where the last of some chunks starts that hold the first `end` layers.

    Args:
        sums: what the layers before each one cost.
        best: the lowest cost of the dearest chunk before, by where the last one starts.
        more: what the last chunk costs besides its layers.

    Returns:
        The lowest cost of the dearest chunk, and the earliest start that has it.
    """
    lowest, chosen = math.inf, 0
    for start in range(end - 1, -1, -1):
        own = sums[end] - sums[start] + more
        if own > lowest:  # as every earlier start is
            break
        if (dearest := max(best[start], own)) <= lowest:
            lowest, chosen = dearest, start
    return lowest, chosen
