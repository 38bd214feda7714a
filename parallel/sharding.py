"""How a parameter's local tensor maps to the canonical tensors that checkpoints hold.

A canonical tensor has one name and one shape under every layout. A rank's parameter may hold slices of several of them
(the fused gate and up projections, Mamba's x and z); each slice is a rectangle, described here as data.
"""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.shard import Shard
from sambalm.parallel.zero.parameter_info import CanonicalSlice, Init, ParameterInfo, attach_info, info_of


def sharded_parameter(
    shape: tuple[int, ...],
    shards: Mapping[str, Shard],
    *,
    init: Init,
    dim: int = 0,
    owned: bool = True,
    matmul_only: bool = False,
    takes_fp8: bool = False,
    weight_decay: bool | None = None,
) -> nn.Parameter:
    """Makes an fp32 parameter of zeros that joins this rank's slices of canonical tensors, with its info.

    Slices are set by `initialize_parameters` or from a checkpoint; what lies between them stays zero.

    Args:
        shape: of the parameter but for dim, whose entry is ignored.
        shards: the slices along dim, by the canonical tensors' names below the module.
        init: fills a whole canonical tensor, given a generator.
        owned: see `ParameterInfo`.
        matmul_only: see `ParameterInfo`.
        takes_fp8: see `ParameterInfo`.
        weight_decay: whether AdamW decays the parameter. The default decays matrices and leaves vectors alone.
    """
    slices, local_start = [], 0
    for name, part in shards.items():
        canonical_shape = (*shape[:dim], part.size, *shape[dim + 1 :])
        slices.append(CanonicalSlice(name, canonical_shape, dim, part.start, local_start, part.length, init))
        local_start += part.held
    parameter = nn.Parameter(torch.zeros(*shape[:dim], local_start, *shape[dim + 1 :], dtype=torch.float32))
    decays = parameter.dim() > 1 if weight_decay is None else weight_decay
    info = ParameterInfo(tuple(slices), owned=owned, matmul_only=matmul_only, weight_decay=decays, takes_fp8=takes_fp8)
    attach_info(parameter, info)
    return parameter


def replicated_parameter(shape: tuple[int, ...], *, name: str, init: Init, tp: TensorParallel) -> nn.Parameter:
    """Makes an fp32 parameter of zeros that every tensor-parallel rank holds whole."""
    return sharded_parameter(shape, {name: Shard(shape[0], 0, shape[0])}, init=init, owned=tp.rank == 0)


def canonical_slices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, CanonicalSlice]]:
    """Yields canonical name, parameter and slice, for every slice that the module's parameters hold."""
    for name, parameter in module.named_parameters():
        owner = name.rpartition(".")[0]
        for piece in info_of(parameter).slices:
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
