"""The order of a run's samples as a function: any sample's place follows from its number, without a stored index.

Therefore a run's length is no part of its order, and nothing has to be built, kept or agreed upon by ranks.
"""

import functools
import hashlib

import numpy as np

_ROUNDS = 6
_MASK = (1 << 64) - 1
_BLOCK_SAMPLES = 1024
_GOLDEN_RATIO = (5**0.5 - 1) / 2


def permuted(number: int, *, size: int, seed: tuple[int, ...]) -> int:
    """Where a permutation of range(size), drawn by `seed`, takes `number`.

    A Feistel network over the smallest even number of bits that holds `size`; what falls outside is sent through
    again, which keeps it a permutation (Black and Rogaway, Ciphers with arbitrary finite domains, 2002).
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    keys = _round_keys(seed)
    while True:
        left, right = number >> half_bits, number & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        number = left << half_bits | right
        if number < size:
            return number


def drawn(size: int, *, seed: tuple[int, ...]) -> int:
    """A number of range(size), drawn by `seed`."""
    return _round_keys(seed)[0] % size


@functools.lru_cache(maxsize=1024)
def _round_keys(seed: tuple[int, ...]) -> tuple[int, ...]:
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[start : start + 8], "little") for start in range(0, len(digest), 8))


def _mix(value: int) -> int:
    """The finalizer of MurmurHash3: every bit of the result depends on every bit of the value."""
    value = (value ^ value >> 33) * 0xFF51AFD7ED558CCD & _MASK
    value = (value ^ value >> 33) * 0xC4CEB9FE1A85EC53 & _MASK
    return value ^ value >> 33


class Blend:
    """Which source gives a run's n-th sample, and which of that source's samples, in its order, it is.

    Source i gives its m-th sample (from 0) at time (m + phase_i) / share_i, and samples are taken by time, so that a
    longer run only adds to a shorter one. Phases spread evenly over (0, 1) keep sources of one share from giving
    theirs all at once. At any time each source is within a few samples of its share, about sqrt(sources) at most.
    """

    def __init__(self, weights: list[float]) -> None:
        self._shares = np.array(weights, dtype=np.float64) / np.sum(weights)
        self._phases = (0.5 + np.arange(len(weights)) * _GOLDEN_RATIO) % 1
        self._block = functools.lru_cache(maxsize=8)(self._compute_block)

    def locate(self, number: int) -> tuple[int, int]:
        """Source of sample `number` of the run, and the sample's number within that source."""
        block, within = divmod(number, _BLOCK_SAMPLES)
        sources, samples = self._block(block)
        return int(sources[within]), int(samples[within])

    def counts(self, num_samples: int) -> np.ndarray:
        """How many of the first `num_samples` each source gives, int64 [sources]."""
        lower, sources, _ = self._events(num_samples)
        return lower + np.bincount(sources[: num_samples - int(lower.sum())], minlength=len(lower))

    def _compute_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        start = block * _BLOCK_SAMPLES
        lower, sources, samples = self._events(start)
        taken = slice(start - int(lower.sum()), start - int(lower.sum()) + _BLOCK_SAMPLES)
        return sources[taken], samples[taken]

    def _events(self, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples in order around a block: what surely lies before (counts by source), then sources and numbers."""
        # At time t the sources together have given t samples, give or take one each.
        margin = len(self._shares) + 1
        lower = self._given_at(start - margin)
        upper = self._given_at(start + _BLOCK_SAMPLES + margin) + 1
        counts = upper - lower
        sources = np.repeat(np.arange(len(counts)), counts)
        firsts = np.repeat(np.cumsum(counts) - counts, counts)
        samples = np.arange(int(counts.sum())) - firsts + lower[sources]
        times = (samples + self._phases[sources]) / self._shares[sources]
        order = np.lexsort((sources, times))
        return lower, sources[order], samples[order]

    def _given_at(self, time: int) -> np.ndarray:
        return np.maximum(0, np.floor(time * self._shares + 1 - self._phases)).astype(np.int64)
