"""A rank's files of a checkpoint: safetensors, with the checksum computed of what is written, while it is written.

A file holds one rectangle of a tensor, by the tensor's name; where the rectangle lies is in the file's metadata. That
is what torch.distributed.checkpoint's safetensors storage writes and reads. A rank that holds several rectangles of a
tensor, as under ZeRO, spreads them over several files.
"""

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

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


def write_shards(folder: Path, slices: Sequence[SavedSlice], *, rank: int) -> dict[str, dict[str, int]]:
    """Writes a rank's slices durably; returns the size and CRC-32 of each file, by name.

    Raises:
        OSError: they could not all be written.
    """
    found = {}
    for number, held in enumerate(_dealt(slices)):
        name = f"shard-{rank + 1:05d}-{number}.safetensors"
        found[name] = _write(folder / name, held)
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


def _write(path: Path, slices: Sequence[SavedSlice]) -> dict[str, int]:
    crc, size = 0, 0
    try:
        with path.open("wb") as file:
            for block in _blocks(slices):
                crc = zlib.crc32(block, crc)
                size += len(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write knows no name
    return {"bytes": size, "crc32": crc}


def _blocks(slices: Sequence[SavedSlice]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a file."""
    header = _header(slices)
    yield len(header).to_bytes(8, "little") + header
    for piece in slices:
        for part in _contiguous(piece.tensor):
            yield part.view(-1).numpy().data.cast("B")


def _header(slices: Sequence[SavedSlice]) -> bytes:
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
        start, end = end, end + piece.tensor.numel() * FP32_BYTES
        entries[piece.name] = {"dtype": "F32", "shape": list(piece.tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    return header + b" " * (-len(header) % _ALIGNMENT)


def _contiguous(tensor: Tensor) -> Iterator[Tensor]:
    """Yields a tensor in contiguous parts of about a block, one after the other."""
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(_BLOCK_BYTES // FP32_BYTES)
    else:
        rows = max(1, _BLOCK_BYTES // (tensor[0].numel() * FP32_BYTES))
        yield from (part.contiguous() for part in tensor.split(rows))
