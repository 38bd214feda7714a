import functools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from sambalm.data_pipeline import dataset as module
from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.sources import open_sources
from tests.support.data import counting_documents, write_jsonl, write_shard

S = 16


def build_train_dataset(config: DataConfig, *, seed: int) -> module.TrainDataset:
    return module.build_train_dataset(config, open_sources(config), seed=seed)


def build_validation_dataset(config: DataConfig, **options) -> module.ValidationDataset:
    return module.build_validation_dataset(config, open_sources(config), **options)


def _samples(dataset, numbers=None) -> list[tuple[list[int], list[int]]]:
    numbers = range(len(dataset)) if numbers is None else range(numbers)
    return [(dataset[number].tokens.tolist(), dataset[number].labels.tolist()) for number in numbers]


def _ids(samples) -> set[int]:
    return {token for tokens, labels in samples for token in (*tokens, *labels)}


def _config(prefixes, **options) -> DataConfig:
    return DataConfig(train=prefixes, **{"sequence_length": S, "validation_fraction": 0.1, **options})


def test_an_epoch_is_the_training_documents_cut_into_samples_each_once(tmp_path):
    documents = counting_documents(200)
    config = _config(write_shard(tmp_path / "d", documents))
    tokens = sum(map(len, documents[:180]))
    per_epoch = (tokens - 1) // S
    dataset = build_train_dataset(config, seed=1)
    assert dataset[0].tokens.dtype == dataset[0].labels.dtype == torch.int64
    samples = _samples(dataset, 3 * per_epoch)
    assert all(tokens[1:] == labels[:-1] and len(tokens) == S for tokens, labels in samples)
    assert all(tokens == list(range(tokens[0], tokens[0] + S)) for tokens, _ in samples)  # the ids count up
    orders = []
    for epoch in range(3):
        starts = [tokens[0] for tokens, _ in samples[epoch * per_epoch : (epoch + 1) * per_epoch]]
        first = min(starts)
        assert first < S
        assert sorted(starts) == list(range(first, first + per_epoch * S, S))
        assert starts != sorted(starts)
        orders.append([start - first for start in starts])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_cuts_move_from_epoch_to_epoch(tmp_path):
    config = _config(write_shard(tmp_path / "d", [np.arange(10 * S), np.arange(S)]))  # 9 samples, 15 tokens to spare
    dataset = build_train_dataset(config, seed=0)
    offsets = {dataset[9 * epoch].tokens[0].item() % S for epoch in range(200)}
    assert offsets == set(range(16))  # from the first token of all to the last


def test_seeds_give_other_orders(tmp_path):
    config = _config(write_shard(tmp_path / "d", counting_documents(100)))
    first, again, other = (_samples(build_train_dataset(config, seed=seed), 40) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_sources_of_one_length_have_orders_of_their_own(tmp_path):
    sources = [write_shard(tmp_path / str(n), [np.arange(100 * S + 1) + 10_000 * n] * 2) for n in range(2)]
    dataset = build_train_dataset(_config(sources, validation_fraction=0.5), seed=0)
    orders = [[], []]
    for number in range(200):
        orders[dataset.source_number(number)].append(dataset[number].tokens[0].item() % 10_000)
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_held_out_documents_are_the_last_and_never_trained_on(tmp_path):
    documents = counting_documents(200)
    config = _config(write_shard(tmp_path / "d", documents))
    held_out = set(np.concatenate(documents[180:]).tolist())
    assert not _ids(_samples(build_train_dataset(config, seed=0), 1000)) & held_out
    for multiple in (1, 2, 4):
        dataset = build_validation_dataset(config, num_samples=10**6, length_multiple=multiple)
        samples = _samples(dataset)
        assert len(dataset) == len(samples) == (len(held_out) - 1) // (S * multiple)
        assert all(len(tokens) == len(labels) == S * multiple for tokens, labels in samples)
        assert _ids(samples) <= held_out
        # No token is predicted twice.
        targets = Counter(label for _, labels in samples for label in labels)
        assert set(targets.values()) == {1}
    assert len(build_validation_dataset(config, num_samples=3)) == 3
    with pytest.raises(IndexError):
        build_validation_dataset(config, num_samples=3)[3]


def test_a_short_validation_is_drawn_from_all_of_the_held_out_part(tmp_path):
    """A longer one adds to it: losses of both are of the same text."""
    config = _config(write_shard(tmp_path / "d", counting_documents(200)), validation_fraction=0.5)
    whole = _samples(build_validation_dataset(config, num_samples=10**6))
    few = _samples(build_validation_dataset(config, num_samples=len(whole) // 4))
    assert few == whole[: len(few)]
    first, last = min(whole)[0][0], max(whole)[0][0]
    assert max(few)[0][0] - first > (last - first) / 2


def test_tiny_validation_fraction_still_holds_out_a_document(tmp_path):
    documents = [np.arange(60) + 60 * n for n in range(5)]
    config = _config(write_shard(tmp_path / "d", documents), validation_fraction=0.001)
    assert _ids(_samples(build_validation_dataset(config, num_samples=9))) <= set(documents[-1].tolist())


def _sizes(dataset, numbers=None) -> Counter:
    """How many samples come from which block of 10,000 ids; the sources below have one each."""
    return Counter(tokens[0] // 10_000 for tokens, _ in _samples(dataset, numbers))


def test_blends_draw_by_tokens_or_by_weight(tmp_path):
    prefixes = [
        write_shard(tmp_path / str(n), counting_documents(size, start=10_000 * n))
        for n, size in enumerate([300, 100, 100])
    ]
    train_tokens = [sum(map(len, counting_documents(size)[: round(size * 0.9)])) for size in (300, 100, 100)]
    by_tokens = _sizes(build_train_dataset(_config(prefixes), seed=0), 400)
    assert sum(by_tokens.values()) == 400
    for number, tokens in enumerate(train_tokens):
        assert abs(by_tokens[number] - 400 * tokens / sum(train_tokens)) <= 2
    weighted = [{"prefix": prefixes[0], "weight": 1}, {"prefix": prefixes[1], "weight": 3}]
    dataset = build_train_dataset(_config(weighted), seed=0)
    assert _sizes(dataset, 400) == {0: 100, 1: 300}
    assert [dataset.source_number(n) for n in range(400)] == [t[0] // 10_000 for t, _ in _samples(dataset, 400)]


def test_a_source_drawn_many_times_over_begins_again(tmp_path):
    prefixes = [
        write_shard(tmp_path / "large", counting_documents(300)),
        write_shard(tmp_path / "small", counting_documents(10, start=10_000)),
    ]
    config = _config([{"prefix": prefixes[0], "weight": 1}, {"prefix": prefixes[1], "weight": 9}])
    dataset = build_train_dataset(config, seed=0)
    samples = [tokens[0] for tokens, _ in _samples(dataset, 2000) if tokens[0] >= 10_000]
    assert len(samples) == 1800
    per_epoch = (sum(map(len, counting_documents(10)[:9])) - 1) // S
    assert dataset.epochs(2000)[1] == 1800 / per_epoch
    for epoch in range(1800 // per_epoch):
        assert len(set(samples[epoch * per_epoch : (epoch + 1) * per_epoch])) == per_epoch


@pytest.mark.parametrize("held_out", [False, True])
def test_no_sample_crosses_from_one_source_into_another(tmp_path, held_out):
    prefixes = [write_shard(tmp_path / str(n), counting_documents(60, start=10_000 * n)) for n in range(5)]
    config = _config(prefixes, validation_fraction=0.4)
    if held_out:
        samples = _samples(build_validation_dataset(config, num_samples=1000))
    else:
        samples = _samples(build_train_dataset(config, seed=0), 500)
    assert all(len({token // 10_000 for token in (*tokens, *labels)}) == 1 for tokens, labels in samples)
    assert len({tokens[0] // 10_000 for tokens, _ in samples}) == 5


def test_the_order_does_not_depend_on_how_shards_cut_a_source(tmp_path, tokenizer):
    """Nor does a shard have to be as long as a sample."""
    path = write_jsonl(tmp_path / "a.jsonl", [f"stone {n} river harbour" for n in range(600)])
    found = []
    for name, shard_tokens in (("one", 10**6), ("many", 800), ("tiny", 10)):
        preprocess([path], tokenizer=tokenizer.path, output_prefix=tmp_path / name, shard_tokens=shard_tokens)
        # Each shard holds its last documents out, so that only whole sources compare.
        source = {"prefix": str(tmp_path / name), "weight": 1, "validation_fraction": 0}
        found.append(_samples(build_train_dataset(_config([source]), seed=0), 300))
    assert found[0] == found[1] == found[2]
    assert len(list(tmp_path.glob("tiny_*.bin"))) > 300


def test_validation_keeps_proportions_while_the_held_out_part_lasts(tmp_path):
    prefixes = [write_shard(tmp_path / str(n), counting_documents(400, start=10_000 * n)) for n in range(2)]
    weighted = [{"prefix": prefixes[0], "weight": 3}, {"prefix": prefixes[1], "weight": 1}]
    dataset = build_validation_dataset(_config(weighted), num_samples=40)
    assert _sizes(dataset) == {0: 30, 1: 10}
    assert dataset.source_counts() == [30, 10]
    everything = build_validation_dataset(_config(weighted), num_samples=10**6)
    counts = _sizes(everything)
    assert counts[0] == counts[1] > 40
    assert len(everything) == counts.total()
    assert [everything.source_number(n) for n in range(len(everything))] == [0] * counts[0] + [1] * counts[1]


def test_each_source_holds_out_its_own_fraction(tmp_path):
    prefixes = [write_shard(tmp_path / str(n), counting_documents(400, start=10_000 * n)) for n in range(3)]
    fractions = (None, 0.5, 0)
    sources = [
        {"prefix": prefix, "weight": 1, "validation_fraction": fraction}
        for prefix, fraction in zip(prefixes, fractions, strict=True)
    ]
    opened = open_sources(_config(sources))
    lengths = list(map(len, counting_documents(400)))
    assert [s.tokens(held_out=True) for s in opened] == [sum(lengths[360:]), sum(lengths[200:]), 0]
    assert [s.tokens(held_out=False) for s in opened] == [sum(lengths[:360]), sum(lengths[:200]), sum(lengths)]
    assert build_validation_dataset(_config(sources), num_samples=30).source_counts() == [15, 15, 0]


def test_allocation():
    def allocate(asked, shares, available):
        return module._allocate(asked, shares=np.array(shares), available=np.array(available)).tolist()

    assert allocate(10, [0.5, 0.5], [100, 100]) == [5, 5]
    assert allocate(10, [0.9, 0.1], [2, 100]) == [2, 8]
    assert allocate(10, [0.5, 0.5], [2, 3]) == [2, 3]
    assert allocate(1, [0.2, 0.5, 0.3], [9, 9, 9]) == [0, 1, 0]
    assert allocate(10, [0.98, 0.01, 0.01], [99, 99, 0]) == [9, 1, 0]
    assert allocate(0, [1.0], [5]) == [0]


def test_parts_too_short_for_a_sample_are_refused(tmp_path):
    # One token less than a sample and its last label need, in both parts.
    short = write_shard(tmp_path / "short", [[1] * S, [2] * S])
    message = r"short has 16 training tokens and one sample needs 17; .*lower data\.sequence_length"
    with pytest.raises(DataError, match=message):
        build_train_dataset(_config(short), seed=0)
    for multiple, needed in ((1, 17), (2, 33)):
        message = (
            rf"16 tokens at most, and one validation sample needs {needed}.*data\.validation_fraction \(now 0\.1\)"
        )
        with pytest.raises(DataError, match=message):
            build_validation_dataset(_config(short), num_samples=1, length_multiple=multiple)
    single = write_shard(tmp_path / "single", [[1] * 100])  # of which nothing is held out, whatever the fraction
    with pytest.raises(DataError, match=r"each shard is a single document: .* as several files, or with --text-doc"):
        build_validation_dataset(_config(single, validation_fraction=0.5), num_samples=1)
    exact = write_shard(tmp_path / "exact", [[1] * (S + 1), [2] * (S + 1)])
    assert len(_samples(build_train_dataset(_config(exact), seed=0), 5)) == 5
    assert len(build_validation_dataset(_config(exact), num_samples=5)) == 1


def test_document_starts_are_those_of_the_source(tmp_path):
    documents = counting_documents(100)
    first_of = {int(token): int(document[0]) for document in documents for token in document}
    config = _config(write_shard(tmp_path / "d", documents), reset_at_document=True, validation_fraction=0.3)
    validation = build_validation_dataset(config, num_samples=9, length_multiple=2)
    for dataset, numbers in ((build_train_dataset(config, seed=0), 60), (validation, len(validation))):
        for sample in (dataset[number] for number in range(numbers)):
            own = [first_of[token] for token in sample.tokens.tolist()]
            assert sample.document_starts.tolist() == [own.index(document) for document in own]
    assert build_train_dataset(_config(str(tmp_path / "d")), seed=0)[0].document_starts is None


def test_a_sample_is_the_same_in_any_process(tmp_path):
    """Nothing in the order hangs on Python's hash seed or on what was asked before."""
    prefixes = [write_shard(tmp_path / str(n), counting_documents(60, start=10_000 * n)) for n in range(2)]
    sample = functools.partial(build_train_dataset(_config(prefixes), seed=3).__getitem__, 12_345)
    code = (
        "import sys; from sambalm.data_pipeline import config, dataset, sources;"
        f"c = config.DataConfig(train=sys.argv[1:], sequence_length={S}, validation_fraction=0.1);"
        "print(dataset.build_train_dataset(c, sources.open_sources(c), seed=3)[12345].tokens.tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code, *prefixes], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(sample().tokens.tolist())


def test_configuration():
    with pytest.raises(ValueError, match="mixes entries with and without a weight"):
        _config(["a", {"prefix": "b", "weight": 1}])
    with pytest.raises(ValueError, match=r"data.train is \[\]"):
        _config([])
    with pytest.raises(ValueError, match=r"data\.train names a 2 times"):
        _config(["a", "b", "a"])
    for bad in ({"validation_fraction": 0}, {"validation_fraction": 1}, {"sequence_length": 0}, {"unknown": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            _config("a", **bad)
    for bad in ({"weight": 0}, {"weight": float("inf")}, {"weight": 1, "validation_fraction": 1}):
        with pytest.raises(ValueError, match=list(bad)[-1]):
            _config([{"prefix": "a", **bad}])
    assert all(field.description for field in DataConfig.model_fields.values())
    assert _config("runs/a/d").cache_path.as_posix() == "runs/a/.index_cache"
    assert _config(["a", "b"]).tokenizer_path() is None
