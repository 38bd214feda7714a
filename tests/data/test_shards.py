import hashlib
import json
import zlib

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from sambalm.data_pipeline import shards
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.shards import ShardWriter, check_shard, read_manifest, shard_prefixes
from tests.support.data import listing, write_shard
from tests.support.power_loss import assert_lasts, noted_operations


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32), (200_000, np.int32)])
def test_megatron_reads_what_is_written(tmp_path, vocab_size, dtype, monkeypatch):
    monkeypatch.setattr(shards, "_CHUNK_DOCUMENTS", 3)  # several chunks
    documents = [[0], [vocab_size - 1, 7], list(range(100)), [5] * 33, [1, 2], [3], [4]]
    prefix = write_shard(tmp_path / "data", documents, vocab_size=vocab_size)
    dataset = IndexedDataset(prefix)
    assert dataset.index.dtype is dtype
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))
    assert check_shard(prefix).lengths.tolist() == [len(d) for d in documents]


def test_files_are_the_same_bytes_as_megatrons(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = [[3, 1, 4], [1, 5], [9]]
    write_shard(tmp_path / "ours", documents, vocab_size=100)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for tokens in documents:
        builder.add_document(np.array(tokens), [len(tokens)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for extension in ("bin", "idx"):
        assert (tmp_path / f"ours.{extension}").read_bytes() == (tmp_path / f"theirs.{extension}").read_bytes()


def test_an_index_of_megatrons_may_end_with_the_mode_of_each_sequence(tmp_path):
    prefix = write_shard(tmp_path / "d", [[1, 2, 3], [4, 5]])
    with open(tmp_path / "d.idx", "ab") as file:
        file.write(bytes(2))
    assert check_shard(prefix).lengths.tolist() == [3, 2]


@pytest.mark.parametrize("bad", [-1, 100, 65536, 2**40])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, bad):
    writer = ShardWriter(tmp_path / "data", 100)
    writer.add([99])
    with pytest.raises(DataError, match=f"document 1 of .*data: token id {bad} is outside the vocabulary of 100"):
        writer.add(np.array([5, bad]))
    writer.discard()
    assert listing(tmp_path) == []


def test_a_document_without_tokens_is_refused(tmp_path):
    writer = ShardWriter(tmp_path / "data", 100)
    with pytest.raises(DataError, match=r"document 0 of .* has no tokens"):
        writer.add([])
    writer.discard()


def test_a_committed_shard_survives_a_power_loss(tmp_path, monkeypatch):
    calls = noted_operations(monkeypatch)
    writer = ShardWriter(tmp_path / "data", 100, masked=True)
    writer.add([1, 2], np.array([True, False]))
    writer.finish()
    writer.commit()
    for extension in ("bin", "idx", "mask"):
        assert_lasts(calls, tmp_path / f"data.{extension}")


def test_nothing_appears_before_commit(tmp_path):
    writer = ShardWriter(tmp_path / "data", 100)
    writer.add([1])
    writer.finish()
    assert all(name.startswith(".") for name in listing(tmp_path))
    writer.commit()
    assert listing(tmp_path) == ["data.bin", "data.idx"]


def _patch(path, offset, content):
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "d.bin").write_bytes((p / "d.bin").read_bytes()[:-2]), r"d\.bin has 8 bytes .* says 10"),
        (lambda p: (p / "d.bin").write_bytes((p / "d.bin").read_bytes() + b"xx"), r"d\.bin has 12 bytes"),
        (lambda p: (p / "d.bin").unlink(), r"cannot read the shard file .*d\.bin"),
        (lambda p: (p / "d.idx").unlink(), r"cannot read the shard file .*d\.idx"),
        (lambda p: (p / "d.idx").write_bytes((p / "d.idx").read_bytes()[:-1]), r"d\.idx is not .* where the header"),
        (lambda p: (p / "d.idx").write_bytes(b"MMID"), r"d\.idx is not a valid shard index \(4 bytes\)"),
        (lambda p: _patch(p / "d.idx", 0, b"X"), r"d\.idx is not .*header"),
        (lambda p: _patch(p / "d.idx", 9, b"\x02"), r"d\.idx is not .*version 2"),
        (lambda p: _patch(p / "d.idx", 34, b"\xff\xff\xff\xff"), "negative length"),
        (lambda p: _patch(p / "d.idx", 34 + 8 + 8, b"\x00"), "pointers that do not follow"),
        (lambda p: _patch(p / "d.idx", 34 + 8 + 16 + 16, b"\x07"), "document boundaries"),
    ],
)
def test_damaged_shards_are_named(tmp_path, damage, message):
    prefix = write_shard(tmp_path / "d", [[1, 2, 3], [4, 5]])
    check_shard(prefix)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        check_shard(prefix)


def test_a_shard_without_tokens_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no tokens"):
        check_shard(write_shard(tmp_path / "d", []))


def test_bare_and_missing_prefixes(tmp_path):
    prefix = write_shard(tmp_path / "bare.v1", [[1]])
    assert shard_prefixes(prefix) == [prefix]
    assert read_manifest(prefix) is None
    with pytest.raises(DataError, match=r"no data under the prefix .*other: neither"):
        shard_prefixes(tmp_path / "other")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"format_version": 3}), "has format_version 3 and this program reads 2"),
        ("[]", "has format_version None and this program reads 2"),
        ("{", "cannot read the manifest"),
        (json.dumps({"format_version": 1, "tokenizer": {"path": 3}}), r"tokenizer\.path"),
    ],
)
def test_unusable_manifests_are_refused(tmp_path, content, message):
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(DataError, match=message):
        shard_prefixes(tmp_path / "d")


def test_several_documents_at_once_are_the_same_file(tmp_path):
    documents = [[3, 1, 4], [1, 5], [9]]
    write_shard(tmp_path / "single", documents, vocab_size=100)
    writer = ShardWriter(tmp_path / "batch", 100)
    writer.add_documents(np.array([3, 1, 4, 1, 5]), np.array([3, 2]))
    writer.add_documents(np.array([9], dtype=np.uint16), np.array([1]))
    writer.finish()
    writer.commit()
    for extension in ("bin", "idx"):
        assert (tmp_path / f"single.{extension}").read_bytes() == (tmp_path / f"batch.{extension}").read_bytes()


@pytest.mark.parametrize("lengths", [[3, 2], [1, 4], [4, 1]])
def test_the_document_of_a_bad_id_is_named(tmp_path, lengths):
    writer = ShardWriter(tmp_path / "data", 100)
    writer.add([99])
    with pytest.raises(DataError, match=f"document {1 if lengths[0] > 3 else 2} of .*: token id 100 is outside"):
        writer.add_documents(np.array([1, 2, 3, 100, 4]), np.array(lengths))
    writer.discard()


def test_blocks_have_checksums(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHECKSUM_BLOCK_BYTES", 16)
    writer = ShardWriter(tmp_path / "data", 100)
    for tokens in (range(5), range(20), range(7)):
        writer.add(list(tokens))
    entry = writer.finish()
    writer.commit()
    content = (tmp_path / "data.bin").read_bytes()
    blocks = [content[start : start + 16] for start in range(0, len(content), 16)]
    assert entry.bin_crc32 == "".join(f"{zlib.crc32(block):08x}" for block in blocks)
    assert entry.bin_sha256 == hashlib.sha256(content).hexdigest()


def test_a_manifest_of_version_1_is_read(tmp_path):
    shard = {"name": "d_00000", "documents": 1, "tokens": 2, "bin_bytes": 4, "bin_sha256": "x", "idx_sha256": "y"}
    old = {
        "format_version": 1,
        "tokenizer": {"path": "t.model", "sha256": "z", "vocab_size": 9, "eos_id": 2},
        "shards": [shard],
        "skipped_documents": 3,
        "sources": ["a.jsonl", "b.jsonl"],
        "options": {"append_eos": True},
    }
    (tmp_path / "d.json").write_text(json.dumps(old))
    manifest = read_manifest(tmp_path / "d")
    assert [source.path for source in manifest.sources] == ["a.jsonl", "b.jsonl"]
    assert (manifest.shards[0].tokens, manifest.skipped_documents) == (2, 3)
