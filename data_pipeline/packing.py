"""Samples of whole documents: consecutive ones together as long as they fit, and nothing behind the last."""

import numpy as np

from .token_stream import TokenStream


class DocumentPacking:
    """Where the samples of a stream begin and end; `len` counts them.

    A document that does not fit a sample by itself is cut off at its end; `cut_documents` counts those.
    """

    def __init__(self, stream: TokenStream, *, capacity: int) -> None:
        """capacity: tokens of a sample, its last label included."""
        ends = stream.document_ends()
        bounds = np.concatenate(([0], ends))
        self.cut_documents = int((np.diff(bounds) > capacity).sum())
        starts, stops, first = [], [], 0
        while first < len(ends):
            begin = int(bounds[first])
            last = max(first + 1, int(np.searchsorted(bounds, begin + capacity, side="right")) - 1)
            starts.append(begin)
            stops.append(min(int(bounds[last]), begin + capacity))
            first = last
        self._starts, self._stops = np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, number: int) -> tuple[int, int]:
        """First token of a sample in the stream, and the one after its last."""
        return int(self._starts[number]), int(self._stops[number])

    @property
    def tokens(self) -> int:
        """Tokens in all samples."""
        return int((self._stops - self._starts).sum())
