"""A rank's share of a run's state for a checkpoint: slices of the canonical tensors, on the CPU."""

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from sambalm.parallel.checkpoint_tensors import CheckpointSlice
from sambalm.parallel.groups import World
from sambalm.parallel.sharding import canonical_slices
from sambalm.parallel.zero.engine import MOMENTS, whole_moment, whole_parameter
from sambalm.parallel.zero.parameter_info import CanonicalSlice, info_of


def all_slices(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter, CanonicalSlice]]:
    """Yields canonical name, parameter and slice, for every slice that model chunks hold."""
    return itertools.chain.from_iterable(canonical_slices(chunk) for chunk in chunks)


def slices_to_save(chunks: Sequence[nn.Module], world: World) -> dict[str, CheckpointSlice]:
    """Returns this rank's share of the state, by kind and canonical name, on the CPU. Collective.

    Ranks with the same weights take turns to save a parameter.
    """
    saved: dict[str, CheckpointSlice] = {}
    names_of: dict[nn.Parameter, list[tuple[str, CanonicalSlice]]] = {}
    for name, parameter, piece in all_slices(chunks):
        names_of.setdefault(parameter, []).append((name, piece))
    for turn, (parameter, names) in enumerate(names_of.items()):
        mine = info_of(parameter).owned and turn % world.replica_size == world.replica_rank
        for kind, whole in _wholes(parameter):
            for name, piece in names if mine else ():
                local = piece.of_local(whole).to("cpu", copy=True).contiguous()
                saved[f"{kind}.{name}"] = CheckpointSlice(local, piece)
    return saved


def _wholes(parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """Yields a parameter's weights and moments, gathered over data-parallel ranks one at a time. Collective."""
    yield "model", whole_parameter(parameter)
    for key in MOMENTS:
        yield key, whole_moment(parameter, key)


def fp8_scales(chunks: Sequence[nn.Module]) -> dict[str, list[float]]:
    """Returns the scales of this rank's products in FP8, by the canonical name of their weights' first slice."""
    found: dict[str, list[float]] = {}
    for name, parameter, piece in all_slices(chunks):
        scales = info_of(parameter).fp8
        if scales and scales.state and piece is info_of(parameter).slices[0]:
            found[name] = scales.state
    return found
