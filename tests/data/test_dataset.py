import os
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from data_support import counting_documents, listing, write_jsonl, write_shard

from sambalm.data_pipeline import dataset as module
from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.dataset import build_train_dataset, build_validation_dataset
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.preprocess import preprocess

S = 16


def _samples(dataset) -> list[tuple[list[int], list[int]]]:
    return [(dataset[number].tokens.tolist(), dataset[number].labels.tolist()) for number in range(len(dataset))]


def _ids(dataset) -> set[int]:
    return {token for tokens, labels in _samples(dataset) for token in (*tokens, *labels)}


def _config(prefixes, **options) -> DataConfig:
    return DataConfig(train=prefixes, **{"sequence_length": S, "validation_fraction": 0.1, **options})


def _stream(samples) -> list[int]:
    """One epoch's samples put back in order: each ends, in its last label, with the first token of the next."""
    starting = {tokens[0]: (tokens, labels) for tokens, labels in samples}
    (first,) = set(starting) - {labels[-1] for _, labels in samples}
    stream = [first]
    while stream[-1] in starting:
        stream += starting.pop(stream[-1])[1]
    assert not starting
    return stream


def test_one_epoch_is_a_concatenation_of_the_training_documents(tmp_path):
    documents = counting_documents(200)
    config = _config(write_shard(tmp_path / "d", documents))
    train = [d.tolist() for d in documents[:180]]
    epoch = (sum(map(len, train)) - 1) // S
    dataset = build_train_dataset(config, num_samples=epoch, seed=1)
    samples = _samples(dataset)
    assert dataset[0][0].dtype == dataset[0][1].dtype == torch.int64
    assert len(samples) == epoch
    assert all(tokens[1:] == labels[:-1] and len(tokens) == S for tokens, labels in samples)

    stream = _stream(samples)
    by_start = {document[0]: document for document in train}
    expected, rest = [], list(stream)
    while rest:
        document = by_start.pop(rest[0])
        expected += document
        rest = rest[len(document) :]
    assert expected[: len(stream)] == stream  # whole documents, each once, but for the end of the last
    assert len(stream) == epoch * S + 1
    assert stream != sorted(stream)


def test_held_out_documents_are_the_last_and_never_trained_on(tmp_path):
    documents = counting_documents(200)
    config = _config(write_shard(tmp_path / "d", documents))
    held_out = set(np.concatenate(documents[180:]).tolist())
    assert not _ids(build_train_dataset(config, num_samples=1000, seed=0)) & held_out
    for multiple in (1, 2, 4):
        dataset = build_validation_dataset(config, num_samples=10**6, seed=0, length_multiple=multiple)
        samples = _samples(dataset)
        assert len(dataset) == len(samples) == (len(held_out) - 1) // (S * multiple)
        assert all(len(tokens) == len(labels) == S * multiple for tokens, labels in samples)
        assert _ids(dataset) <= held_out
        # No token is predicted twice, and none is padding.
        targets = Counter(label for _, labels in samples for label in labels)
        assert set(targets.values()) == {1}
        assert all(dataset._dataset[number]["loss_mask"].all() for number in range(len(dataset)))
    assert len(build_validation_dataset(config, num_samples=3, seed=0)) == 3
    with pytest.raises(IndexError):
        build_validation_dataset(config, num_samples=3, seed=0)[3]


def test_several_epochs_and_seeds(tmp_path):
    documents = counting_documents(100)
    config = _config(write_shard(tmp_path / "d", documents))
    tokens = sum(map(len, documents[:90]))
    three_epochs = (3 * tokens - 1) // S
    samples = _samples(build_train_dataset(config, num_samples=three_epochs, seed=0))
    counts = Counter(token for sample, _ in samples for token in sample)
    assert len(counts) == tokens
    assert set(counts.values()) <= {2, 3}
    assert sum(counts.values()) == three_epochs * S

    first, again, other = (_samples(build_train_dataset(config, num_samples=40, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_tiny_validation_fraction_still_holds_out_a_document(tmp_path):
    documents = [np.arange(60) + 60 * n for n in range(5)]
    config = _config(write_shard(tmp_path / "d", documents), validation_fraction=0.001)
    assert _ids(build_validation_dataset(config, num_samples=9, seed=0)) <= set(documents[-1].tolist())


def _sizes(config, num_samples, seed=0) -> Counter:
    """How many samples come from which block of 10,000 ids; the shards below have one each."""
    return Counter(t[0] // 10_000 for t, _ in _samples(build_train_dataset(config, num_samples=num_samples, seed=seed)))


def test_blends_draw_by_tokens_or_by_weight(tmp_path):
    prefixes = [
        write_shard(tmp_path / str(n), counting_documents(size, start=10_000 * n))
        for n, size in enumerate([300, 100, 100])
    ]
    train_tokens = [sum(map(len, counting_documents(size)[: round(size * 0.9)])) for size in (300, 100, 100)]
    by_tokens = _sizes(_config(prefixes), 400)
    assert sum(by_tokens.values()) == 400
    for number, tokens in enumerate(train_tokens):
        assert abs(by_tokens[number] - 400 * tokens / sum(train_tokens)) <= 1
    weighted = [{"prefix": prefixes[0], "weight": 1}, {"prefix": prefixes[1], "weight": 3}]
    assert _sizes(_config(weighted), 400) == {0: 100, 1: 300}


def test_shards_of_a_weighted_prefix_share_its_weight_by_tokens(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["stone river harbour"] * 600)
    preprocess([path], tokenizer=tokenizer.path, output_prefix=tmp_path / "many", shard_tokens=800)
    other = write_shard(tmp_path / "other", counting_documents(50, start=10_000))
    sources = [{"prefix": str(tmp_path / "many"), "weight": 1}, {"prefix": other, "weight": 1}]
    dataset = build_train_dataset(_config(sources), num_samples=300, seed=0)
    drawn = Counter(dataset.shard_prefix(number) for number in range(300))
    assert drawn.pop(other) == 150
    assert len(drawn) > 2
    assert sum(drawn.values()) == 150
    full = [drawn[str(tmp_path / f"many_{n:05d}")] for n in range(len(drawn) - 1)]
    assert max(full) - min(full) <= 1


@pytest.mark.parametrize("num_samples", [1, 2, 3, 7, 50])
def test_small_blends_of_many_shards_are_not_oversampled(tmp_path, num_samples):
    prefixes = [write_shard(tmp_path / str(n), counting_documents(5 + 7 * n, start=3000 * n)) for n in range(12)]
    assert len(_samples(build_train_dataset(_config(prefixes), num_samples=num_samples, seed=0))) == num_samples


def test_blends_never_draw_more_than_is_built():
    from megatron.core.datasets.helpers import build_blending_indices

    random = np.random.RandomState(0)
    for _ in range(200):
        weights = random.pareto(0.7, size=random.randint(2, 20)) + 1e-3
        shares, num_samples = weights / weights.sum(), random.randint(1, 300)
        drawn_from, numbers = np.zeros(num_samples, dtype=np.int16), np.zeros(num_samples, dtype=np.int64)
        build_blending_indices(drawn_from, numbers, shares, len(shares), num_samples, False)
        counts = np.bincount(drawn_from, minlength=len(shares))
        assert (counts <= module._blend_sizes(shares, num_samples=num_samples)).all()


def test_validation_keeps_proportions_while_the_held_out_part_lasts(tmp_path):
    prefixes = [write_shard(tmp_path / str(n), counting_documents(400, start=10_000 * n)) for n in range(2)]
    weighted = [{"prefix": prefixes[0], "weight": 3}, {"prefix": prefixes[1], "weight": 1}]
    dataset = build_validation_dataset(_config(weighted), num_samples=40, seed=0)
    assert Counter(t[0] // 10_000 for t, _ in _samples(dataset)) == {0: 30, 1: 10}
    everything = build_validation_dataset(_config(weighted), num_samples=10**6, seed=0)
    counts = Counter(t[0] // 10_000 for t, _ in _samples(everything))
    assert counts[0] == counts[1] > 40
    assert len(everything) == counts.total()


def test_allocation():
    def allocate(asked, shares, available):
        return module._allocate(asked, shares=np.array(shares), available=np.array(available)).tolist()

    assert allocate(10, [0.5, 0.5], [100, 100]) == [5, 5]
    assert allocate(10, [0.9, 0.1], [2, 100]) == [2, 8]
    assert allocate(10, [0.5, 0.5], [2, 3]) == [2, 3]
    assert allocate(1, [0.2, 0.5, 0.3], [9, 9, 9]) == [0, 1, 0]
    assert allocate(0, [1.0], [5]) == [0]


def test_parts_too_short_for_a_sample_are_refused(tmp_path):
    # One token less than a sample and its last label need, in both parts.
    short = write_shard(tmp_path / "short", [[1] * S, [2] * S])
    with pytest.raises(DataError, match=r"no shard of .*short has 17 training tokens, .*lower data\.sequence_length"):
        build_train_dataset(_config(short), num_samples=1, seed=0)
    for multiple, tokens in ((1, 17), (2, 33)):
        message = rf"{tokens} held-out tokens.*data\.validation_fraction \(now 0\.1\)"
        with pytest.raises(DataError, match=message):
            build_validation_dataset(_config(short), num_samples=1, seed=0, length_multiple=multiple)
    assert listing(tmp_path) == ["short.bin", "short.idx"]
    exact = write_shard(tmp_path / "exact", [[1] * (S + 1), [2] * (S + 1)])
    assert len(build_train_dataset(_config(exact), num_samples=5, seed=0)) == 5
    assert len(build_validation_dataset(_config(exact), num_samples=5, seed=0)) == 1


def test_truncated_shard_is_refused(tmp_path):
    prefix = write_shard(tmp_path / "d", counting_documents(50))
    config = _config(prefix)
    build_train_dataset(config, num_samples=5, seed=0)
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"d\.bin has 100 bytes"):
        build_train_dataset(config, num_samples=5, seed=0)


@pytest.mark.parametrize("with_manifest", [True, False])
def test_new_data_under_an_old_prefix_is_not_read_with_the_old_index(tmp_path, tokenizer, with_manifest):
    config = _config(str(tmp_path / "d"))

    def write(start):
        documents = counting_documents(80, start=start, seed=start)
        if with_manifest:
            texts = [" ".join(map(str, document)) for document in documents]
            path = write_jsonl(tmp_path / "a.jsonl", texts)
            preprocess([path], tokenizer=tokenizer.path, output_prefix=tmp_path / "d", overwrite=True)
        else:
            write_shard(tmp_path / "d", documents)
        return _samples(build_train_dataset(config, num_samples=60, seed=0))

    write(0)
    samples = write(5000)
    elsewhere = config.model_copy(update={"cache_dir": str(tmp_path / "elsewhere")})
    assert samples == _samples(build_train_dataset(elsewhere, num_samples=60, seed=0))
    assert len(list((tmp_path / ".index_cache").iterdir())) == 2


def test_the_cache_is_reused_and_whole_or_absent(tmp_path, monkeypatch):
    config = _config(write_shard(tmp_path / "d", counting_documents(50)), cache_dir=str(tmp_path / "cache"))
    expected = _samples(build_train_dataset(config, num_samples=20, seed=0))
    before = listing(tmp_path)
    written = []
    monkeypatch.setattr(np, "save", lambda *arguments, **options: written.append(arguments))
    assert _samples(build_train_dataset(config, num_samples=20, seed=0)) == expected
    assert written == []

    def fill_the_disk(path, *arguments, **options):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fill_the_disk)
    with pytest.raises(DataError, match=r"cannot write the index cache .*cache: No space left .*data\.cache_dir"):
        build_train_dataset(config, num_samples=21, seed=0)
    assert listing(tmp_path) == before


def test_megatron_is_quiet(tmp_path, capfd, caplog):
    prefixes = [write_shard(tmp_path / str(n), counting_documents(50)) for n in range(2)]
    with caplog.at_level("INFO"):
        build_train_dataset(_config(prefixes), num_samples=20, seed=0)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


class Intruder:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("as_array", [False, True])
def test_a_cache_that_somebody_else_made_is_not_executed(as_array, tmp_path):
    config = _config(write_shard(tmp_path / "tokens", counting_documents(50)))
    build_train_dataset(config, num_samples=20, seed=0)
    for path in config.cache_path.glob("*/*.npy"):
        content = pickle.dumps(Intruder(tmp_path / "executed"))
        path.write_bytes(content)
        if as_array:
            np.save(path, np.array([Intruder(tmp_path / "executed")], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"\.npy is not an array of numbers; remove"):
        build_train_dataset(config, num_samples=20, seed=0)
    assert not (tmp_path / "executed").exists()


def test_configuration():
    with pytest.raises(ValueError, match="mixes entries with and without a weight"):
        _config(["a", {"prefix": "b", "weight": 1}])
    with pytest.raises(ValueError, match=r"data.train is \[\]"):
        _config([])
    for bad in ({"validation_fraction": 0}, {"validation_fraction": 1}, {"sequence_length": 0}, {"unknown": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            _config("a", **bad)
    with pytest.raises(ValueError, match="weight"):
        _config([{"prefix": "a", "weight": 0}])
    assert all(field.description for field in DataConfig.model_fields.values())
    assert _config("runs/a/d").cache_path.as_posix() == "runs/a/.index_cache"
    assert _config(["a", "b"]).tokenizer_path() is None


def _rank(rank: int, directory: str, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1")
    store = torch.distributed.FileStore(f"{directory}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    config = _config([f"{directory}/0", f"{directory}/1"])
    train = _samples(build_train_dataset(config, num_samples=50, seed=0))
    validation = _samples(build_validation_dataset(config, num_samples=9, seed=0))
    failure = None
    try:
        # Only rank 0 writes the cache, and only there can that fail.
        build_train_dataset(config.model_copy(update={"cache_dir": f"{directory}/0.bin"}), num_samples=50, seed=0)
    except DataError as error:
        failure = str(error)
    results[rank] = (train, validation, failure)
    torch.distributed.destroy_process_group()


def test_two_ranks_get_the_samples_of_one(tmp_path):
    prefixes = [write_shard(tmp_path / str(n), counting_documents(100, start=10_000 * n)) for n in range(2)]
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_rank, args=(str(tmp_path), results), nprocs=2)
        (train, validation, failure), second = results[0], results[1]
    assert (train, validation, failure) == second
    assert "cannot write the index cache" in failure
    config = _config(prefixes)
    assert train == _samples(build_train_dataset(config, num_samples=50, seed=0))
    assert validation == _samples(build_validation_dataset(config, num_samples=9, seed=0))
