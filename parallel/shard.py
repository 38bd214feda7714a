"""Rank shares of a dimension, as even as whole units allow. Needs no torch, so that a plan can count with them."""

from dataclasses import dataclass
from typing import Protocol


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
    """One rank's share of a dimension: `length` from `start` on, of `size` in all."""

    size: int
    start: int
    length: int


def shard(size: int, place: Place, *, unit: int = 1) -> Shard:
    """Returns this rank's share of a dimension, as even as whole units allow: earlier ranks have one unit more.

    Shares need not be equal, since ranks only ever add up whole outputs: 11 heads on 8 ranks are 2, 2, 2, 1, ... heads,
    and no padding exists that could learn or leak. A width without natural units is cut into multiples of 8 where it
    must be uneven, which matrix products on GPUs want. A width made of heads is cut with unit=head_dim, and the rank's
    heads follow from its length: cutting the number of heads apart may deal them differently.

    Raises:
        ValueError: there are fewer units than ranks.
    """
    if unit == 1 and size % place.size and size >= 8 * place.size:
        unit = 8
    units = -(-size // unit)
    if units < place.size:
        raise ValueError(
            f"a dimension of {size} in units of {unit} cannot be cut over {place.size} tensor-parallel ranks"
        )
    start, end = (_first_unit(rank, units=units, ranks=place.size) * unit for rank in (place.rank, place.rank + 1))
    return Shard(size, start, min(end, size) - start)


def equal_shard(size: int, place: Place) -> Shard:
    """Returns this rank's share of a dimension that must be cut equally. Raises ValueError where it cannot be."""
    if size % place.size:
        raise ValueError(f"a dimension of {size} cannot be cut equally over {place.size} tensor-parallel ranks")
    return shard(size, place)


def _first_unit(rank: int, *, units: int, ranks: int) -> int:
    share, longer = divmod(units, ranks)
    return rank * share + min(rank, longer)
