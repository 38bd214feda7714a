"""Reading rectangles of canonical tensors from a checkpoint's files, on any layout, each byte about once.

One rank reads where everything is stored, for all. A rank reads what it alone needs; what replicas need alike one of
them reads and sends to the others.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sambalm.parallel.groups import World
from sambalm.pretrain.checkpointing.format import Checkpoint, StoredSlice, open_shard
from sambalm.pretrain.errors import CheckpointError, one_sentence

Stored = Mapping[str, Sequence[StoredSlice]]


@dataclass(frozen=True)
class WantedSlice:
    """A rectangle of a stored tensor, and where it goes.

    Attributes:
        name: of the stored tensor, with its kind before it.
        offsets: where the rectangle begins in the stored tensor.
        target: of the rectangle's shape, on any device; reading writes it.
    """

    name: str
    offsets: tuple[int, ...]
    target: Tensor


@dataclass(frozen=True)
class _Read:
    """What is common to a stored and a wanted rectangle."""

    name: str
    path: Path
    region: tuple[slice, ...]  # of what is stored
    target: Tensor


def stored_slices(path: Path, *, world: World) -> Stored:
    """Returns where each tensor of a checkpoint is stored. Collective: one rank opens the files for all.

    Raises:
        CheckpointError: on every rank, when the files cannot be read.
    """

    def stored() -> Stored:
        try:
            return Checkpoint(path, {}).stored()
        except Exception as error:  # safetensors' own, and those of metadata that make no sense
            raise CheckpointError(f"{path} cannot be read: {one_sentence(error)}") from error

    return world.of_main(stored)


def read_slices(stored: Stored, wanted: Iterable[WantedSlice], *, world: World) -> None:
    """Fills this rank's targets. Collective, also where a rank wants nothing.

    Raises:
        CheckpointError: on every rank, when one of them cannot read what it wants.
    """
    read_together(lambda: _read_all([read for slice_ in wanted for read in _reads(stored, slice_)]), world=world)


def read_together(read: Callable[[], None], *, world: World, source: str = "a checkpoint") -> None:
    """Reads what this rank needs. Collective, also where a rank needs nothing.

    Args:
        source: what is read, as messages call it.

    Raises:
        CheckpointError: on every rank, when one of them cannot read.
    """
    failure = None
    try:
        read()
    except Exception as error:  # whatever it is: the other ranks would wait for this one
        failure = f"rank {world.rank}: {one_sentence(error)}"
    failures = [reason for reason in world.all_gather_object(failure) if reason]
    if failures:
        raise CheckpointError(f"{source} cannot be read: {failures[0]}")


def readers(parameters: Sequence[nn.Parameter], *, ranks: int) -> list[int]:
    """Deals parameters to ranks that all need them; returns the rank that reads each, so that all read about alike."""
    loads, dealt = [0] * ranks, [0] * len(parameters)
    for number in sorted(range(len(parameters)), key=lambda number: -parameters[number].numel()):
        dealt[number] = loads.index(min(loads))
        loads[dealt[number]] += parameters[number].numel()
    return dealt


def send_to_replicas(tensors: Sequence[Tensor], dealt: Sequence[int], *, world: World) -> None:
    """Gives all replicas the tensors that one of each was dealt. Collective."""
    if world.replica_size > 1:
        for tensor, rank in zip(tensors, dealt, strict=True):
            dist.broadcast(tensor, group=world.replica_group, group_src=rank)


def _reads(stored: Stored, wanted: WantedSlice) -> Iterator[_Read]:
    found = 0
    for piece in stored.get(wanted.name, ()):
        starts = [max(pair) for pair in zip(piece.offsets, wanted.offsets, strict=True)]
        stops = [
            min(o + n, begin + size)
            for o, n, begin, size in zip(piece.offsets, piece.sizes, wanted.offsets, wanted.target.shape, strict=True)
        ]
        if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
            continue
        region, place = (
            tuple(slice(start - o, stop - o) for start, stop, o in zip(starts, stops, offsets, strict=True))
            for offsets in (piece.offsets, wanted.offsets)
        )
        target = wanted.target[place]
        found += target.numel()
        yield _Read(wanted.name, piece.path, region, target)
    if found != wanted.target.numel():
        raise CheckpointError(f"no file holds all of {wanted.name}")


def _read_all(reads: list[_Read]) -> None:
    """Reads file by file, so that each is opened once."""
    with ExitStack() as opened:
        path, file = None, None
        for read in sorted(reads, key=lambda read: read.path):
            if read.path != path:
                opened.close()
                path, file = read.path, opened.enter_context(open_shard(read.path))
            read.target.copy_(_read_region(file, read.name, read.region))


def _read_region(file: Any, name: str, region: tuple[slice, ...]) -> Tensor:
    return torch.from_numpy(file.get_slice(name)[region])
