import itertools
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.dataset import Sample, TrainDataset, build_train_dataset
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.loader import BatchLoader, validation_batches
from sambalm.data_pipeline.sources import open_sources
from tests.support.data import counting_documents, write_shard

VOCAB_SIZE = 1000


class Numbers:
    """A dataset whose sample n is filled with n; samples in `bad` raise, those in `slow` wait before they come."""

    def __init__(self, size: int = 64, *, bad: dict | None = None, slow: dict | None = None) -> None:
        self._size = size
        self._bad, self._slow = bad or {}, slow or {}
        self.reads = []

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, number: int):
        self.reads.append(number)
        time.sleep(self._slow.get(number, 0))
        if number in self._bad:
            raise self._bad[number]
        return Sample(torch.full((4,), number), torch.full((4,), number + 1), None)

    def source_number(self, number: int) -> int:
        return number % 3

    def token_place(self, number: int, position: int) -> tuple[str, int]:
        return "shard.bin", 10 * number + position


def _loader(dataset, **options) -> BatchLoader:
    defaults = {"make_batch": SimpleNamespace, "micro_batch_samples": 2, "data_rank": 0, "data_size": 1}
    return BatchLoader(dataset, **{**defaults, "vocab_size": VOCAB_SIZE, **options})


def _numbers(loader, micro_batches: int) -> list[int]:
    return [int(row[0]) for _ in range(micro_batches) for row in loader.next_micro_batch().tokens]


def _dataset(tmp_path, **options) -> TrainDataset:
    prefixes = [write_shard(tmp_path / str(n), counting_documents(80, start=10_000 * n)) for n in range(2)]
    config = DataConfig(train=prefixes, sequence_length=8, **options)
    return build_train_dataset(config, open_sources(config), seed=0)


def _in_turn(loaders: list[BatchLoader], micro_batches: int) -> list[int]:
    return [number for _ in range(micro_batches) for loader in loaders for number in _numbers(loader, 1)]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("data_size", "micro_batch_samples"), [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2)])
def test_ranks_in_turn_read_every_sample_in_order(data_size, micro_batch_samples, workers):
    slow = {number: 0.001 * (number % 3) for number in range(64)}  # threads that finish out of turn
    options = {"micro_batch_samples": micro_batch_samples, "data_size": data_size, "workers": workers}
    loaders = [_loader(Numbers(slow=slow), data_rank=rank, **options) for rank in range(data_size)]
    assert _in_turn(loaders, 32 // (data_size * micro_batch_samples)) == list(range(32))
    assert [loader.consumed_samples for loader in loaders] == [32] * data_size


def test_batches_are_int64():
    batch = _loader(Numbers()).next_micro_batch()
    assert batch.tokens.tolist() == [[0] * 4, [1] * 4]
    assert batch.labels.tolist() == [[1] * 4, [2] * 4]
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64


@pytest.mark.parametrize("start", [0, 2, 7, 8, 40])
def test_resuming_continues_the_uninterrupted_sequence(tmp_path, start):
    dataset = _dataset(tmp_path)

    def rows(loader, micro_batches):
        return [row.tolist() for _ in range(micro_batches) for row in loader.next_micro_batch().tokens]

    whole = rows(_loader(dataset, vocab_size=60_000, micro_batch_samples=1), 64)
    resumed = _loader(dataset, vocab_size=60_000, micro_batch_samples=1, start_sample=start)
    assert rows(resumed, 24) == whole[start : start + 24]
    assert resumed.consumed_samples == start + 24


def test_a_run_handed_from_layout_to_layout_reads_on_where_it_stopped():
    """Other numbers of ranks and threads and other micro-batches after each stop, whatever was read ahead."""
    sample, read = 0, []
    for data_size, micro_batch_samples, workers in [(1, 2, 1), (2, 1, 2), (4, 3, 4), (1, 1, 3), (3, 2, 1)]:
        loaders = [
            _loader(
                Numbers(1000),
                data_rank=rank,
                data_size=data_size,
                micro_batch_samples=micro_batch_samples,
                workers=workers,
                start_sample=sample,
            )
            for rank in range(data_size)
        ]
        read += _in_turn(loaders, 3)
        (sample,) = {loader.consumed_samples for loader in loaders}
        for loader in loaders:
            loader.close()
    assert read == list(range(sample))
    assert sample == 3 * (2 + 2 + 12 + 1 + 6)


def test_errors_of_a_thread_reach_the_consumer_in_turn():
    loader = _loader(Numbers(bad={5: RuntimeError("disk on fire")}), workers=3)
    assert _numbers(loader, 2) == [0, 1, 2, 3]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="disk on fire"):
            loader.next_micro_batch()
    assert loader.consumed_samples == 4


@pytest.mark.parametrize(("vocab_size", "bad_id", "sample", "byte"), [(7, 7, 6, 61), (1, 1, 0, 1)])
def test_ids_outside_the_vocabulary_are_named(vocab_size, bad_id, sample, byte):
    loader = _loader(Numbers(), vocab_size=vocab_size)
    message = rf"shard\.bin holds token id {bad_id} at byte {byte} \(in sample {sample}\), outside model.vocab_size="
    with pytest.raises(DataError, match=message):
        _numbers(loader, 4)


@pytest.mark.parametrize("bad_id", [-1, VOCAB_SIZE])
def test_the_first_token_is_checked_although_no_label_repeats_it(bad_id):
    class BadStart(Numbers):
        def __getitem__(self, number):
            return Sample(torch.tensor([bad_id, 1]), torch.tensor([1, 2]), None)

    with pytest.raises(DataError, match=f"token id {bad_id} at byte 0 "):
        _loader(BadStart()).next_micro_batch()


def test_a_bad_id_s_byte_is_where_the_file_has_it(tmp_path):
    """Where data.verify is off, the loader is the only check."""
    documents = [list(range(1, 41)), list(range(41, 81))]
    prefix = write_shard(tmp_path / "d", documents, vocab_size=70_000)
    content = bytearray((tmp_path / "d.bin").read_bytes())
    content[4 * 11 : 4 * 12] = (-1).to_bytes(4, "little", signed=True)
    (tmp_path / "d.bin").write_bytes(content)
    config = DataConfig(train=prefix, sequence_length=8, verify=False)
    loader = _loader(build_train_dataset(config, open_sources(config), seed=0))
    with pytest.raises(DataError, match=rf"{prefix}\.bin holds token id -1 at byte 44 "):
        _numbers(loader, 4)


def _loader_threads() -> int:
    return sum(thread.name.startswith("loader") for thread in threading.enumerate())


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("how", ["close", "forget"])
def test_threads_read_ahead_a_bounded_number_and_end(how, workers):
    before = _loader_threads()
    dataset, deadline_s = Numbers(), time.monotonic() + 30
    loader = _loader(dataset, micro_batch_samples=1, workers=workers)

    def reads(number: int) -> list[int]:
        while len(dataset.reads) < number and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(0.05)  # for one more, which would be too many
        return sorted(dataset.reads)

    assert reads(workers + 1) == list(range(workers + 1))
    _numbers(loader, 1)
    assert reads(workers + 2) == list(range(workers + 2))
    if how == "close":
        loader.close()
        with pytest.raises(RuntimeError, match="after close"):
            loader.next_micro_batch()
    else:
        del loader
        while _loader_threads() > before and time.monotonic() < deadline_s:
            time.sleep(0.01)
    assert _loader_threads() == before


@pytest.mark.parametrize("data_size", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 5, 8, 21])
def test_validation_covers_each_sample_once_with_equal_passes(data_size, size):
    dataset = Numbers(size)
    options = {
        "make_batch": SimpleNamespace,
        "micro_batch_samples": 2,
        "data_size": data_size,
        "vocab_size": VOCAB_SIZE,
    }
    ranks = [list(validation_batches(dataset, data_rank=rank, **options)) for rank in range(data_size)]
    assert len({len(batches) for batches in ranks}) == 1
    counted, shapes = [], set()
    for batch, weights, sources in (item for batches in ranks for item in batches):
        shapes.add(tuple(batch.tokens.shape))
        assert set(weights.tolist()) <= {0.0, 1.0}
        rows = batch.tokens[:, 0].tolist()
        assert sources.tolist() == [row % 3 for row in rows]
        counted += [row for row, weight in zip(rows, weights.tolist(), strict=True) if weight]
    assert sorted(counted) == list(range(size))
    assert shapes == {(2, 4)}


def test_validation_checks_ids():
    options = {"make_batch": SimpleNamespace, "micro_batch_samples": 2}
    with pytest.raises(DataError, match="token id 3"):
        list(validation_batches(Numbers(), **options, data_rank=0, data_size=1, vocab_size=3))


def test_document_starts_are_given_where_documents_are_reset(tmp_path):
    batch = _loader(
        _dataset(tmp_path, reset_at_document=True), vocab_size=60_000, micro_batch_samples=8
    ).next_micro_batch()
    rows = batch.document_starts.tolist()
    assert sum(len(list(itertools.groupby(row))) for row in rows) > len(rows)
    assert _loader(_dataset(tmp_path), vocab_size=60_000).next_micro_batch().document_starts is None
