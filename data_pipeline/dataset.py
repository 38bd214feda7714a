"""Training and validation samples by number: where each one lies follows from its number, the seed and the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from .config import DataConfig
from .errors import DataError
from .order import Blend, drawn, permuted
from .packing import DocumentPacking
from .sources import Source
from .token_stream import TokenStream

LOOKED_AT = 64  # first samples, of which at least one must have a label that counts
PADDING_ID = 0  # behind a sample that documents do not fill; it never counts in the loss
_HELD_OUT_SEED = 1234  # not the run's: seeds are compared by their losses, which must be of the same samples


class Sample(NamedTuple):
    """int64 [S] each: tokens; labels, the tokens one position later; and for each token where its document begins.

    `document_starts` is None unless data.reset_at_document. `loss_weights`, float32 [S], is 1 for a label that counts
    in the loss and 0 for one that does not; None where all labels of all samples count.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    document_starts: torch.Tensor | None
    loss_weights: torch.Tensor | None = None

    @property
    def has_label(self) -> bool:
        """Whether any of its labels counts in the loss."""
        return self.loss_weights is None or bool(self.loss_weights.any())


class Samples(Protocol):
    """What a loader reads: a sample by its number, and where it lies."""

    def __getitem__(self, number: int) -> Sample: ...

    def token_place(self, number: int, position: int) -> tuple[str, int]:
        """The .bin file and the byte in it of a sample's token, or of its last label for position S."""


@dataclass(frozen=True)
class DrawnBefore:
    """What a run has drawn before the first sample of a data set.

    samples: of the whole run.
    numbers: of each source among all that the run has, which the orders of its epochs are drawn by.
    of_sources: samples of each source that were cut as these are, so that these go on behind them.
    """

    samples: int
    numbers: Sequence[int]
    of_sources: Sequence[int]


class TrainDataset:
    """The training samples of a run, without an end: each source begins another epoch when one is through.

    Sample n of the run depends on n, the seed, the sources and their weights, and on nothing else. A source's epoch
    is its training part cut into samples, each once, in an order drawn anew; the cuts move by a few tokens.

    Args:
        before: where the samples are a phase of a run, which numbers them on; None: they are the first ones.
    """

    def __init__(
        self, sources: Sequence[Source], config: DataConfig, *, seed: int, before: DrawnBefore | None = None
    ) -> None:
        self.sequence_length = config.sequence_length
        self._before = before or DrawnBefore(0, range(len(sources)), [0] * len(sources))
        self._seed = seed
        self._reader = _Reader(config, sources, length=config.sequence_length)
        self._blend = Blend([source.weight for source in sources])
        self._streams = [source.stream(held_out=False) for source in sources]
        self._prefixes = [source.prefix for source in sources]
        self.packings = _packings(config, self._streams, length=config.sequence_length)
        self._samples = [
            len(packing) if packing else (len(stream) - 1) // self.sequence_length
            for stream, packing in zip(self._streams, self.packings, strict=True)
        ]

    def __getitem__(self, number: int) -> Sample:
        return self._reader.read(*self._locate(number))

    def source_number(self, number: int) -> int:
        """Which source a sample comes from."""
        return self._blend.locate(number - self._before.samples)[0]

    def token_place(self, number: int, position: int) -> tuple[str, int]:
        stream, start, _ = self._locate(number)
        return stream.place(start + position)

    def cut_documents(self) -> dict[str, int]:
        """By prefix how many documents lose their ends, where samples are whole documents and some are longer."""
        pairs = zip(self._prefixes, self.packings, strict=True)
        return {prefix: packing.cut_documents for prefix, packing in pairs if packing and packing.cut_documents}

    def check_labels_count(self) -> None:
        """
        Raises:
            DataError: no label of the first samples counts in the loss, so that there is nothing to learn from them.
        """
        for number in range(self._before.samples, self._before.samples + LOOKED_AT):
            if self[number].has_label:
                return
        cut = self.cut_documents()
        why = (
            f"{sum(cut.values()):,} documents are longer and lose their ends: raise it"
            if cut
            else "look at their masks"
        )
        raise DataError(
            f"no label of the first {LOOKED_AT} samples of {', '.join(self._prefixes)} counts in the loss at "
            f"data.sequence_length {self.sequence_length}; {why}"
        )

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first `num_samples` of the data set each source gives."""
        return self._blend.counts(num_samples).tolist()

    def epochs(self, num_samples: int) -> list[float]:
        """How often the first `num_samples` of the data set go through each source."""
        return [count / samples for count, samples in zip(self.counts(num_samples), self._samples, strict=True)]

    def _locate(self, number: int) -> tuple[TokenStream, int, int]:
        """The stream of a sample, its first token there, and the one after its last."""
        source, in_source = self._blend.locate(number - self._before.samples)
        stream, samples = self._streams[source], self._samples[source]
        epoch, in_epoch = divmod(in_source + self._before.of_sources[source], samples)
        seed = (self._seed, self._before.numbers[source], epoch)
        if packing := self.packings[source]:
            return stream, *packing.place(permuted(in_epoch, size=samples, seed=seed))
        # Tokens that an epoch has beyond whole samples leave room to begin later.
        spare = len(stream) - 1 - samples * self.sequence_length
        start = permuted(in_epoch, size=samples, seed=seed) * self.sequence_length + drawn(spare + 1, seed=seed)
        return stream, start, start + self.sequence_length + 1


class ValidationDataset:
    """Different samples of the held-out parts, source by source. `len` counts them.

    places: of each sample its source, its first token in the source's stream, and the one after its last.
    prefixes: of the sources.
    """

    def __init__(
        self,
        places: list[tuple[int, int, int]],
        streams: list[TokenStream],
        reader: "_Reader",
        *,
        prefixes: Sequence[str],
    ) -> None:
        self.sequence_length = reader.length
        self._places = places
        self._streams = streams
        self._reader = reader
        self._prefixes = prefixes

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Sample:
        source, start, stop = self._places[number]
        return self._reader.read(self._streams[source], start, stop)

    def source_number(self, number: int) -> int:
        """Which source a sample comes from."""
        return self._places[number][0]

    def source_counts(self) -> list[int]:
        """Samples of each source."""
        return np.bincount([source for source, *_ in self._places], minlength=len(self._streams)).tolist()

    def without_labels(self) -> list[str]:
        """Returns the prefixes of the sources of which there are samples, and no label of any counts in the loss."""
        if not self._reader.weighs:
            return []
        sampled = {source for source, *_ in self._places}
        counted: set[int] = set()
        for number, (source, *_) in enumerate(self._places):
            if source not in counted and self[number].has_label:
                counted.add(source)
        return [self._prefixes[source] for source in sorted(sampled - counted)]

    def token_place(self, number: int, position: int) -> tuple[str, int]:
        source, start, _ = self._places[number]
        return self._streams[source].place(start + position)


def build_train_dataset(
    config: DataConfig, sources: Sequence[Source], *, seed: int, before: DrawnBefore | None = None
) -> TrainDataset:
    """The training samples of `sources`, shuffled by `seed`.

    Raises DataError where a source is shorter than one sample.
    """
    for source in sources:
        tokens = source.tokens(held_out=False)
        if tokens <= config.sequence_length and config.packing == "stream":
            raise DataError(
                f"{source.prefix} has {tokens} training tokens and one sample needs {config.sequence_length + 1}; "
                "give more data or lower data.sequence_length"
            )
    return TrainDataset(sources, config, seed=seed, before=before)


def _lengths(multiple: int) -> str:
    """The keys that make a validation sample as long as it is."""
    more = f"validation.length_multiples (with {multiple}) or " if multiple > 1 else ""
    return f"{more}data.sequence_length"


def build_validation_dataset(
    config: DataConfig,
    sources: Sequence[Source],
    *,
    num_samples: int,
    length_multiple: int = 1,
    held_out: bool = True,
) -> ValidationDataset:
    """At most `num_samples` samples of the held-out parts, `length_multiple` times the training length.

    held_out: false takes the training parts of `sources`, which of data.validation are all that there is.

    Where there are fewer, `len` of the result says how many. Sources keep their training proportions as far as their
    held-out parts last, but each gives at least one where it can. Runs of other seeds have the same samples.
    Raises DataError where no held-out part makes one sample, where no label of them counts in the loss, and where none
    of one of the sources of data.validation does, each of which has a loss of its own.
    """
    length = config.sequence_length * length_multiple
    streams = [source.stream(held_out=held_out) for source in sources]
    packings = _packings(config, streams, length=length)
    available = np.array(
        [
            len(packing) if packing else max(0, len(stream) - 1) // length
            for stream, packing in zip(streams, packings, strict=True)
        ]
    )
    if not available.any() and not held_out:
        raise DataError(
            f"data.validation ({', '.join(source.prefix for source in sources)}) has {max(map(len, streams))} tokens "
            f"at most, and one validation sample needs {length + 1}; give more, or lower "
            f"{_lengths(length_multiple)}"
        )
    if not available.any():
        names = ", ".join(source.prefix for source in sources)
        if all(shard.documents == 1 for source in sources for shard in source.shards):
            raise DataError(
                f"nothing of {names} can be held out to validate on, because a shard's last documents are, and here "
                "each shard is a single document: preprocess the text as several files, or with --text-documents line"
            )
        raise DataError(
            f"the held-out parts of {names} have "
            f"{max(map(len, streams))} tokens at most, and one validation sample needs {length + 1}; raise "
            f"data.validation_fraction (now {config.validation_fraction}), lower {_lengths(length_multiple)}, or give "
            "more text"
        )
    weights = np.array([source.weight for source in sources])
    counts = _allocate(num_samples, shares=weights / weights.sum(), available=available)
    places = []
    for number, (count, packing) in enumerate(zip(counts, packings, strict=True)):
        for sample in range(count):
            chosen = permuted(sample, size=int(available[number]), seed=(_HELD_OUT_SEED, number))
            places.append(
                (number, *(packing.place(chosen) if packing else (chosen * length, (chosen + 1) * length + 1)))
            )
    prefixes = [source.prefix for source in sources]
    dataset = ValidationDataset(places, streams, _Reader(config, sources, length=length), prefixes=prefixes)
    empty = dataset.without_labels()
    if empty and (not held_out or len(empty) == np.count_nonzero(counts)):
        parts = "the held-out part of" if held_out else "data.validation's"
        keys = ["data.validation_fraction"] * held_out + ["validation.tokens"]
        keys += [_lengths(length_multiple)] * (config.packing == "documents")  # longer documents lose their ends
        raise DataError(
            f"no label of {parts} {', '.join(empty)} counts in the loss, in samples of {length} tokens; look at the "
            f"masks, or raise {' or '.join(keys)}"
        )
    return dataset


class _Reader:
    """Makes samples of `length` tokens of ranges of streams, a shorter one with padding behind it."""

    def __init__(self, config: DataConfig, sources: Sequence[Source], *, length: int) -> None:
        self.length = length
        self._resets, self._packed = config.reset_at_document, config.packing == "documents"
        self.weighs = self._packed or any(source.masked for source in sources)

    def read(self, stream: TokenStream, start: int, stop: int) -> Sample:
        """The sample of the tokens [start, stop) of a stream, length + 1 of them at most."""
        count, whole = stop - start, self.length + 1
        ids = np.full(whole, PADDING_ID, dtype=np.int64)
        ids[:count] = stream.read(start, count)
        tokens = torch.from_numpy(ids)
        begins = None
        if self._resets or self._packed:
            begins = np.full(whole, count, dtype=np.int64)  # what pads a sample is a document of its own
            begins[:count] = stream.document_starts(start, count)
        weights = None
        if self.weighs:
            counted = np.zeros(whole, dtype=np.float32)
            counted[:count] = stream.counts(start, count)
            if self._packed and begins is not None:
                counted[begins[:count]] = 0  # nothing of its document foretells a document's first token
            weights = torch.from_numpy(counted[1:])
        starts = torch.from_numpy(begins[:-1]) if self._resets and begins is not None else None
        return Sample(tokens[:-1], tokens[1:], starts, weights)


def _packings(config: DataConfig, streams: Sequence[TokenStream], *, length: int) -> list[DocumentPacking | None]:
    packed = config.packing == "documents"
    return [DocumentPacking(stream, capacity=length + 1) if packed else None for stream in streams]


def _allocate(asked: int, *, shares: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Split `asked` samples by `shares`, none above `available`; what one cannot give, the others do.

    A source whose share is too small for a sample gets one all the same, of the largest.
    """
    counts = np.zeros_like(available)
    left = min(asked, int(available.sum()))
    while left:
        open_shares = np.where(counts < available, shares, 0.0)
        grants = np.floor(open_shares / open_shares.sum() * left).astype(counts.dtype)
        grants = np.minimum(grants, available - counts)
        if not grants.any():
            neediest = np.argsort(-open_shares, kind="stable")[: min(left, np.count_nonzero(open_shares))]
            grants[neediest] = 1
        counts += grants
        left -= int(grants.sum())
    for without in np.flatnonzero((counts == 0) & (available > 0)):
        largest = int(counts.argmax())
        if counts[largest] > 1:
            counts[[int(without), largest]] += (1, -1)
    return counts
