"""Masks of what counts in the loss: beside shards that stay as they are, through streams and samples, never lost."""

from pathlib import Path

import numpy as np
import pytest

from sambalm.data_pipeline.baselines import baseline_losses
from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.dataset import PADDING_ID, build_train_dataset, build_validation_dataset
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.loss_mask import mask_path
from sambalm.data_pipeline.shards import ShardWriter, check_shard
from sambalm.data_pipeline.sources import Source, open_sources
from tests.support.data import counting_documents, write_shard

S = 32


def masks(documents: list[np.ndarray], *, seed: int = 1) -> list[np.ndarray]:
    draw = np.random.RandomState(seed)
    return [draw.rand(len(document)) < 0.5 for document in documents]


def write_masked(prefix: Path, documents: list[np.ndarray], counts: list[np.ndarray]) -> str:
    writer = ShardWriter(prefix, 60_000, masked=True)
    for number, (document, counted) in enumerate(zip(documents, counts, strict=True)):
        if number % 3:  # one by one and several together
            writer.add(document, counted)
        else:
            writer.add_documents(document, np.array([len(document)]), counted)
    writer.finish()
    writer.commit()
    return str(prefix)


def source(prefix: str, **options) -> Source:
    (found,) = open_sources(DataConfig(train=prefix, sequence_length=S, **options))
    return found


@pytest.fixture
def documents() -> list[np.ndarray]:
    return counting_documents(60)


def test_the_files_that_megatron_reads_are_those_of_a_shard_without_mask(documents, tmp_path):
    write_masked(tmp_path / "masked", documents, masks(documents))
    write_shard(tmp_path / "plain", documents)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"masked{suffix}").read_bytes() == (tmp_path / f"plain{suffix}").read_bytes()
    assert mask_path(tmp_path / "masked").stat().st_size == -(-sum(map(len, documents)) // 8)


@pytest.mark.parametrize("held_out", [False, True])
def test_any_range_of_a_stream_says_what_counts(held_out, documents, tmp_path):
    counts = masks(documents)
    stream = source(write_masked(tmp_path / "d", documents, counts), validation_fraction=0.5).stream(held_out=held_out)
    expected = np.concatenate(counts[30:] if held_out else counts[:30])
    assert len(stream) == len(expected)
    for start in range(0, len(expected), 7):
        for count in (1, 5, 8, 40):
            stop = min(start + count, len(expected))
            assert np.array_equal(stream.counts(start, stop - start), expected[start:stop])
    assert 0.3 < expected.mean() < 0.7


def test_a_sample_s_weights_are_its_labels(documents, tmp_path):
    counts = masks(documents)
    config = DataConfig(train=write_masked(tmp_path / "d", documents, counts), sequence_length=S)
    by_id = np.concatenate(counts)  # ids count up, so that an id is its place
    trained = build_train_dataset(config, open_sources(config), seed=0)
    held_out = build_validation_dataset(config, open_sources(config), num_samples=1)
    for sample in [held_out[0], *(trained[number] for number in range(10))]:
        assert np.array_equal(sample.loss_weights.numpy(), by_id[sample.labels.numpy()])


def test_beside_a_masked_source_all_of_another_counts_and_alone_it_has_no_weights(documents, tmp_path):
    masked, plain = write_masked(tmp_path / "m", documents, masks(documents)), write_shard(tmp_path / "p", documents)
    sources = [{"prefix": prefix, "weight": 1} for prefix in (masked, plain)]
    config = DataConfig(train=sources, sequence_length=S)
    dataset = build_train_dataset(config, open_sources(config), seed=0)
    means = [dataset[n].loss_weights.numpy().mean() for n in range(20) if dataset.source_number(n) == 1]
    assert means
    assert set(means) == {1.0}
    alone = DataConfig(train=plain, sequence_length=S)
    assert build_train_dataset(alone, open_sources(alone), seed=0)[0].loss_weights is None


def test_a_mask_that_is_gone_cut_or_changed_is_refused(documents, tmp_path):
    prefix = write_masked(tmp_path / "d", documents, masks(documents))
    content = source(prefix).content()
    path = mask_path(prefix)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"d\.mask has \d+ bytes where \d+ tokens take \d+"):
        source(prefix)
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert source(prefix).content() != content  # so that no run goes on from a checkpoint unasked
    assert check_shard(prefix)


def test_documents_that_all_lose_their_counted_ends_are_refused(tmp_path):
    documents = [np.arange(200) for _ in range(5)]
    counts = [np.arange(200) >= 190 for _ in documents]  # as of a question's answer
    prefix = write_masked(tmp_path / "d", documents, counts)

    def dataset_of(length):
        settings = {"packing": "documents", "reset_at_document": True, "validation_fraction": 0, "validation": "other"}
        config = DataConfig(train=prefix, sequence_length=length, **settings)
        return build_train_dataset(config, open_sources(config), seed=0)

    dataset_of(199).check_labels_count()
    with pytest.raises(
        DataError, match=r"of .*d counts in the loss at data.sequence_length 100; 5 documents are longer"
    ):
        dataset_of(100).check_labels_count()
    uncounted = write_masked(tmp_path / "e", documents, [np.zeros(200, bool) for _ in documents])
    config = DataConfig(train=uncounted, sequence_length=S)
    dataset = build_train_dataset(config, open_sources(config), seed=0)
    with pytest.raises(DataError, match="look at their masks"):
        dataset.check_labels_count()


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_data_without_a_label_to_validate_on_are_refused(packing, documents, tmp_path):
    """Each prefix of data.validation has a loss of its own; of held-out parts, one that has labels is enough."""
    some, none = masks(documents), [np.zeros(len(document), bool) for document in documents]
    prefixes = {name: write_masked(tmp_path / name, documents, c) for name, c in (("some", some), ("none", none))}

    def dataset_of(*names: str, held_out: bool, multiple: int = 1):
        train = [{"prefix": prefixes[name], "weight": 1} for name in names]
        config = DataConfig(train=train, sequence_length=S, validation_fraction=0.3, packing=packing)
        sources = open_sources(config)
        return build_validation_dataset(
            config, sources, num_samples=8, held_out=held_out, length_multiple=multiple
        )

    for names, held_out in ((["some"], False), (["some"], True), (["some", "none"], True)):
        dataset = dataset_of(*names, held_out=held_out)
        assert any(dataset[number].loss_weights.any() for number in range(len(dataset)))
    raised = "validation.tokens" + " or data.sequence_length" * (packing == "documents")
    with pytest.raises(
        DataError, match=rf"no label of data.validation's {prefixes['none']} counts .* or raise {raised}$"
    ):
        dataset_of("some", "none", held_out=False)
    with pytest.raises(
        DataError, match=rf"the held-out part of {prefixes['none']} counts in the loss, in samples of 64 t"
    ):
        dataset_of("none", held_out=True, multiple=2)


@pytest.mark.parametrize("length", [16, S, 100])
def test_packed_samples_are_whole_documents_each_once(length, documents, tmp_path):
    config = DataConfig(
        train=write_masked(tmp_path / "d", documents, masks(documents)),
        sequence_length=length,
        packing="documents",
        reset_at_document=True,
        validation_fraction=0,
        validation="other",
    )
    dataset = build_train_dataset(config, open_sources(config), seed=3)
    (packing,) = dataset.packings
    counts = np.concatenate(masks(documents))
    stops = dict(packing.place(number) for number in range(len(packing)))
    found: list[int] = []
    for number in range(len(packing)):
        sample = dataset[number]
        ids = np.append(sample.tokens.numpy(), sample.labels.numpy()[-1])
        weights = np.append(0, sample.loss_weights.numpy())
        used = stops[int(ids[0])] - int(ids[0])  # ids are places in the stream
        begins = set(sample.document_starts.numpy()[:used].tolist())
        starts = {int(document[0]) for document in documents}
        assert all(int(ids[begin]) in starts for begin in begins)  # a document each, from its first token
        if used <= length:
            assert set(ids[used:]) <= {PADDING_ID}
            assert not weights[used:].any()
            assert set(sample.document_starts.numpy()[used:]) <= {used}  # which sees nothing of what is before it
        expected = counts[ids[:used]].astype(float)
        expected[sorted(begins)] = 0
        if used <= length:
            assert np.array_equal(weights[:used], expected)
        else:  # the last token is a label alone, and whether a document begins there no start says
            assert np.array_equal(weights[:length], expected[:length])
        found += ids[:used].tolist()
    kept = [document[: length + 1] for document in documents]
    assert sorted(found) == sorted(np.concatenate(kept).tolist())
    assert packing.cut_documents == sum(len(document) > length + 1 for document in documents)
    epochs = [
        [tuple(dataset[epoch * len(packing) + n].tokens.tolist()) for n in range(len(packing))] for epoch in (0, 1)
    ]
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1] or len(packing) < 4


@pytest.mark.parametrize(
    ("lengths", "samples"),
    [
        ([4, 5], [(0, 9)]),  # which a sample of 9 just holds
        ([4, 6], [(0, 4), (4, 10)]),
        ([9, 3, 3, 3, 1], [(0, 9), (9, 18), (18, 19)]),
        ([10, 3], [(0, 9), (10, 13)]),  # cut off at its end, and the next begins where it begins
    ],
)
def test_documents_are_packed_as_long_as_they_fit(lengths, samples, tmp_path):
    prefix = write_shard(tmp_path / "d", [list(range(1, length + 1)) for length in lengths])
    settings = {"packing": "documents", "reset_at_document": True, "validation_fraction": 0, "validation": "other"}
    config = DataConfig(train=prefix, sequence_length=8, **settings)
    (packing,) = build_train_dataset(config, open_sources(config), seed=0).packings
    assert [packing.place(number) for number in range(len(packing))] == samples
    assert packing.tokens == sum(stop - start for start, stop in samples)


def test_baselines_count_what_counts(documents, tmp_path):
    """Labels of one id alone count: their entropy is 0, which that of all labels is not."""
    fives = [np.where(np.arange(len(d)) % 2, 5, d % 50) for d in documents]
    entropies = {}
    for name, counts in (("all", [np.ones(len(d), bool) for d in fives]), ("fives", [d == 5 for d in fives])):
        config = DataConfig(
            train=write_masked(tmp_path / name, fives, counts), sequence_length=16, validation_fraction=0.3
        )
        entropies[name] = baseline_losses(config, validation_samples=4, vocab_size=100).unigram_entropy
    assert entropies["fives"] == 0
    assert entropies["all"] > 1
