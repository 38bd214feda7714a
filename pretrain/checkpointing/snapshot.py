"""What a rank saves of a run's state: its share of the canonical tensors, on the CPU."""

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from sambalm.parallel.checkpoint_tensors import CheckpointSlice
from sambalm.parallel.groups import World
from sambalm.parallel.sharding import CanonicalSlice, canonical_slices
from sambalm.parallel.zero.engine import MOMENTS, whole_moment, whole_parameter


def all_slices(parts: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter, CanonicalSlice]]:
    """Canonical name, parameter and slice of all parts of a model."""
    return itertools.chain.from_iterable(canonical_slices(part) for part in parts)


def slices_to_save(parts: Sequence[nn.Module], world: World) -> dict[str, CheckpointSlice]:
    """This rank's share of the state, on the CPU. Ranks with the same weights take turns to save a parameter."""
    saved: dict[str, CheckpointSlice] = {}
    names_of: dict[nn.Parameter, list[tuple[str, CanonicalSlice]]] = {}
    for name, parameter, piece in all_slices(parts):
        names_of.setdefault(parameter, []).append((name, piece))
    for turn, (parameter, names) in enumerate(names_of.items()):
        mine = parameter.owned and turn % world.replica_size == world.replica_rank
        for kind, whole in _wholes(parameter):
            for name, piece in names if mine else ():
                local = piece.of_local(whole).to("cpu", copy=True).contiguous()
                saved[f"{kind}.{name}"] = CheckpointSlice(local, piece)
    return saved


def _wholes(parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """A parameter's tensors, gathered over data-parallel ranks one at a time. Collective."""
    yield "model", whole_parameter(parameter)
    for key in MOMENTS:
        yield key, whole_moment(parameter, key)
