"""Weights rounded to the precision of matrix products once for all micro-batches of a step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


class RoundedWeights:
    """Copies of the weights that matrix products take, 2 bytes a parameter in bf16, which stay allocated.

    Every micro-batch would make them anew, and keep them for its backward: several that are under way, as in a
    pipeline, would each hold their own.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.copies: dict[tuple[nn.Parameter, ...], Tensor] = {}
        self.valid = False
        for parameter in parameters:
            parameter.rounded = self

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While the weights do not change."""
        with torch.no_grad():
            parts = [part for weights, copy in self.copies.items() for part in copy.split([len(w) for w in weights])]
            if parts:
                torch._foreach_copy_(parts, list(chain(*self.copies)))
        self.valid = True
        try:
            yield
        finally:
            self.valid = False

    def of(self, weights: tuple[nn.Parameter, ...], dtype: torch.dtype) -> Tensor:
        """[out, in] of all weights, one below the other."""
        if not self.valid:
            return joined(weights, dtype)
        if weights not in self.copies:
            self.copies[weights] = joined(weights, dtype).detach()
        return self.copies[weights]


def joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    cast = [weight.to(dtype) for weight in weights]
    return torch.cat(cast) if len(cast) > 1 else cast[0]
