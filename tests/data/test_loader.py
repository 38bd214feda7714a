import itertools
import threading
import time

import pytest
import torch
from data_support import counting_documents, write_shard

from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.dataset import Sample, build_train_dataset
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.loader import BatchLoader, cu_seqlens, validation_batches

VOCAB_SIZE = 1000


class Numbers:
    """A dataset whose sample n is filled with n."""

    def __init__(self, size: int = 64, *, bad: dict | None = None) -> None:
        self._size = size
        self._bad = bad or {}
        self.reads = []

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, number: int):
        self.reads.append(number)
        if number in self._bad:
            raise self._bad[number]
        return Sample(torch.full((4,), number), torch.full((4,), number + 1), None)

    def shard_prefix(self, number: int) -> str:
        return "shard"


def _loader(dataset, **options) -> BatchLoader:
    defaults = {"global_batch_samples": 8, "micro_batch_samples": 2, "data_rank": 0, "data_size": 1}
    return BatchLoader(dataset, **{**defaults, "vocab_size": VOCAB_SIZE, **options})


def _numbers(loader, micro_batches: int) -> list[int]:
    return [int(row[0]) for _ in range(micro_batches) for row in loader.next_micro_batch().tokens]


@pytest.mark.parametrize(("data_size", "micro_batch_samples"), [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2)])
def test_steps_consume_the_same_samples_for_any_number_of_ranks(data_size, micro_batch_samples):
    loaders = [
        _loader(Numbers(), micro_batch_samples=micro_batch_samples, data_rank=rank, data_size=data_size)
        for rank in range(data_size)
    ]
    for step in range(4):
        per_step = loaders[0].micro_batches_per_step
        assert per_step * data_size * micro_batch_samples == 8
        numbers = [number for loader in loaders for number in _numbers(loader, per_step)]
        assert sorted(numbers) == list(range(8 * step, 8 * step + 8))
        assert [loader.consumed_samples for loader in loaders] == [8 * step + 8] * data_size


def test_batches_are_int64():
    batch = _loader(Numbers()).next_micro_batch()
    assert batch.tokens.tolist() == [[0] * 4, [1] * 4]
    assert batch.labels.tolist() == [[1] * 4, [2] * 4]
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64


@pytest.mark.parametrize("start", [0, 2, 7, 8, 40])
def test_resuming_continues_the_uninterrupted_sequence(tmp_path, start):
    config = DataConfig(train=write_shard(tmp_path / "d", counting_documents(80)), sequence_length=8)
    dataset = build_train_dataset(config, num_samples=80, seed=0)

    def rows(loader, micro_batches):
        return [row.tolist() for _ in range(micro_batches) for row in loader.next_micro_batch().tokens]

    whole = rows(_loader(dataset, vocab_size=60_000, micro_batch_samples=1), 64)
    resumed = _loader(dataset, vocab_size=60_000, micro_batch_samples=1, start_sample=start)
    assert rows(resumed, 24) == whole[start : start + 24]
    assert resumed.consumed_samples == start + 24


def test_global_batch_must_divide():
    with pytest.raises(DataError, match=r"8 samples cannot be split into micro-batches of 3 on 2 .*multiple of 6"):
        _loader(Numbers(), micro_batch_samples=3, data_size=2)


def test_the_end_of_the_data_is_an_error_only_when_reached():
    loader = _loader(Numbers(10))
    assert _numbers(loader, 5) == list(range(10))
    for _ in range(2):
        with pytest.raises(DataError, match="sample 11 was asked for, but the dataset was built with 10"):
            loader.next_micro_batch()
    assert loader.consumed_samples == 10


def test_errors_of_the_thread_reach_the_consumer_in_turn():
    loader = _loader(Numbers(bad={5: RuntimeError("disk on fire")}))
    assert _numbers(loader, 2) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="disk on fire"):
        loader.next_micro_batch()


@pytest.mark.parametrize(("vocab_size", "bad_id", "sample"), [(7, 7, 6), (1, 1, 0)])
def test_ids_outside_the_vocabulary_are_named(vocab_size, bad_id, sample):
    loader = _loader(Numbers(), vocab_size=vocab_size)
    message = rf"shard shard holds token id {bad_id} \(in sample {sample}\), outside model.vocab_size={vocab_size};"
    with pytest.raises(DataError, match=message):
        _numbers(loader, 4)


@pytest.mark.parametrize("bad_id", [-1, VOCAB_SIZE])
def test_the_first_token_is_checked_although_no_label_repeats_it(bad_id):
    class BadStart(Numbers):
        def __getitem__(self, number):
            return Sample(torch.tensor([bad_id, 1]), torch.tensor([1, 2]), None)

    with pytest.raises(DataError, match=f"token id {bad_id} "):
        _loader(BadStart()).next_micro_batch()


def test_negative_ids_are_refused(tmp_path):
    prefix = write_shard(tmp_path / "d", [[1] * 40, [1] * 40], vocab_size=70_000)
    content = bytearray((tmp_path / "d.bin").read_bytes())
    content[0:4] = (-1).to_bytes(4, "little", signed=True)
    (tmp_path / "d.bin").write_bytes(content)
    config = DataConfig(train=prefix, sequence_length=8)
    loader = _loader(build_train_dataset(config, num_samples=8, seed=0))
    with pytest.raises(DataError, match=f"shard {prefix} holds token id -1"):
        _numbers(loader, 4)


def _prefetch_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("how", ["close", "forget"])
def test_the_thread_reads_ahead_a_bounded_number_and_ends(how):
    before = _prefetch_threads()
    dataset = Numbers()
    loader = _loader(dataset, micro_batch_samples=1, prefetch_batches=3)
    deadline_s = time.monotonic() + 5
    while len(dataset.reads) < 4 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    time.sleep(0.05)
    assert dataset.reads == [0, 1, 2, 3]  # three in the queue and one in hand
    assert _prefetch_threads() == before + 1
    if how == "close":
        loader.close()
        with pytest.raises(RuntimeError, match="after close"):
            loader.next_micro_batch()
    else:
        del loader
    assert _prefetch_threads() == before


@pytest.mark.parametrize("data_size", [1, 2, 4])
@pytest.mark.parametrize("num_samples", [1, 5, 8, 100])
def test_validation_covers_each_sample_once_with_equal_passes(data_size, num_samples):
    dataset = Numbers(21)
    options = {"num_samples": num_samples, "micro_batch_samples": 2, "data_size": data_size, "vocab_size": VOCAB_SIZE}
    ranks = [list(validation_batches(dataset, data_rank=rank, **options)) for rank in range(data_size)]
    assert len({len(batches) for batches in ranks}) == 1
    counted, shapes = [], set()
    for batch, weights in (item for batches in ranks for item in batches):
        shapes.add(tuple(batch.tokens.shape))
        assert set(weights.tolist()) <= {0.0, 1.0}
        counted += [int(row[0]) for row, weight in zip(batch.tokens, weights, strict=True) if weight]
    assert sorted(counted) == list(range(min(num_samples, 21)))
    assert shapes == {(2, 4)}


def test_validation_checks_ids():
    with pytest.raises(DataError, match="token id 3"):
        list(
            validation_batches(Numbers(), num_samples=8, micro_batch_samples=2, data_rank=0, data_size=1, vocab_size=3)
        )


def test_document_starts_tell_where_each_token_s_document_begins(tmp_path):
    documents = counting_documents(60)
    prefix = write_shard(tmp_path / "d", documents)
    first_of = {int(token): int(document[0]) for document in documents for token in document}
    options = {"train": prefix, "sequence_length": 32}
    dataset = build_train_dataset(DataConfig(**options, reset_at_document=True), num_samples=16, seed=0)
    batch = _loader(dataset, vocab_size=60_000).next_micro_batch()
    for tokens, starts in zip(batch.tokens.tolist(), batch.document_starts.tolist(), strict=True):
        own = [first_of[token] for token in tokens]
        assert starts == [own.index(document) for document in own]
    bounds = cu_seqlens(batch.document_starts)
    assert bounds.dtype == torch.int32
    lengths = [len(list(run)) for row in batch.document_starts.tolist() for _, run in itertools.groupby(row)]
    assert bounds.tolist() == list(itertools.accumulate(lengths, initial=0))

    without = build_train_dataset(DataConfig(**options), num_samples=16, seed=0)
    assert _loader(without, vocab_size=60_000).next_micro_batch().document_starts is None
