"""The weights of a run while it trains, whole on every rank, one canonical tensor at a time."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sambalm.parallel.groups import World
from sambalm.parallel.zero.engine import WEIGHT, held_tensors
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.pretrain.checkpointing.snapshot import all_slices, held_slices

Place = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes of a rectangle in its canonical tensor


class GatheredState:
    """What `Checkpoint` says of a model's weights, of a model that trains.

    Every rank sends the rectangles that it would save, so the tensors are those of a checkpoint of the step. Making one
    and every `read` are collective: all ranks read the same tensors in the same order. The weights must not change
    meanwhile.
    """

    def __init__(self, chunks: Sequence[nn.Module], *, world: World) -> None:
        self._world = world
        self._own: dict[str, list[tuple[Place, Tensor]]] = {}
        for name, parameter, piece in all_slices(chunks):
            held = held_tensors(parameter).get(WEIGHT) if info_of(parameter).owned else None
            if held is None:
                continue
            for offsets, part in held_slices(parameter, piece):
                view = part(held)
                self._own.setdefault(name, []).append(((offsets, tuple(view.shape)), view))
        own = {name: [place for place, _ in rectangles] for name, rectangles in self._own.items()}
        self._places: dict[str, list[tuple[int, int, Place]]] = {}  # rank, number among the rank's own, place
        for rank, of_rank in enumerate(world.all_gather_object(own)):
            for name, places in of_rank.items():
                numbered = [(rank, number, place) for number, place in enumerate(places)]
                self._places.setdefault(name, []).extend(numbered)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical names and shapes of the model's tensors."""
        return {name: self._shape(name) for name in self._places}

    def read(self, name: str) -> Tensor:
        """Returns a whole canonical tensor, fp32 on this rank's device. Collective.

        Raises:
            KeyError: the name is not in shapes().
        """
        whole = torch.empty(self._shape(name), dtype=torch.float32, device=self._world.device)
        for rank, number, (offsets, sizes) in self._places[name]:
            region = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
            if rank == self._world.rank:
                region.copy_(self._own[name][number][1])
            if self._world.size > 1:
                sent = region.contiguous()
                dist.broadcast(sent, src=rank)
                if sent.data_ptr() != region.data_ptr():
                    region.copy_(sent)
        return whole

    def _shape(self, name: str) -> tuple[int, ...]:
        ends = ([o + n for o, n in zip(*place, strict=True)] for _, _, place in self._places[name])
        return tuple(max(dim) for dim in zip(*ends, strict=True))
