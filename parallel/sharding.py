"""How a parameter's local tensor maps to the canonical tensors that checkpoints hold.

A canonical tensor has one name and one shape under every layout. A rank's parameter may hold slices of several of them
(the fused gate and up projections, Mamba's x and z); each slice is a rectangle, described here as data.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from sambalm.parallel.state import TensorParallel

Init = Callable[[Tensor, torch.Generator], None]


@dataclass(frozen=True)
class CanonicalSlice:
    """One rank's slice of one canonical tensor, and where it lies in the rank's parameter."""

    part: str  # the part's name within the parameter; "" when the parameter is a slice of one tensor
    shape: tuple[int, ...]  # of the canonical tensor
    dim: int  # the dimension that is cut; 0 for a whole tensor
    start: int  # of this slice in the canonical tensor, along dim
    local_start: int  # of this slice in the parameter, along dim
    length: int  # along dim
    init: Init

    def of_canonical(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.dim, self.start, self.length)

    def of_local(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.dim, self.local_start, self.length)

    @property
    def offsets(self) -> tuple[int, ...]:
        return tuple(self.start if dim == self.dim else 0 for dim in range(len(self.shape)))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.length if dim == self.dim else size for dim, size in enumerate(self.shape))


def sharded_parameter(
    shape: tuple[int, ...],
    *,
    init: Init,
    tp: TensorParallel,
    dim: int | None = None,
    parts: Mapping[str, int] | None = None,
) -> nn.Parameter:
    """An uninitialised fp32 parameter that holds this rank's slices.

    Args:
        shape: global shape.
        init: fills a whole canonical tensor, given a generator.
        dim: the dimension cut over tensor-parallel ranks; None: every rank holds the whole.
        parts: sizes along dim of the canonical tensors that the parameter concatenates, by name; each is cut.
    """
    size, rank = (1, 0) if dim is None else (tp.size, tp.rank)
    cut_dim = dim or 0
    slices, local_start = [], 0
    for part, part_size in (parts or {"": shape[cut_dim]}).items():
        if part_size % size:
            raise ValueError(f"a dimension of {part_size} cannot be cut over {size} tensor-parallel ranks")
        length = part_size // size
        part_shape = (*shape[:cut_dim], part_size, *shape[cut_dim + 1 :])
        slices.append(CanonicalSlice(part, part_shape, cut_dim, rank * length, local_start, length, init))
        local_start += length
    parameter = nn.Parameter(torch.empty(*shape[:cut_dim], local_start, *shape[cut_dim + 1 :], dtype=torch.float32))
    parameter.canonical_slices = tuple(slices)
    if dim is not None:  # what DeepSpeed's gradient norm reads: such a parameter is counted on every rank
        set_tensor_model_parallel_attributes(parameter, True, dim, len(slices))
    return parameter


def canonical_slices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, CanonicalSlice]]:
    """Canonical name, parameter and slice, for every slice that the module's parameters hold."""
    for name, parameter in module.named_parameters():
        owner, _, leaf = name.rpartition(".")
        for piece in parameter.canonical_slices:
            yield (f"{owner}.{piece.part}.{leaf}" if piece.part else name), parameter, piece


@torch.no_grad()
def initialize_parameters(module: nn.Module, *, seed: int) -> None:
    """Fills every parameter from its canonical tensor, drawn from a seed of its own: no layout changes a weight."""
    for name, parameter, piece in canonical_slices(module):
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        whole = torch.empty(piece.shape, dtype=torch.float32)
        piece.init(whole, generator)
        piece.of_local(parameter).copy_(piece.of_canonical(whole))
