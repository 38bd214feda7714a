"""The two slots of memory that ZeRO-2's gradients and ZeRO-3's weights take in turns."""

from collections.abc import Sequence

from torch import Tensor

SLOTS = 2


def in_slots(turns: Sequence[Sequence[int]], *, like: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Allocates slots of zeros, and places in them what takes them in turns.

    Args:
        turns: the elements of the buffers that have a slot at the same time, turn by turn.
        like: says dtype and device.

    Returns:
        The slots, each [elements of the largest turn], and each turn's buffers, which lie one after the other in one.
    """
    largest = max(map(sum, turns))
    slots = [like.new_zeros(largest) for _ in range(min(SLOTS, len(turns)))]
    return slots, [list(slots[turn % SLOTS][: sum(sizes)].split(list(sizes))) for turn, sizes in enumerate(turns)]
