"""Compute weights: the weights in the precision of matrix products, converted once for all micro-batches of a step."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sambalm.parallel.zero.parameter_info import info_of


class ComputeWeights:
    """Copies of the weights that matrix products take, 2 bytes a parameter in bf16, which stay allocated.

    Without them every micro-batch would convert the weights anew and keep the result for its backward. A pipeline has
    several micro-batches under way, each of which would hold its own.

    Args:
        parameters: whose `ParameterInfo.compute_weights` this becomes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.copies: dict[tuple[Tensor, ...], Tensor] = {}  # by what one product takes together
        self.copies_of: defaultdict[Tensor, list[Tensor]] = defaultdict(list)  # views of `copies`
        self.adopted: dict[Tensor, Tensor] = {}
        self.written: set[Tensor] = set()  # weights whose copies the optimizer has left up to date
        self.valid = False
        for parameter in parameters:
            info_of(parameter).compute_weights = self

    def update(self, weights: Iterable[Tensor] | None = None) -> None:
        """Converts weights again, all by default, but for those whose copies the optimizer has written."""
        chosen = self.copies_of if weights is None else weights
        stale = [(copy, w) for w in chosen if w not in self.written for copy in self.copies_of.get(w, [])]
        if stale:
            with torch.no_grad():
                torch._foreach_copy_([copy for copy, _ in stale], [weight for _, weight in stale])

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps copies from a weight's first use on: the weights must not change meanwhile. Call `update` before."""
        self.valid = True
        try:
            yield
        finally:
            self.valid = False
            self.written.clear()

    def adopt(self, weight: nn.Parameter, copy: Tensor) -> None:
        """Takes a tensor that somebody else keeps up to date, at all times, as the weight's copy."""
        info_of(weight).compute_weights, self.adopted[weight] = self, copy

    def adopted_copy(self, weight: Tensor) -> Tensor | None:
        """Returns what `adopt` made the weight's copy; None where the weight holds its own numbers."""
        return self.adopted.get(weight)

    def of(self, weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Returns [out, in] of all weights, one below the other."""
        if weights[0] in self.adopted:
            return below_each_other([self.adopted[weight] for weight in weights])
        if not self.valid:
            return joined(weights, dtype)
        if weights not in self.copies:
            self.copies[weights] = joined(weights, dtype).detach()
            with torch.no_grad():
                views = self.copies[weights].split([len(weight) for weight in weights])
            for weight, view in zip(weights, views, strict=True):
                self.copies_of[weight].append(view)
        return self.copies[weights]

    def to_write(self, weight: Tensor) -> Tensor | None:
        """Returns a weight's copy for an optimizer that writes it with the weight; None where there is none or several.

        The next `update` then leaves that copy alone.
        """
        copies = self.copies_of.get(weight, [])
        if len(copies) != 1:
            return None
        self.written.add(weight)
        return copies[0]


def below_each_other(tensors: Sequence[Tensor]) -> Tensor:
    """Returns one view of all tensors where they follow one another in memory, and else a copy."""
    first, *others = tensors
    end = first.storage_offset() + first.numel()
    for other in others:
        if other.storage_offset() != end or other.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(list(tensors))
        end += other.numel()
    return first.as_strided((sum(map(len, tensors)), first.shape[1]), first.stride())


def joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Returns the weights in dtype, one below the other; a single one that has that dtype already is not copied."""
    converted = [weight.to(dtype) for weight in weights]
    return torch.cat(converted) if len(converted) > 1 else converted[0]
