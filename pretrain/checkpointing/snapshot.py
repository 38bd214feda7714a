"""A copy in host memory of what a rank holds of a run's state, as rectangles of the canonical tensors.

Nothing is gathered: ranks that hold the same weights each step a share of them under ZeRO, and save what they step.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sambalm.parallel.rectangles import Rectangle, rectangles
from sambalm.parallel.sharding import canonical_slices
from sambalm.parallel.zero.engine import held_range, held_tensors
from sambalm.parallel.zero.parameter_info import CanonicalSlice, info_of

FP32_BYTES = 4


@dataclass(frozen=True)
class SavedSlice:
    """A rectangle of a canonical tensor.

    Attributes:
        name: of the canonical tensor, with its kind before it: `model.NAME`, `exp_avg.NAME` or `exp_avg_sq.NAME`.
        offsets: where the rectangle begins in the canonical tensor.
        tensor: fp32, of the rectangle's shape, on the host; it need not be contiguous.
    """

    name: str
    offsets: tuple[int, ...]
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


def all_slices(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter, CanonicalSlice]]:
    """Yields canonical name, parameter and slice, for every slice that model chunks hold."""
    return itertools.chain.from_iterable(canonical_slices(chunk) for chunk in chunks)


class Snapshot:
    """Host memory for what this rank saves, which every save uses again.

    On a GPU the memory is page-locked, so that the device writes it at the speed of its link.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._is_locked = False

    def reserve(self, chunks: Sequence[nn.Module]) -> None:
        """Takes the memory and touches all of it, so that no later copy waits for the system to hand it out.

        Raises:
            RuntimeError: there is not enough memory.
        """
        elements = sum(tensor.numel() for _, tensor in _held(chunks))
        if elements == self._memory.numel():
            return
        self.release()
        self._memory = torch.zeros(elements)
        if elements and any(parameter.is_cuda for chunk in chunks for parameter in chunk.parameters()):
            # torch's own pinned memory is rounded up to a power of two.
            found = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), elements * FP32_BYTES, 0)
            self._is_locked = int(found) == 0

    def release(self) -> None:
        """Gives the memory back, which nothing may read any more."""
        if self._is_locked:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._is_locked = torch.empty(0), False

    def take(self, chunks: Sequence[nn.Module]) -> list[SavedSlice]:
        """Copies what this rank saves, and waits for the copy. The slices lie in this memory until the next call."""
        self.reserve(chunks)
        start, copies = 0, dict[nn.Parameter, list[Tensor]]()
        for parameter, tensor in _held(chunks):
            copy = self._memory[start : start + tensor.numel()]
            copy.copy_(tensor, non_blocking=self._is_locked)
            copies.setdefault(parameter, []).append(copy)
            start += tensor.numel()
        if self._is_locked:
            torch.cuda.current_stream().synchronize()
        return list(_slices(chunks, copies))


def _held(chunks: Sequence[nn.Module]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yields what this rank saves of each parameter: the weight and its moments, [elements]."""
    for parameter in dict.fromkeys(parameter for chunk in chunks for parameter in chunk.parameters()):
        if info_of(parameter).owned:
            yield from ((parameter, tensor) for tensor in held_tensors(parameter).values())


def held_slices(
    parameter: nn.Parameter, piece: CanonicalSlice
) -> Iterator[tuple[tuple[int, ...], Callable[[Tensor], Tensor]]]:
    """Yields the rectangles of a canonical tensor that this rank steps of a parameter's slice.

    Returns:
        Where the rectangle begins in the canonical tensor, and what makes a view of it, in its shape, of one of
        `held_tensors` or a copy.
    """
    first, elements = held_range(parameter)
    for rectangle in rectangles(tuple(parameter.shape), start=first, stop=first + elements):
        common = piece.intersection(rectangle.offsets, rectangle.sizes)
        if common:
            offsets, at, length = common
            yield offsets, partial(_view, rectangle, first=first, narrowed=(piece.dim, at, length))


def _view(rectangle: Rectangle, held: Tensor, *, first: int, narrowed: tuple[int, int, int]) -> Tensor:
    begin = rectangle.start - first
    return held[begin : begin + rectangle.elements].view(rectangle.sizes).narrow(*narrowed)


def _slices(chunks: Sequence[nn.Module], copies: dict[nn.Parameter, list[Tensor]]) -> Iterator[SavedSlice]:
    """Yields the rectangles of canonical tensors in copies of `_held`; zeros that align a parameter are left out."""
    for name, parameter, piece in all_slices(chunks):
        if parameter in copies:
            kinds = list(held_tensors(parameter))
            for offsets, part in held_slices(parameter, piece):
                for kind, copy in zip(kinds, copies[parameter], strict=True):
                    yield SavedSlice(f"{kind}.{name}", offsets, part(copy))


def fp8_scales(chunks: Sequence[nn.Module]) -> dict[str, list[float]]:
    """Returns the scales of this rank's products in FP8, by the canonical name of their weights' first slice."""
    found: dict[str, list[float]] = {}
    for name, parameter, piece in all_slices(chunks):
        scales = info_of(parameter).fp8
        if scales and scales.state and piece is info_of(parameter).slices[0]:
            found[name] = scales.state
    return found
