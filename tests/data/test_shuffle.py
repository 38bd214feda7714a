"""Documents in an order drawn from a seed: the same for any workers, parts, buckets and crashes."""

import json
import shutil

import numpy as np
import pytest

from sambalm.data_pipeline import shuffle
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.parts import Part
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.progress import ProgressLog
from sambalm.data_pipeline.shards import check_shard, read_manifest, shard_prefixes
from sambalm.data_pipeline.shuffle import document_keys
from sambalm.data_pipeline.verify import verify
from tests.support.data import make_texts, write_jsonl
from tests.support.preprocess import contents

TEXTS = make_texts(60, seed=1)
SHARDS_IN_ORDER = 39  # that the texts make of 300 tokens at most
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def paths(tmp_path):
    return [write_jsonl(tmp_path / "a.jsonl", TEXTS[:25]), write_jsonl(tmp_path / "b.jsonl", ["", *TEXTS[25:]])]


def documents(prefix, suffix=".bin") -> list[list[int]]:
    """Tokens of each document, in stored order."""
    found = []
    for shard in shard_prefixes(prefix):
        index = check_shard(shard)
        ends = np.cumsum(index.lengths)
        values = np.fromfile(f"{shard}.bin", dtype=index.dtype)
        if suffix == ".mask":
            bits = np.unpackbits(np.fromfile(f"{shard}.mask", dtype=np.uint8), bitorder="little")
            values = bits[: len(values)]
        found += [part.tolist() for part in np.split(values, ends[:-1])]
    return found


def shuffled(paths, tokenizer, prefix, *, seed=3, **options):
    options = {"shard_tokens": 300, "shuffle_seed": seed} | options
    return preprocess(paths, tokenizer=tokenizer.path, output_prefix=prefix, **options)


@pytest.fixture
def expected(paths, tokenizer, tmp_path):
    """All files of a shuffled prefix, in one go with one bucket."""
    shuffled(paths, tokenizer, tmp_path / "expected" / "data")
    return contents(tmp_path / "expected" / "data")


def test_documents_are_sorted_by_their_keys(paths, tokenizer, tmp_path):
    options = {"output_prefix": tmp_path / "ordered" / "data", "shard_tokens": 300}
    assert preprocess(paths, tokenizer=tokenizer.path, **options).shards == SHARDS_IN_ORDER
    in_order = documents(tmp_path / "ordered" / "data")
    summary = shuffled(paths, tokenizer, tmp_path / "data")
    order = np.argsort(document_keys(0, 60, seed=3))
    assert documents(tmp_path / "data") == [in_order[number] for number in order]
    assert (summary.documents, summary.skipped_documents, summary.complete) == (60, 1, True)
    assert summary.shards > 3
    assert verify(tmp_path / "data", workers=1).problems == []
    assert not list(tmp_path.glob(".data*"))
    manifest = read_manifest(tmp_path / "data")
    assert [source.records for source in manifest.sources] == [25, 36]
    shuffled(paths, tokenizer, tmp_path / "other" / "data", seed=4)
    assert sorted(documents(tmp_path / "other" / "data")) == sorted(in_order)
    assert documents(tmp_path / "other" / "data") not in (in_order, documents(tmp_path / "data"))


def test_keys_are_a_permutation_and_spread_evenly():
    keys = document_keys(0, 1 << 16, seed=0)
    assert len(np.unique(keys)) == 1 << 16
    assert np.array_equal(document_keys(1000, 50, seed=0), keys[1000:1050])
    assert not np.array_equal(document_keys(0, 50, seed=1), keys[:50])
    counts = np.bincount((keys >> np.uint64(60)).astype(int), minlength=16)
    assert abs(counts - 4096).max() < 5 * 64  # five standard deviations
    places = np.argsort(np.argsort(keys))
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.02  # neighbours are no neighbours any more


@pytest.mark.parametrize("bucket_bytes", [200, 1000])
def test_buckets_change_nothing(bucket_bytes, paths, tokenizer, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(shuffle, "_BUFFER_BYTES", 1500)
    monkeypatch.setattr(shuffle, "_READ_BYTES", 300)
    shuffled(paths, tokenizer, tmp_path / "out" / "data")
    assert contents(tmp_path / "out" / "data") == expected


def test_parts_are_shuffled_together(paths, tokenizer, expected, tmp_path):
    for index in (2, 0, 1):
        summary = shuffled(paths, tokenizer, tmp_path / "out" / "data", part=Part(index, 3))
        assert summary.complete == (index == 1)
    assert contents(tmp_path / "out" / "data") == expected


class _DiedError(Exception):
    pass


def dies_at(monkeypatch, owner, name, *, call):
    """Has a method fail when it is called for the n-th time, after it has done its work."""
    work, calls = getattr(owner, name), []

    def failing(*arguments, **options):
        result = work(*arguments, **options)
        calls.append(None)
        if len(calls) == call:
            raise _DiedError
        return result

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (ProgressLog, "commit", 2),  # while the documents are tokenised
        (shuffle.Buckets, "_deal", 2),  # while they are dealt to buckets
        (shuffle.Buckets, "fill", 1),  # then the shards in input order are gone
        (ProgressLog, "commit", SHARDS_IN_ORDER + 9),  # while shuffled shards are written
    ],
)
def test_a_run_that_dies_goes_on_to_the_same_bytes(
    owner, name, call, paths, tokenizer, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 6000)
    monkeypatch.setattr(shuffle, "_BUFFER_BYTES", 1500)
    monkeypatch.setattr(shuffle, "_READ_BYTES", 300)
    with monkeypatch.context() as patch:
        dies_at(patch, owner, name, call=call)
        with pytest.raises(_DiedError):
            shuffled(paths, tokenizer, tmp_path / "out" / "data")
    assert read_manifest(tmp_path / "out" / "data") is None
    shuffled(paths, tokenizer, tmp_path / "out" / "data")
    assert contents(tmp_path / "out" / "data") == expected
    assert not list((tmp_path / "out").glob(".data*"))


def test_a_run_again_does_nothing_and_another_seed_is_refused(paths, tokenizer, tmp_path):
    first = shuffled(paths, tokenizer, tmp_path / "data")
    before = contents(tmp_path / "data")
    assert shuffled(paths, tokenizer, tmp_path / "data").resumed_shards == first.shards
    assert contents(tmp_path / "data") == before
    with pytest.raises(DataError, match=r"exists already, made with other values of shuffle_seed; choose another"):
        shuffled(paths, tokenizer, tmp_path / "data", seed=4)
    with pytest.raises(DataError, match=r"made with other values of shuffle_seed"):
        preprocess(paths, tokenizer=tokenizer.path, output_prefix=tmp_path / "data", shard_tokens=300)
    shuffled(paths, tokenizer, tmp_path / "data", seed=4, overwrite=True)
    assert contents(tmp_path / "data") != before


def test_masks_go_with_their_documents(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 700)
    monkeypatch.setattr(shuffle, "_READ_BYTES", 300)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    chats = tmp_path / "chats.jsonl"
    pairs = zip(TEXTS[:20], TEXTS[20:40], strict=True)
    lines = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))
    options = {"tokenizer": tokenizer.path, "chat_template": template, "shard_tokens": 300}
    preprocess([chats], output_prefix=tmp_path / "ordered", **options)
    preprocess([chats], output_prefix=tmp_path / "data", shuffle_seed=3, **options)
    order = np.argsort(document_keys(0, 20, seed=3))
    copy = shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    shuffle.Buckets(copy / "ordered", read_manifest(copy / "ordered"), seed=3).fill()
    assert not list(copy.glob("ordered_*"))  # of which the buckets hold all
    for suffix in (".bin", ".mask"):
        in_order = documents(tmp_path / "ordered", suffix)
        assert documents(tmp_path / "data", suffix) == [in_order[number] for number in order], suffix
