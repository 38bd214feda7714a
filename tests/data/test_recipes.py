"""What recipes and datatrove's steps rest on, where datatrove is not installed."""

import importlib.util
from contextlib import closing

import pytest

from sambalm.data_pipeline.output import merge_parts
from sambalm.data_pipeline.parts import Part
from sambalm.data_pipeline.progress import Position, ProgressLog, RunIdentity, read_progress
from sambalm.data_pipeline.recipes.web import main
from sambalm.data_pipeline.shards import ShardEntry, SourceRange, tokenizer_entry

RUN = RunIdentity(tokenizer_sha256="", options={}, inputs_sha256="", parts=2)
END = Position(source=1, position=0, record=0)


def shard(name: str, *sources: SourceRange) -> ShardEntry:
    return ShardEntry(
        name=name, documents=1, tokens=1, bin_bytes=2, bin_sha256="", idx_sha256="", sources=list(sources)
    )


@pytest.mark.skipif(importlib.util.find_spec("datatrove") is not None, reason="datatrove is installed here")
def test_without_datatrove_a_recipe_says_what_to_install(tmp_path, capsys):
    needed = ["--input", "in", "--format", "jsonl", "--tokenizer", "t.model", "--output", str(tmp_path / "out")]
    assert main([*needed, "--work", str(tmp_path / "work")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install -e '.[data]'" in line
    assert [*tmp_path.iterdir()] == []


def test_a_log_that_restarts_has_its_header_alone(tmp_path):
    path = tmp_path / "d.progress"
    with closing(ProgressLog(path, RUN, overwrite=False)) as log:
        header = path.read_bytes()
        log.commit(shard("d_00000"), END)
        log.finish([], ["a.jsonl"])
        assert log.progress.complete
        log.restart()
        assert path.read_bytes() == header
        assert (log.progress.shards, log.progress.complete, log.progress.sources) == ([], False, [])
        log.commit(shard("d_00001"), END)
    assert [found.name for found in read_progress(path).shards] == ["d_00001"]


def test_sources_that_parts_name_are_numbered_one_after_another(tmp_path, tokenizer):
    prefix = tmp_path / "d"
    for part in Part(0, 2).all():
        with closing(ProgressLog(part.progress_path(prefix), RUN, overwrite=False)) as log:
            first = SourceRange(source=0, first=0, records=3 + part.index)
            second = SourceRange(source=1, first=0, records=2, skipped=1)
            (tmp_path / f"d_{part.index}.bin").write_bytes(b"12")
            (tmp_path / f"d_{part.index}.idx").touch()
            log.commit(shard(f"d_{part.index}", first, second), END)
            log.finish([SourceRange(source=1, first=2, records=5, skipped=5)], [f"{part.index}a", f"{part.index}b"])
    manifest = merge_parts(prefix, part=Part(0, 2), run=RUN, files=[], tokenizer=tokenizer_entry(tokenizer, prefix))
    assert [(source.path, source.records, source.skipped) for source in manifest.sources] == [
        ("0a", 3, 0),
        ("0b", 7, 6),
        ("1a", 4, 0),
        ("1b", 7, 6),
    ]
    assert [[found.source for found in entry.sources] for entry in manifest.shards] == [[0, 1], [2, 3]]
    assert [[found.first for found in entry.sources] for entry in manifest.shards] == [[0, 0], [0, 0]]
