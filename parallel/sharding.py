"""How a parameter's local tensor maps to the canonical tensors that checkpoints hold.

A canonical tensor has one name and one shape under every layout. A rank's parameter may hold slices of several of them
(the fused gate and up projections, Mamba's x and z); each slice is a rectangle, described here as data.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.shard import Shard

Init = Callable[[Tensor, torch.Generator], None]


@dataclass(frozen=True)
class CanonicalSlice:
    """One rank's slice of one canonical tensor, and where it lies in the rank's parameter."""

    name: str  # of the canonical tensor, below the parameter's module
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
    cuts: Mapping[str, Shard],
    *,
    init: Init,
    dim: int = 0,
    owned: bool = True,
    matmul_only: bool = False,
) -> nn.Parameter:
    """An uninitialised fp32 parameter that concatenates this rank's slices of canonical tensors.

    Args:
        shape: of the parameter but for dim, whose entry is ignored.
        cuts: the slices along dim, by the canonical tensors' names below the module.
        init: fills a whole canonical tensor, given a generator.
        owned: whether this copy is the one that counts in the gradient's norm and in checkpoints, where other ranks
            hold the same slices.
        matmul_only: whether nothing reads it but the matrix products of `linear`, which round it.
    """
    slices, local_start = [], 0
    for name, part in cuts.items():
        canonical_shape = (*shape[:dim], part.size, *shape[dim + 1 :])
        slices.append(CanonicalSlice(name, canonical_shape, dim, part.start, local_start, part.length, init))
        local_start += part.length
    parameter = nn.Parameter(torch.empty(*shape[:dim], local_start, *shape[dim + 1 :], dtype=torch.float32))
    parameter.canonical_slices = tuple(slices)
    parameter.owned, parameter.matmul_only = owned, matmul_only
    # What DeepSpeed's gradient norm reads: the first counts a parameter on every tensor-parallel rank instead of the
    # first alone, the second on none.
    parameter.tensor_model_parallel, parameter.ds_pipe_replicated = owned, not owned
    return parameter


def replicated_parameter(shape: tuple[int, ...], *, name: str, init: Init, tp: TensorParallel) -> nn.Parameter:
    """An uninitialised fp32 parameter that every tensor-parallel rank holds whole."""
    return sharded_parameter(shape, {name: Shard(shape[0], 0, shape[0])}, init=init, owned=tp.rank == 0)


def canonical_slices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, CanonicalSlice]]:
    """Canonical name, parameter and slice, for every slice that the module's parameters hold."""
    for name, parameter in module.named_parameters():
        owner = name.rpartition(".")[0]
        for piece in parameter.canonical_slices:
            yield f"{owner}.{piece.name}", parameter, piece


@torch.no_grad()
def initialize_parameters(module: nn.Module, *, seed: int) -> None:
    """Fills every parameter from its canonical tensor, drawn from a seed of its own: no layout changes a weight."""
    for name, parameter, piece in canonical_slices(module):
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        whole = torch.empty(piece.shape, dtype=torch.float32)
        piece.init(whole, generator)
        piece.of_local(parameter).copy_(piece.of_canonical(whole))
