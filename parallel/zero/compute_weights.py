"""Weights rounded to the precision of matrix products once for all micro-batches of a step."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ComputeWeights:
    """Copies of the weights that matrix products take, 2 bytes a parameter in bf16, which stay allocated.

    Every micro-batch would make them anew, and keep them for its backward: several that are under way, as in a
    pipeline, would each hold their own.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.copies: dict[tuple[nn.Parameter, ...], Tensor] = {}
        self.adopted: dict[nn.Parameter, Tensor] = {}
        self.parts: defaultdict[nn.Parameter, list[Tensor]] = defaultdict(list)  # of the copies
        self.written: set[nn.Parameter] = set()  # whose copies the optimizer has left up to date
        self.valid = False
        for parameter in parameters:
            parameter.rounded = self

    def update(self, weights: Iterable[nn.Parameter] | None = None) -> None:
        """Rounds weights again, all by default, but for those whose copies the optimizer has written."""
        chosen = self.parts if weights is None else weights
        stale = [(part, w) for w in chosen if w not in self.written for part in self.parts.get(w, [])]
        if stale:
            with torch.no_grad():
                torch._foreach_copy_(*map(list, zip(*stale, strict=True)))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While weights do not change once they have been used; call `update` before that."""
        self.valid = True
        try:
            yield
        finally:
            self.valid = False
            self.written.clear()

    def adopt(self, weight: nn.Parameter, rounded: Tensor) -> None:
        """Takes what somebody else keeps up to date, always, for the weight's copy."""
        weight.rounded, self.adopted[weight] = self, rounded

    def of(self, weights: tuple[nn.Parameter, ...], dtype: torch.dtype) -> Tensor:
        """[out, in] of all weights, one below the other."""
        if weights[0] in self.adopted:
            return _below_each_other([self.adopted[weight] for weight in weights])
        if not self.valid:
            return joined(weights, dtype)
        if weights not in self.copies:
            self.copies[weights] = joined(weights, dtype).detach()
            with torch.no_grad():
                parts = self.copies[weights].split([len(weight) for weight in weights])
            for weight, part in zip(weights, parts, strict=True):
                self.parts[weight].append(part)
        return self.copies[weights]

    def to_write(self, weight: nn.Parameter) -> Tensor | None:
        """A weight's copy, for an optimizer that writes it with the weight; None where there is none or several."""
        parts = self.parts.get(weight, [])
        if len(parts) != 1:
            return None
        self.written.add(weight)
        return parts[0]


def _below_each_other(parts: Sequence[Tensor]) -> Tensor:
    """A view of all, where they lie in memory as they should, or a copy."""
    first, *others = parts
    end = first.storage_offset() + first.numel()
    for part in others:
        if part.storage_offset() != end or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(parts)
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), first.shape[1]), first.stride())


def joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    cast = [weight.to(dtype) for weight in weights]
    return torch.cat(cast) if len(cast) > 1 else cast[0]
