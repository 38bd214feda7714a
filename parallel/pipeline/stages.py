"""Which layers each pipeline stage holds."""

import itertools
import math
from collections.abc import Sequence


def balanced_stages(costs: Sequence[float], *, parts: int, first: float = 0.0, last: float = 0.0) -> list[int]:
    """Cuts a row of layers into contiguous parts so that the dearest part is as cheap as possible.

    Args:
        costs: of each layer.
        parts: as many as there are layers at most; each gets one layer at least.
        first, last: what the first and the last part cost besides their layers (embedding, head and loss).

    Returns:
        Layers of each part. Ties go to the earliest cut.
    """
    count = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def cost_of(part: int, start: int, end: int) -> float:
        if start == end:  # an empty part would hold the model's end as well as its neighbour does
            return math.inf
        return sums[end] - sums[start] + (first if part == 0 else 0.0) + (last if part == parts - 1 else 0.0)

    # best[end]: the lowest cost of the dearest of the parts so far when they hold the first `end` layers.
    best = [cost_of(0, 0, end) for end in range(count + 1)]
    starts: list[list[int]] = []
    for part in range(1, parts):
        options = [
            min((max(best[start], cost_of(part, start, end)), start) for start in range(end + 1))
            for end in range(count + 1)
        ]
        best, choice = [cost for cost, _ in options], [start for _, start in options]
        starts.append(choice)
    ends = [count]
    for choice in reversed(starts):
        ends.append(choice[ends[-1]])
    bounds = [0, *reversed(ends)]
    return [end - start for start, end in itertools.pairwise(bounds)]
