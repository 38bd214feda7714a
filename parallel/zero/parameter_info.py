"""What layers, gradients, the optimizer and checkpoints know of a parameter, as one dataclass on the parameter itself.

`parallel.sharding.sharded_parameter` makes every parameter of the product together with its `ParameterInfo`, whose
docstring lists all that there is. `info_of` reads it. This file needs nothing but torch, so every folder may import it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Init = Callable[[Tensor, torch.Generator], object]  # fills the tensor; nobody reads what it returns
_ATTRIBUTE = "sambalm_info"


@dataclass(frozen=True)
class CanonicalSlice:
    """One rank's slice of one canonical tensor, and where it lies in the rank's parameter.

    Attributes:
        name: of the canonical tensor, below the parameter's module.
        shape: of the canonical tensor.
        dim: the dimension that ranks share; 0 for a whole tensor.
        start: where this slice begins in the canonical tensor, along dim.
        local_start: where this slice begins in the parameter, along dim.
        length: of this slice along dim.
        init: fills a whole canonical tensor, given a generator.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    start: int
    local_start: int
    length: int
    init: Init

    def of_canonical(self, tensor: Tensor) -> Tensor:
        """Returns a view of this slice in a tensor of the canonical shape."""
        return tensor.narrow(self.dim, self.start, self.length)

    def of_local(self, tensor: Tensor) -> Tensor:
        """Returns a view of this slice in a tensor of the parameter's shape."""
        return tensor.narrow(self.dim, self.local_start, self.length)

    def intersection(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[tuple[int, ...], int, int] | None:
        """Returns what this slice and a rectangle of the parameter have in common; None: nothing.

        Returns:
            Where the common part begins in the canonical tensor, where it begins in the rectangle along dim, and its
            length along dim.
        """
        start = max(offsets[self.dim], self.local_start)
        stop = min(offsets[self.dim] + sizes[self.dim], self.local_start + self.length)
        if start >= stop:
            return None
        canonical = list(offsets)
        canonical[self.dim] = start - self.local_start + self.start
        return tuple(canonical), start - offsets[self.dim], stop - start

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the slice begins in the canonical tensor, along every dimension."""
        return tuple(self.start if dim == self.dim else 0 for dim in range(len(self.shape)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The slice's shape."""
        return tuple(self.length if dim == self.dim else size for dim, size in enumerate(self.shape))


class WeightCopies(Protocol):
    """The store of weights in the precision of matrix products (`compute_weights.ComputeWeights`)."""

    def of(self, weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Returns [out, in] of all weights, one below the other."""
        ...

    def adopted_copy(self, weight: Tensor) -> Tensor | None:
        """Returns the copy of a weight that is whole in no other precision; None for other weights."""
        ...

    def to_write(self, weight: Tensor) -> Tensor | None:
        """Returns the copy that an optimizer writes with the weight; None where there is none or several."""
        ...


class Fp8Scales(Protocol):
    """The scales of a product in FP8 (`layers.fp8.ProductScales`)."""

    @property
    def state(self) -> list[float]:
        """What a run needs to go on with the same bits; empty before its first step."""
        ...

    def load(self, state: list[float]) -> None:
        """Sets the scales as `state` gave them."""
        ...


@dataclass(eq=False)
class ParameterInfo:
    """Everything that the product attaches to a parameter.

    A layer says the first five when it makes the parameter, and they stay; `build_chunks` adds the sixth.
    `build_executor` sets the next two and fp8, and each step's backward the two between them. `zero_engine` and
    `create_moments` set the last two.

    Attributes:
        slices: the rectangles of canonical tensors that the parameter holds, in the order in which it joins them.
        owned: whether this rank's copy is the one that counts in the gradient's norm and that checkpoints store, where
            other ranks hold the same slices.
        matmul_only: whether nothing reads the parameter but the matrix products of `layers.linear`, which take it in
            their own precision. ZeRO-1 then gathers it in that precision alone.
        weight_decay: whether AdamW decays it.
        takes_fp8: whether the product that reads it, first of its weights, is large enough for FP8 and may run in it.
        lr_scale: what the optimizer's learning rate is multiplied by for it.
        compute_weights: who keeps the parameter's copy in the precision of matrix products; None where products convert
            the parameter at each use.
        fuses_accumulation: whether matrix products add to `parameter.grad` themselves. Autograd then finds no gradient.
        has_product: whether a matrix product has ever added to `parameter.grad` so; True from the first backward on.
        is_overwritten: whether the next such product writes over what `parameter.grad` holds, instead of adding to it.
        is_partitioned: whether the keeper of the copy has it only while products ask for it (ZeRO-3). A product asks
            again in its backward.
        fp8: the scales of the product that reads it, where that runs in FP8.
        moments: the names of what the optimizer keeps of each of its elements. `zero_engine` sets them.
        optimizer_state: AdamW's state of the parameter where this rank holds its only replica; None where DeepSpeed
            shares the state out over ranks.
    """

    slices: tuple[CanonicalSlice, ...]
    owned: bool
    matmul_only: bool
    weight_decay: bool
    takes_fp8: bool = False
    lr_scale: float = 1.0
    compute_weights: WeightCopies | None = None
    fuses_accumulation: bool = False
    has_product: bool = False
    is_overwritten: bool = False
    is_partitioned: bool = False
    fp8: Fp8Scales | None = None
    moments: tuple[str, ...] = ()
    optimizer_state: dict[str, Tensor] | None = None


def attach_info(parameter: Tensor, info: ParameterInfo) -> None:
    """Gives a parameter its info, once."""
    setattr(parameter, _ATTRIBUTE, info)


def info_of(parameter: Tensor) -> ParameterInfo:
    """Returns a parameter's info.

    Raises:
        TypeError: `sharded_parameter` did not make the parameter.
    """
    info = find_info(parameter)
    if info is None:
        raise TypeError(f"a parameter of shape {tuple(parameter.shape)} was not made by sharded_parameter")
    return info


def find_info(tensor: Tensor) -> ParameterInfo | None:
    """Returns a tensor's info; None for what is no parameter of ours, such as an activation or a flat buffer."""
    return getattr(tensor, _ATTRIBUTE, None)
