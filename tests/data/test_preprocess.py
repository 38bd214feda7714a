import json
import os
import subprocess
import sys

import numpy as np
import pytest

from sambalm.data_pipeline import preprocess as module
from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.files import sha256_file
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.shards import check_shard, read_manifest, shard_prefixes
from sambalm.data_pipeline.sources import open_sources
from tests.support.data import listing, make_texts, write_jsonl


def _tokens(prefix) -> list[list[int]]:
    return [document for shard_prefix in shard_prefixes(prefix) for document in _shard_tokens(shard_prefix)]


def _shard_tokens(shard_prefix) -> list[list[int]]:
    index = check_shard(shard_prefix)
    ids = np.fromfile(f"{shard_prefix}.bin", dtype=index.dtype)
    return [part.tolist() for part in np.split(ids, np.cumsum(index.lengths)[:-1])]


def test_shards_hold_the_documents_in_order(tmp_path, tokenizer):
    texts = make_texts(30, seed=1)
    texts.insert(4, "")
    paths = [write_jsonl(tmp_path / "a.jsonl", texts[:20]), write_jsonl(tmp_path / "b.jsonl", texts[20:])]
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts if text]
    shard_tokens = sum(map(len, expected[:7]))  # which these documents fill to the last token
    calls = []
    summary = preprocess(
        paths,
        tokenizer=tokenizer.path,
        output_prefix=tmp_path / "out" / "data",
        shard_tokens=shard_tokens,
        progress=lambda done, total: calls.append((done, total)),
    )
    prefix = tmp_path / "out" / "data"
    assert _tokens(prefix) == expected
    assert (summary.documents, summary.skipped_documents) == (30, 1)
    assert summary.tokens == sum(map(len, expected))
    total_bytes = sum(path.stat().st_size for path in paths)
    assert calls[-1] == (total_bytes, total_bytes) == (summary.read_bytes, total_bytes)

    manifest = read_manifest(prefix)
    assert len(manifest.shards) == summary.shards > 2
    assert [shard.name for shard in manifest.shards[:2]] == ["data_00000", "data_00001"]
    # A shard takes what fits and is closed by the first document that does not.
    packed = [0]
    for ids in expected:
        if packed[-1] + len(ids) > shard_tokens:
            packed.append(0)
        packed[-1] += len(ids)
    assert [shard.tokens for shard in manifest.shards] == packed
    for shard in manifest.shards:
        assert shard.bin_sha256 == sha256_file(tmp_path / "out" / f"{shard.name}.bin")
        assert shard.idx_sha256 == sha256_file(tmp_path / "out" / f"{shard.name}.idx")
        assert shard.bin_bytes == (tmp_path / "out" / f"{shard.name}.bin").stat().st_size
    assert (manifest.tokenizer.sha256, manifest.tokenizer.vocab_size) == (tokenizer.sha256, tokenizer.vocab_size)
    config = DataConfig(train=str(prefix), sequence_length=8)
    assert config.tokenizer_path().resolve() == tokenizer.path.resolve()
    assert len(listing(tmp_path / "out")) == 2 * summary.shards + 1
    assert summary.complete
    assert summary.slow_because is None


def test_every_record_is_accounted_for(tmp_path, tokenizer):
    lines = [json.dumps({"text": text}) for text in make_texts(40, seed=1)]
    lines[3] = '{"text": ""}'
    lines[7] = "{oops"
    lines[30] = "[]"
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:25]))
    (tmp_path / "b.jsonl").write_text("\n\n" + "\n".join(lines[25:]) + "\n")
    (tmp_path / "c.jsonl").write_text("\n")
    paths = [tmp_path / "a.jsonl", tmp_path / "c.jsonl", tmp_path / "b.jsonl"]
    prefix = tmp_path / "d"
    summary = preprocess(paths, tokenizer=tokenizer.path, output_prefix=prefix, shard_tokens=300, on_error="skip")
    assert (summary.documents, summary.skipped_documents, summary.malformed_documents) == (37, 1, 2)
    assert summary.describe(prefix).splitlines() == [
        f"{prefix}: 37 documents, {summary.tokens:,} tokens",
        "1 empty document was skipped",
        "2 malformed documents were skipped",
    ]
    manifest = read_manifest(prefix)
    assert [(s.path, s.size_bytes, s.records, s.skipped, s.malformed) for s in manifest.sources] == [
        (str(paths[0]), paths[0].stat().st_size, 25, 1, 1),
        (str(paths[1]), 1, 0, 0, 0),
        (str(paths[2]), paths[2].stat().st_size, 15, 0, 1),
    ]
    found = [(source, []) for source in range(3)]
    for shard in manifest.shards:
        for part in shard.sources:
            records = range(part.first, part.first + part.records)
            found[part.source][1].extend(records)
        assert shard.documents == sum(r.records - r.skipped - r.malformed for r in shard.sources)
        texts = []
        for part in shard.sources:
            start = part.first + (25 if part.source == 2 else 0)
            texts += [_text(line) for line in lines[start : start + part.records]]
        assert shard.text_bytes == sum(len(text.encode()) for text in texts)
        assert _shard_tokens(tmp_path / shard.name) == [
            [*tokenizer.encode(text), tokenizer.eos_id] for text in texts if text
        ]
    assert found == [(0, list(range(25))), (1, []), (2, list(range(15)))]


def _text(line: str) -> str:
    try:
        return json.loads(line)["text"]
    except (ValueError, TypeError):
        return ""


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, tokenizer, corpus, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 2000)  # more batches than may be in flight
    contents = []
    for workers in (1, 2):
        directory = tmp_path / str(workers)
        preprocess(
            [corpus], tokenizer=tokenizer.path, output_prefix=directory / "d", workers=workers, shard_tokens=2000
        )
        contents.append({name: (directory / name).read_bytes() for name in listing(directory)})
    assert len(contents[0]) > 5
    assert contents[0] == contents[1]


def test_without_eos(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["stone river"])
    preprocess([path], tokenizer=tokenizer.path, output_prefix=tmp_path / "d", append_eos=False)
    assert _tokens(tmp_path / "d") == [tokenizer.encode("stone river")]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_is_named_and_leaves_nothing(tmp_path, tokenizer, corpus, monkeypatch, workers):
    monkeypatch.setattr(module, "PIECE_BYTES", 2000)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(corpus.read_text() + '{"text": 1}\n')
    before = listing(tmp_path)
    with pytest.raises(DataError, match=r"bad\.jsonl:201: the value of 'text' is a number, not a string"):
        preprocess([bad], tokenizer=tokenizer.path, output_prefix=tmp_path / "d", workers=workers)
    assert listing(tmp_path) == before


def test_a_run_that_stopped_at_bad_input_goes_on_skipping_it(tmp_path, tokenizer, corpus, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 2000)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(corpus.read_text() + '{"text": 1}\n')
    options = {"tokenizer": tokenizer.path, "output_prefix": tmp_path / "d", "shard_tokens": 1000}
    with pytest.raises(DataError, match=r"bad\.jsonl:201"):
        preprocess([bad], **options)
    assert (tmp_path / "d.progress").exists()
    assert not (tmp_path / "d.json").exists()
    summary = preprocess([bad], on_error="skip", **options)
    assert 0 < summary.resumed_shards < summary.shards
    assert summary.malformed_documents == 1
    assert not (tmp_path / "d.progress").exists()
    preprocess([corpus], tokenizer=tokenizer.path, output_prefix=tmp_path / "good", shard_tokens=1000)
    assert _tokens(tmp_path / "d") == _tokens(tmp_path / "good")


def test_a_finished_run_is_not_repeated(tmp_path, tokenizer, corpus):
    options = {"tokenizer": tokenizer.path, "output_prefix": tmp_path / "d", "shard_tokens": 1000}
    first = preprocess([corpus], **options)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in listing(tmp_path)}
    again = preprocess([corpus], **options)
    assert (again.shards, again.tokens, again.resumed_shards, again.read_bytes) == (
        first.shards,
        first.tokens,
        first.shards,
        0,
    )
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in listing(tmp_path)} == before
    for changed in ({"shard_tokens": 999}, {"append_eos": False}):
        with pytest.raises(DataError, match=r"d\.json exists already"):
            preprocess([corpus], **{**options, **changed})


def test_a_changed_input_is_no_finished_run(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["stone", "river"])
    options = {"tokenizer": tokenizer.path, "output_prefix": tmp_path / "d"}
    preprocess([path], **options)
    write_jsonl(path, ["river", "stone"])  # as many bytes
    os.utime(path, ns=(0, (tmp_path / "d.json").stat().st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"d\.json exists already"):
        preprocess([path], **options)
    preprocess([path], overwrite=True, **options)
    assert _tokens(tmp_path / "d") == [[*tokenizer.encode(text), tokenizer.eos_id] for text in ("river", "stone")]


def test_shards_of_another_tool_are_not_replaced(tmp_path, tokenizer, corpus):
    (tmp_path / "d_00003.bin").write_bytes(b"x")
    options = {"tokenizer": tokenizer.path, "output_prefix": tmp_path / "d", "shard_tokens": 1000}
    with pytest.raises(DataError, match=r"d_00003\.bin exists already"):
        preprocess([corpus], **options)
    assert listing(tmp_path) == ["d_00003.bin"]
    preprocess([corpus], overwrite=True, **options)
    check_shard(tmp_path / "d_00003")


def test_existing_output_is_kept_unless_overwritten(tmp_path, tokenizer, corpus):
    options = {"tokenizer": tokenizer.path, "output_prefix": tmp_path / "d"}
    preprocess([corpus], shard_tokens=1000, **options)
    before = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)}
    small = write_jsonl(tmp_path / "small.jsonl", ["stone"])
    with pytest.raises(DataError, match=r"d\.json exists already, made with other values of shard_tokens; choose"):
        preprocess([small], **options)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before

    bad = tmp_path / "bad.jsonl"
    bad.write_text("{")
    with pytest.raises(DataError, match="malformed"):
        preprocess([bad], overwrite=True, **options)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before

    preprocess([small], overwrite=True, **options)
    assert listing(tmp_path) == ["bad.jsonl", "d.json", "d_00000.bin", "d_00000.idx", "small.jsonl"]


def test_impossible_requests_are_refused(tmp_path, tokenizer, corpus):
    options = {"tokenizer": tokenizer.path, "output_prefix": tmp_path / "d"}
    for name in ("workers", "shard_tokens"):
        with pytest.raises(DataError, match=f"{name}=0 must be at least 1"):
            preprocess([corpus], **{name: 0}, **options)
    with pytest.raises(DataError, match=r"the inputs hold no tokens \(empty documents: 2,"):
        preprocess([write_jsonl(tmp_path / "a.jsonl", ["", ""])], **options)
    assert listing(tmp_path) == ["a.jsonl"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write in"):
        preprocess([corpus], tokenizer=tokenizer.path, output_prefix=tmp_path / "file" / "d")
    assert listing(tmp_path) == ["a.jsonl", "file"]


def test_shards_that_disagree_with_the_manifest_are_refused(tmp_path, tokenizer, corpus):
    preprocess([corpus], tokenizer=tokenizer.path, output_prefix=tmp_path / "d")
    manifest = json.loads((tmp_path / "d.json").read_text())
    manifest["shards"][0]["documents"] += 1
    (tmp_path / "d.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"d_00000\.idx has 200 documents .* where the manifest says 201"):
        open_sources(DataConfig(train=str(tmp_path / "d"), sequence_length=8))


def test_the_command_imports_no_training_library(tmp_path, tokenizer, corpus):
    code = (
        "import sys; from sambalm.pretrain.cli.app import app\n"
        f"try: app(['data', 'preprocess', '--input', {str(corpus)!r}, '--tokenizer', {str(tokenizer.path)!r},"
        f" '--output', {str(tmp_path / 'd')!r}, '--workers', '1'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "d.json").exists()
