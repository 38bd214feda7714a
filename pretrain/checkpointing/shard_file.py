"""A rank's files of a checkpoint: safetensors, with the checksum computed of what is written, while it is written.

A file holds one rectangle of a tensor, by the tensor's name; where the rectangle lies is in the file's metadata. That
is what torch.distributed.checkpoint's safetensors storage writes and reads. A rank that holds several rectangles of a
tensor, as under ZeRO, spreads them over several files.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
)

from sambalm.pretrain.checkpointing.snapshot import FP32_BYTES, SavedSlice

_BLOCK_BYTES = 1 << 24
_ALIGNMENT = 8


class Slice(Protocol):
    """A rectangle of a canonical tensor; see `SavedSlice`."""

    @property
    def name(self) -> str: ...

    @property
    def offsets(self) -> tuple[int, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def tensor(self) -> Tensor: ...


@dataclass(frozen=True)
class UnreadTensor:
    """A whole canonical tensor that is in memory only while it is written.

    Attributes:
        name: with its kind before it, as of `SavedSlice`.
        read: returns the tensor, fp32 on the host.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def offsets(self) -> tuple[int, ...]:
        return (0,) * len(self.shape)

    @property
    def tensor(self) -> Tensor:
        return self.read()


def write_shards(folder: Path, slices: Sequence[SavedSlice], *, rank: int) -> dict[str, dict[str, int]]:
    """Writes a rank's slices durably; returns the size and CRC-32 of each file, by name.

    Raises:
        OSError: they could not all be written.
    """
    found = {}
    for number, held in enumerate(_dealt(slices)):
        name = f"shard-{rank + 1:05d}-{number}.safetensors"
        found[name] = write_shard(folder / name, held)
    return found


def _dealt(slices: Sequence[SavedSlice]) -> list[list[SavedSlice]]:
    """Deals slices to files so that none holds a name twice: all large ones to the first."""
    files: list[list[SavedSlice]] = []
    seen: dict[str, int] = {}
    for piece in sorted(slices, key=lambda piece: -piece.tensor.numel()):
        number = seen[piece.name] = seen.get(piece.name, -1) + 1
        if number == len(files):
            files.append([])
        files[number].append(piece)
    return files


def write_shard(path: Path, slices: Sequence[Slice]) -> dict[str, int]:
    """Writes slices of different names durably, one after the other; returns the file's size and CRC-32.

    Blocks of zeros become holes, so that moments of a model that has not been trained take no disk.

    Raises:
        OSError: they could not all be written.
    """
    crc, size = 0, 0
    try:
        with path.open("wb") as file:
            for block in _blocks(slices):
                crc = zlib.crc32(block, crc)
                size += len(block)
                if _is_zero(block):
                    file.seek(len(block), os.SEEK_CUR)
                else:
                    file.write(block)
            file.truncate(size)  # which a hole at the end needs
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write knows no name
    return {"bytes": size, "crc32": crc}


def _is_zero(block: bytes | memoryview) -> bool:
    values = np.frombuffer(block, dtype=np.uint8)
    return not (values[:_ALIGNMENT].any() or values.any())  # the first few say it of nearly every block


def _blocks(slices: Sequence[Slice]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a file."""
    header = _header(slices)
    yield len(header).to_bytes(8, "little") + header
    for piece in slices:
        yield from (part.view(-1).numpy().data.cast("B") for part in _contiguous(piece.tensor))


def _header(slices: Sequence[Slice]) -> bytes:
    places = {piece.name: {SAVED_OFFSETS_KEY: list(piece.offsets)} for piece in slices}
    entries: dict[str, object] = {
        "__metadata__": {
            CUSTOM_METADATA_KEY: json.dumps(places),
            DCP_VERSION_KEY: str(HF_DCP_VERSION),
            FORMAT_KEY: FORMAT_VALUE,
        }
    }
    end = 0
    for piece in slices:
        start, end = end, end + math.prod(piece.shape) * FP32_BYTES
        entries[piece.name] = {"dtype": "F32", "shape": list(piece.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    return header + b" " * (-len(header) % _ALIGNMENT)


def _contiguous(tensor: Tensor) -> Iterator[Tensor]:
    """Yields a tensor in contiguous parts of about a block, one after the other."""
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(_BLOCK_BYTES // FP32_BYTES)
    else:
        rows = max(1, _BLOCK_BYTES // (tensor[0].numel() * FP32_BYTES))
        yield from (part.contiguous() for part in tensor.split(rows))
