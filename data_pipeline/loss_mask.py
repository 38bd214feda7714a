"""Which tokens of a shard count in the loss: SHARD.mask, a bit a token, beside .bin and .idx.

Bit n of the file, the lowest of each byte first, is 1 where token n counts as a label. In a shard without the file all
tokens count. megatron-core reads the other two files, which are as they always are, and knows nothing of this one.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .files import flush_to_disk


def mask_path(shard_prefix: str | Path) -> Path:
    """PREFIX.mask of a shard."""
    return Path(f"{shard_prefix}.mask")


def mask_bytes(tokens: int) -> int:
    """Size of the mask of so many tokens."""
    return -(-tokens // 8)


def unpacked(content: bytes, *, first: int, count: int) -> np.ndarray:
    """Bits [count], bool, from bit `first` of `content` on."""
    bits = np.unpackbits(np.frombuffer(content, dtype=np.uint8), bitorder="little")
    return bits[first : first + count].astype(bool)


def counts_of_parts(prefixes: Sequence[Sequence[int]], are_counted: Sequence[bool]) -> list[bool]:
    """Which tokens of a text count, of parts of it that do or do not; a token across parts is the later part's.

    prefixes: ids of the text up to the end of each part, the last those of the whole text.
    """
    whole, counts = np.array(prefixes[-1]), list[bool]()
    for prefix, counted in zip(prefixes, are_counted, strict=True):
        common = min(len(prefix), len(whole))
        different = np.flatnonzero(np.array(prefix[:common]) != whole[:common])
        counts += [counted] * ((int(different[0]) if different.size else common) - len(counts))
    return counts


class MaskWriter:
    """Packs bits into an open file, which `finish` closes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self._rest = np.empty(0, dtype=bool)  # of a byte that is not full

    def add(self, counts: np.ndarray) -> None:
        """Appends bits [tokens], bool."""
        bits = np.concatenate([self._rest, counts])
        whole = len(bits) // 8 * 8
        self._write(bits[:whole])
        self._rest = bits[whole:]

    def finish(self) -> str:
        """Writes the last byte, durably; returns the SHA-256 of all."""
        self._write(self._rest)
        flush_to_disk(self._file)
        self._file.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Closes the file without what is missing."""
        self._file.close()

    def _write(self, bits: np.ndarray) -> None:
        content = np.packbits(bits, bitorder="little").tobytes()
        self._file.write(content)
        self._digest.update(content)
