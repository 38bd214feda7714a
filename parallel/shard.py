"""Rank shares of a dimension, as even as whole units allow. Needs no torch, so that a plan can count with them.

A share is held with zero rows or columns behind it where its length would keep matrix products from the GPU's fast
kernels. They stay zero: what they multiply is zero forward and backward, and so are their gradients, to the last bit.
No canonical slice names them, so that checkpoints, exports, counts and initial weights do not know of them.
"""

from dataclasses import dataclass
from typing import Protocol

# cuBLAS takes its fast kernels where rows begin at multiples of 16 bytes: 8 elements in bf16, 16 in FP8. Products of
# wide layers are faster still where their dimensions are multiples of what a kernel takes in at a time.
ALIGNMENT = 16
LEAST_ALIGNED = 256  # below, products are short whatever they take, and zeros would be many
WIDE, WIDE_ALIGNMENT = 4096, 64


class Place(Protocol):
    """One rank's number among the ranks that share a dimension, such as `groups.TensorParallel`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class Position:
    """A place that has no process group. The first rank is the default: no rank's shares are larger."""

    size: int
    rank: int = 0


@dataclass(frozen=True)
class Shard:
    """One rank's share of a dimension: `length` from `start` on, of `size` in all, and zeros held behind it."""

    size: int
    start: int
    length: int
    padding: int = 0

    @property
    def held(self) -> int:
        """Rows or columns that the rank's parameter has of it."""
        return self.length + self.padding


def aligned(length: int) -> int:
    """Returns the length with which a share of so many is held."""
    if length < LEAST_ALIGNED:
        return length
    multiple = WIDE_ALIGNMENT if length >= WIDE else ALIGNMENT
    return -(-length // multiple) * multiple


def shard(size: int, place: Place, *, unit: int = 1) -> Shard:
    """Returns this rank's share of a dimension, as even as whole units allow: earlier ranks have one unit more.

    Shares need not be equal, since ranks only ever add up whole outputs: 11 heads on 8 ranks are 2, 2, 2, 1, ... heads.
    A width without natural units is cut into aligned shares where it must be uneven, and what remains unaligned is held
    with zeros behind it. A width made of heads is cut with unit=head_dim and never held longer; the rank's heads follow
    from its length: cutting the number of heads apart may deal them differently.

    Raises:
        ValueError: there are fewer units than ranks.
    """
    is_made_of_units = unit > 1
    if not is_made_of_units and size % place.size:
        unit = ALIGNMENT if size >= LEAST_ALIGNED * place.size else 8 if size >= 8 * place.size else 1
    units = -(-size // unit)
    if units < place.size:
        raise ValueError(
            f"a dimension of {size} in units of {unit} cannot be cut over {place.size} tensor-parallel ranks"
        )
    start, end = (_first_unit(rank, units=units, ranks=place.size) * unit for rank in (place.rank, place.rank + 1))
    length = min(end, size) - start
    return Shard(size, start, length, padding=0 if is_made_of_units else aligned(length) - length)


def equal_shard(size: int, place: Place) -> Shard:
    """Returns this rank's share of a dimension of which all ranks hold as many, the last ones with more zeros.

    Raises:
        ValueError: a rank would hold zeros alone.
    """
    held = aligned(-(-size // place.size))
    if held * (place.size - 1) >= size:
        held = -(-size // place.size)
    length = min(held, size - held * place.rank)
    if held * (place.size - 1) >= size:
        raise ValueError(f"a dimension of {size} cannot be cut over {place.size} tensor-parallel ranks")
    return Shard(size, held * place.rank, length, padding=held - length)


def _first_unit(rank: int, *, units: int, ranks: int) -> int:
    share, longer = divmod(units, ranks)
    return rank * share + min(rank, longer)
