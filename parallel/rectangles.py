"""Rectangles of a tensor that together are a range of the flattened tensor, as ZeRO shares tensors out."""

import math
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of a tensor whose elements lie one after the other in the flattened tensor.

    Attributes:
        offsets: where it begins, along every dimension.
        sizes: its shape.
        start: where it begins in the flattened tensor.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    def within(self, row: int, *, row_elements: int) -> Self:
        """Returns this rectangle of a row as one of the tensor that has the row."""
        return type(self)((row, *self.offsets), (1, *self.sizes), row * row_elements + self.start)


def rectangles(shape: tuple[int, ...], *, start: int, stop: int) -> list[Rectangle]:
    """Returns the rectangles that make up elements `start` to `stop` of a flattened tensor, in their order.

    Of a matrix there are three at most: the end of a row, whole rows, and the beginning of a row. Each further
    dimension that is longer than one may add two.
    """
    if start >= stop:
        return []
    if len(shape) == 1:
        return [Rectangle((start,), (stop - start,), start)]
    row_elements = math.prod(shape[1:])
    first, last = -(-start // row_elements), stop // row_elements  # the whole rows are those from first to before last
    if first > last:  # within one row
        return _of_row(shape, last, start=start, stop=stop)
    found = _of_row(shape, first - 1, start=start, stop=first * row_elements)
    if first < last:
        offsets, sizes = (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
        found.append(Rectangle(offsets, sizes, first * row_elements))
    return found + _of_row(shape, last, start=last * row_elements, stop=stop)


def _of_row(shape: tuple[int, ...], row: int, *, start: int, stop: int) -> list[Rectangle]:
    """Returns those of elements `start` to `stop`, which are all in one row."""
    row_elements = math.prod(shape[1:])
    before = row * row_elements
    inner = rectangles(shape[1:], start=start - before, stop=stop - before)
    return [rectangle.within(row, row_elements=row_elements) for rectangle in inner]
