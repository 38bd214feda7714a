"""Micro-batches in a global order that depends on sample numbers only, not on how many ranks read them."""

import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .dataset import SampleDataset
from .errors import DataError


class Batch(NamedTuple):
    """A micro-batch, int64 [micro_batch, S] each.

    `document_starts` is for each token the position in its row of the first token of its document; a document that
    began in an earlier sample starts at 0. None unless data.reset_at_document.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    document_starts: torch.Tensor | None


class ValidationBatch(NamedTuple):
    """A micro-batch and its rows' weights [micro_batch] float32, 0 for rows that must not count."""

    batch: Batch
    weights: torch.Tensor


def cu_seqlens(document_starts: torch.Tensor) -> torch.Tensor:
    """Where documents of [micro_batch, S] begin in the flattened micro-batch, and its length; int32 [documents + 1].

    What variable-length attention kernels call cumulative sequence lengths.
    """
    first = document_starts == torch.arange(document_starts.shape[1], device=document_starts.device)
    bounds = first.flatten().nonzero().flatten()
    return torch.cat([bounds, bounds.new_tensor([document_starts.numel()])]).to(torch.int32)


class BatchLoader:
    """Training micro-batches of one data-parallel rank, read ahead by a thread.

    The micro-batches of all ranks, taken together and in turn, are the samples start_sample, start_sample + 1, ...
    Hence a step consumes the same samples for any number of ranks, and a run resumes with the sample after the last.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        *,
        global_batch_samples: int,
        micro_batch_samples: int,
        data_rank: int,
        data_size: int,
        vocab_size: int,
        start_sample: int = 0,
        prefetch_batches: int = 2,
    ) -> None:
        """Raises DataError unless micro_batch_samples * data_size divides global_batch_samples."""
        self._stride_samples = micro_batch_samples * data_size
        if global_batch_samples % self._stride_samples:
            raise DataError(
                f"a global batch of {global_batch_samples} samples cannot be split into micro-batches of "
                f"{micro_batch_samples} on {data_size} data-parallel ranks; "
                f"make it a multiple of {self._stride_samples}"
            )
        self.micro_batches_per_step = global_batch_samples // self._stride_samples
        self.consumed_samples = start_sample
        first = start_sample + data_rank * micro_batch_samples
        slices = (range(n, n + micro_batch_samples) for n in itertools.count(first, self._stride_samples))
        self._error: BaseException | None = None
        self._ready = queue.Queue(maxsize=prefetch_batches)
        stop = threading.Event()
        batches = (_read_batch(dataset, numbers, vocab_size=vocab_size) for numbers in slices)
        # The thread must not refer to this loader, or a forgotten loader would keep itself alive.
        thread = threading.Thread(target=_produce, args=(batches, self._ready, stop), name="prefetch", daemon=True)
        thread.start()
        self.close: Callable[[], None] = weakref.finalize(self, _stop, thread, self._ready, stop)

    def next_micro_batch(self) -> Batch:
        """This rank's next micro-batch; `consumed_samples` then includes those of all ranks.

        Raises DataError for an id outside the vocabulary and past the last sample, and whatever reading raises.
        """
        if self._error is None:
            if not self.close.alive:
                raise RuntimeError("next_micro_batch after close")
            item = self._ready.get()
            if isinstance(item, Batch):
                self.consumed_samples += self._stride_samples
                return item
            self._error = item
        raise self._error


def validation_batches(
    dataset: SampleDataset,
    *,
    num_samples: int,
    micro_batch_samples: int,
    data_rank: int,
    data_size: int,
    vocab_size: int,
) -> Iterator[ValidationBatch]:
    """One rank's share of the first `num_samples` samples; over all ranks each occurs once with weight 1.

    Every rank gets the same number of batches, since forward passes may be collective: what is missing at the end
    repeats the last sample with weight 0. Raises DataError for an id outside the vocabulary.
    """
    num_samples = min(num_samples, len(dataset))
    for first in range(0, num_samples, micro_batch_samples * data_size):
        start = first + data_rank * micro_batch_samples
        wanted = range(start, start + micro_batch_samples)
        numbers = [min(number, num_samples - 1) for number in wanted]
        batch = _read_batch(dataset, numbers, vocab_size=vocab_size)
        weights = torch.tensor([float(number < num_samples) for number in wanted])
        yield ValidationBatch(batch, weights)


def _read_batch(dataset: SampleDataset, numbers: range | list[int], *, vocab_size: int) -> Batch:
    if numbers[-1] >= len(dataset):
        raise DataError(f"sample {numbers[-1]} was asked for, but the dataset was built with {len(dataset)} samples")
    samples = [dataset[number] for number in numbers]
    starts = [sample.document_starts for sample in samples]
    batch = Batch(
        tokens=torch.stack([sample.tokens for sample in samples]),
        labels=torch.stack([sample.labels for sample in samples]),
        document_starts=torch.stack(starts) if starts[0] is not None else None,
    )
    # Labels are the tokens one later, so the first token is the only one that they lack.
    lowest = min(batch.labels.min(), batch.tokens[:, 0].min())
    highest = max(batch.labels.max(), batch.tokens[:, 0].max())
    if lowest < 0 or highest >= vocab_size:
        _raise_bad_id(dataset, numbers, batch, vocab_size=vocab_size)
    return batch


def _raise_bad_id(dataset: SampleDataset, numbers: range | list[int], batch: Batch, *, vocab_size: int) -> None:
    ids = torch.cat([batch.tokens, batch.labels], dim=1)
    row, column = ((ids < 0) | (ids >= vocab_size)).nonzero()[0].tolist()
    number = numbers[row]
    raise DataError(
        f"shard {dataset.shard_prefix(number)} holds token id {int(ids[row, column])} (in sample {number}), outside "
        f"model.vocab_size={vocab_size}; preprocess it again with the tokenizer of this model"
    )


def _produce(batches: Iterator[Batch], ready: queue.Queue, stop: threading.Event) -> None:
    try:
        for batch in batches:
            if stop.is_set():
                return
            ready.put(batch)
    except BaseException as error:
        ready.put(error)


def _stop(thread: threading.Thread, ready: queue.Queue, stop: threading.Event) -> None:
    stop.set()
    # The thread may wait for room in the queue; it stops once it has some.
    while thread.is_alive():
        while not ready.empty():
            ready.get_nowait()
        thread.join(timeout=0.01)
