"""Micro-batches in a global order that depends on sample numbers only, not on how many ranks or threads read them."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import torch

from .dataset import Samples, ValidationDataset
from .errors import DataError

B = TypeVar("B")
MakeBatch = Callable[..., B]
"""Makes a micro-batch of the keywords tokens and labels, int64 [micro_batch, S], document_starts, the same or None: for
each token the position in its row of the first token of its document, 0 where that began in an earlier sample; and
loss_weights, float32 [micro_batch, S] or None: 1 for a label that counts in the loss."""


class ValidationBatch(NamedTuple, Generic[B]):
    """A micro-batch and of each row [micro_batch] its weight, float32, 0 where it must not count, and its source."""

    batch: B
    weights: torch.Tensor
    sources: torch.Tensor


class BatchLoader(Generic[B]):
    """Training micro-batches of one data-parallel rank, a bounded number of which threads read ahead.

    The micro-batches of all ranks, taken together and in turn, are the samples start_sample, start_sample + 1, ...
    Hence a step consumes the same samples for any number of ranks and threads, however many samples a step has, and
    `consumed_samples` is all that a resumed run has to know.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        make_batch: MakeBatch[B],
        micro_batch_samples: int,
        data_rank: int,
        data_size: int,
        vocab_size: int,
        start_sample: int = 0,
        workers: int = 1,
    ) -> None:
        self.consumed_samples = start_sample
        self._dataset, self._make_batch, self._vocab_size = dataset, make_batch, vocab_size
        self._micro_batch_samples = micro_batch_samples
        self._stride_samples = micro_batch_samples * data_size
        self._next = start_sample + data_rank * micro_batch_samples
        self._error: BaseException | None = None
        self._closed = False
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        self._pending: deque[Future[B]] = deque()
        for _ in range(workers + 1):  # one for each thread, and one that waits
            self._read_ahead()

    def next_micro_batch(self) -> B:
        """This rank's next micro-batch; `consumed_samples` then includes those of all ranks.

        Raises DataError for an id outside the vocabulary, and whatever reading raises.
        """
        if self._closed:
            raise RuntimeError("next_micro_batch after close")
        if self._error is not None:
            raise self._error
        try:
            batch = self._pending.popleft().result()
        except Exception as error:
            self._error = error
            raise
        self._read_ahead()
        self.consumed_samples += self._stride_samples
        return batch

    def close(self) -> None:
        """Ends the threads."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)

    def _read_ahead(self) -> None:
        numbers = range(self._next, self._next + self._micro_batch_samples)
        self._next += self._stride_samples
        self._pending.append(self._pool.submit(self._read, numbers))

    def _read(self, numbers: Sequence[int]) -> B:
        return self._make_batch(**_read_rows(self._dataset, numbers, vocab_size=self._vocab_size))


def validation_batches(
    dataset: ValidationDataset,
    *,
    make_batch: MakeBatch[B],
    micro_batch_samples: int,
    data_rank: int,
    data_size: int,
    vocab_size: int,
) -> Iterator[ValidationBatch[B]]:
    """One rank's share of the samples; over all ranks each occurs once with weight 1.

    Every rank gets the same number of batches, since forward passes may be collective: what is missing at the end
    repeats the last sample with weight 0. Raises DataError for an id outside the vocabulary.
    """
    last = len(dataset) - 1
    for first in range(0, len(dataset), micro_batch_samples * data_size):
        start = first + data_rank * micro_batch_samples
        wanted = range(start, start + micro_batch_samples)
        numbers = [min(number, last) for number in wanted]
        yield ValidationBatch(
            batch=make_batch(**_read_rows(dataset, numbers, vocab_size=vocab_size)),
            weights=torch.tensor([float(number <= last) for number in wanted]),
            sources=torch.tensor([dataset.source_number(number) for number in numbers]),
        )


def _read_rows(dataset: Samples, numbers: Sequence[int], *, vocab_size: int) -> dict[str, torch.Tensor | None]:
    samples = [dataset[number] for number in numbers]
    starts = [sample.document_starts for sample in samples if sample.document_starts is not None]
    tokens, labels = (torch.stack(rows) for rows in zip(*((s.tokens, s.labels) for s in samples), strict=True))
    # Labels are the tokens one later, so the first token is the only one that they lack.
    ids = torch.cat([tokens[:, :1], labels], dim=1)
    if ids.min() < 0 or ids.max() >= vocab_size:
        _raise_bad_id(dataset, numbers, ids, vocab_size=vocab_size)
    weights = [sample.loss_weights for sample in samples if sample.loss_weights is not None]
    return {
        "tokens": tokens,
        "labels": labels,
        "document_starts": torch.stack(starts) if starts else None,
        "loss_weights": torch.stack(weights) if weights else None,
    }


def _raise_bad_id(dataset: Samples, numbers: Sequence[int], ids: torch.Tensor, *, vocab_size: int) -> None:
    row, position = ((ids < 0) | (ids >= vocab_size)).nonzero()[0].tolist()
    path, offset_bytes = dataset.token_place(numbers[row], position)
    raise DataError(
        f"{path} holds token id {int(ids[row, position])} at byte {offset_bytes} (in sample {numbers[row]}), outside "
        f"model.vocab_size={vocab_size}; restore the shard, or preprocess the data with the tokenizer of this model"
    )
