"""The input split over machines."""

import gzip
import json
import random

import fsspec
import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from sambalm.data_pipeline import preprocess as module
from sambalm.data_pipeline.documents import ReadOptions
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.inputs import InputFile, expand_inputs
from sambalm.data_pipeline.parts import Part, Span, part_spans
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.shards import check_shard, read_manifest
from tests.support.data import listing, make_texts, write_jsonl
from tests.support.marks import slow_except
from tests.support.preprocess import run, start


def _documents_in_name_order(folder) -> list[list[int]]:
    documents = []
    for path in sorted(folder.glob("d_*.bin")):
        index = check_shard(path.with_suffix(""))
        ids = np.fromfile(path, dtype=index.dtype)
        documents += [part.tolist() for part in np.split(ids, np.cumsum(index.lengths)[:-1])]
    return documents


@pytest.fixture
def mixed(tmp_path):
    """Files of every kind in an order of their own, and all their texts."""
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [make_texts(n, seed=n) for n in (50, 40, 30, 60, 2)]
    lines = ["".join(json.dumps({"text": text}) + "\n" for text in part).encode() for part in texts]
    (folder / "z.jsonl").write_bytes(lines[0])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[1]))
    (folder / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines[2]))
    parquet.write_table(pyarrow.table({"text": texts[3]}), folder / "y.parquet", row_group_size=25)
    (folder / "c.txt").write_text(texts[4][0])
    (folder / "d.txt").write_text(texts[4][1])
    names = ["z.jsonl", "b.jsonl.gz", "a.jsonl.zst", "y.parquet", "c.txt", "d.txt"]
    (folder / "list").write_text("".join(f"{folder}/{name}\n" for name in names))
    return f"@{folder}/list", [text for part in texts for text in part]


@pytest.mark.parametrize("count", slow_except([1, 3, 7], [1, 2, 3, 7, 40]))
def test_any_split_holds_the_documents_in_order(tmp_path, tokenizer, mixed, monkeypatch, count):
    monkeypatch.setattr(module, "PIECE_BYTES", 3000)
    inputs, texts = mixed
    order = list(range(count))
    random.Random(count).shuffle(order)
    (tmp_path / "out").mkdir()
    prefix = tmp_path / "out" / "d"
    options = {"tokenizer": tokenizer.path, "output_prefix": prefix, "shard_tokens": 400}
    for done, index in enumerate(order, start=1):
        summary = preprocess([inputs], part=Part(index, count), **options)
        assert summary.complete == (done == count) == (tmp_path / "out" / "d.json").exists()
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert _documents_in_name_order(tmp_path / "out") == expected
    manifest = read_manifest(prefix)
    assert [shard.name for shard in manifest.shards] == sorted(p.stem for p in (tmp_path / "out").glob("d_*.bin"))
    assert [source.records for source in manifest.sources] == [50, 40, 30, 60, 1, 1]
    seen = {}
    for shard in manifest.shards:
        for part in shard.sources:
            assert part.first == seen.get(part.source, 0)
            seen[part.source] = part.first + part.records
    assert [seen[source] for source in range(6)] == [50, 40, 30, 60, 1, 1]
    assert not [name for name in listing(tmp_path / "out") if "progress" in name]
    assert preprocess([inputs], part=Part(0, count), **options).read_bytes == 0


def test_every_byte_belongs_to_one_part(tmp_path):
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", make_texts(n, seed=n)) for n in (1, 30, 2)]
    (tmp_path / "empty.jsonl").write_bytes(b"")
    files = expand_inputs([*paths, tmp_path / "empty.jsonl"])
    for count in (1, 2, 5, 1000):
        covered = {0: [], 1: [], 2: [], 3: []}
        for part in Part(0, count).all():
            for span in part_spans(files, ReadOptions(), part):
                stop = files[span.source].size_bytes if span.stop is None else span.stop
                covered[span.source].append((span.start, stop))
        for source, spans in covered.items():
            assert [start for start, _ in spans[1:]] == [stop for _, stop in spans[:-1]]
            if files[source].size_bytes:
                assert (spans[0][0], spans[-1][1]) == (0, files[source].size_bytes)


@pytest.mark.slow
def test_parts_may_run_at_the_same_time(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(8000, seed=3))
    prefix = tmp_path / "out" / "d"
    parts = [
        start([path], tokenizer.path, prefix, "--part", f"{n}/4", "--workers", "1", "--shard-tokens", "20000")
        for n in range(4)
    ]
    for process in parts:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    preprocess([path], tokenizer=tokenizer.path, output_prefix=tmp_path / "alone" / "d", shard_tokens=20000)
    assert _documents_in_name_order(prefix.parent) == _documents_in_name_order(tmp_path / "alone")
    assert read_manifest(prefix).sources == read_manifest(tmp_path / "alone" / "d").sources
    # A task that its scheduler repeats finds nothing to do.
    code, output, _ = run([path], tokenizer.path, prefix, "--part", "2/4", "--shard-tokens", "20000")
    assert code == 0
    assert "shards were there already" in output


def test_parts_of_different_runs_are_not_merged(tmp_path, tokenizer, corpus):
    options = {"tokenizer": tokenizer.path, "output_prefix": tmp_path / "d"}
    preprocess([corpus], part=Part(0, 2), shard_tokens=1000, **options)
    with pytest.raises(DataError, match=r"d\.00000-of-00002\.progress was made with other values of shard_tokens"):
        preprocess([corpus], part=Part(1, 2), shard_tokens=2000, **options)
    with pytest.raises(DataError, match=r"00000-of-00002\.progress exists already"):
        preprocess([corpus], part=Part(0, 3), shard_tokens=1000, **options)
    with pytest.raises(DataError, match="exists already"):
        preprocess([corpus], shard_tokens=1000, **options)


def test_a_part_can_be_replaced(tmp_path, tokenizer, corpus):
    options = {"tokenizer": tokenizer.path, "output_prefix": tmp_path / "d", "shard_tokens": 1000}
    for index in range(2):
        preprocess([corpus], part=Part(index, 2), **options)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for index in range(2):
        summary = preprocess([corpus], part=Part(index, 2), overwrite=True, **options)
        assert summary.complete == (index == 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    # Another split leaves nothing of the old one.
    preprocess([corpus], overwrite=True, **options)
    assert {path.name[:3] for path in tmp_path.iterdir()} == {"d.j", "d_0"}
    assert len(_documents_in_name_order(tmp_path)) == 200
    assert {shard.name for shard in read_manifest(tmp_path / "d").shards} == {p.stem for p in tmp_path.glob("*.bin")}


def test_another_prefix_that_looks_like_a_part_is_left_alone(tmp_path, tokenizer, corpus):
    preprocess([corpus], tokenizer=tokenizer.path, output_prefix=tmp_path / "d_00001", shard_tokens=1000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    preprocess([corpus], tokenizer=tokenizer.path, output_prefix=tmp_path / "d", shard_tokens=1000, overwrite=True)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("text", ["1", "2/2", "-1/2", "a/b", "1/0", "1/2/3", ""])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(DataError, match="is not I/N with I from 0 to N-1"):
        Part.parse(text)


def test_an_object_store_gives_the_same_shards(tmp_path, tokenizer, corpus):
    fsspec.filesystem("memory").pipe("/bucket/a.jsonl", corpus.read_bytes())
    for name, source in (("local", corpus), ("store", "memory://bucket/*.jsonl"), ("url", f"file://{corpus}")):
        workers = 2 if name == "url" else 1  # a store in memory is this process's own
        preprocess([source], tokenizer=tokenizer.path, output_prefix=tmp_path / name / "d", workers=workers)
    local, store, url = (_documents_in_name_order(tmp_path / name) for name in ("local", "store", "url"))
    assert local == store == url
    assert read_manifest(tmp_path / "store" / "d").sources[0].path == "memory:///bucket/a.jsonl"


def test_a_file_that_cannot_be_split_is_the_parts_in_which_it_begins():
    files = [InputFile(f"{size}.jsonl.gz", size, "", "jsonl", "gzip") for size in (10, 20)]  # the second at a border
    spans = [list(part_spans(files, ReadOptions(), Part(number, 3))) for number in range(3)]
    assert spans == [[Span(0, 0, None)], [Span(1, 0, None)], []]
