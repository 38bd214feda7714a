import gzip
import os

import fsspec
import pytest
import zstandard

from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.inputs import expand_inputs, input_file
from tests.support.data import write_jsonl


def _names(patterns) -> list[str]:
    return [file.name for file in expand_inputs(patterns)]


def test_patterns_keep_their_order_and_globs_are_sorted(tmp_path):
    (tmp_path / "deep").mkdir()
    b, a, c, odd = (
        str(write_jsonl(tmp_path / n, ["x"])) for n in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "odd[1].jsonl")
    )
    assert _names([b, f"{tmp_path}/**/*.jsonl"]) == [b, a, c, odd]
    assert _names([odd]) == [odd]
    (tmp_path / "list").write_text(f"# chosen by hand\n{c}\n\n{tmp_path}/?.jsonl\n")
    assert _names([f"@{tmp_path}/list", odd]) == [c, a, b, odd]


def test_inputs_without_a_match_or_a_reader_are_refused(tmp_path):
    for name in ("a.csv", "a.parquet.gz", "a.gz"):
        (tmp_path / name).write_text("x")
    for pattern, message in (
        (f"{tmp_path}/none*.jsonl", r"no file matches the input '.*none\*\.jsonl'"),
        (tmp_path / "a.csv", r"extension '\.csv'; supported: \.jsonl, .*all but \.parquet also with \.gz or \.zst"),
        (tmp_path / "a.parquet.gz", r"extension '\.parquet\.gz'"),
        (tmp_path / "a.gz", r"extension '\.gz'"),
        (tmp_path, "is a directory"),
        (f"@{tmp_path}/none", "cannot read the list of inputs"),
        ("nostore://bucket/a.jsonl", "cannot open nostore://bucket/a.jsonl: Protocol not known"),
    ):
        with pytest.raises(DataError, match=message):
            expand_inputs([pattern])


def test_urls_are_listed_and_read_through_fsspec(tmp_path):
    store = fsspec.filesystem("memory")
    store.pipe(
        {"/inputs/b.jsonl": b"0123456789", "/inputs/a.jsonl.gz": gzip.compress(b"abc" * 99), "/inputs/n.md": b""}
    )
    files = expand_inputs(["memory://inputs/*.jsonl*"])
    assert [file.name for file in files] == ["memory:///inputs/a.jsonl.gz", "memory:///inputs/b.jsonl"]
    assert (files[1].size_bytes, files[1].read_range(3, 7), files[1].read_range(8, 99)) == (10, b"3456", b"89")
    assert b"".join(content for content, _ in files[0].stream()) == b"abc" * 99
    local = write_jsonl(tmp_path / "c.jsonl", ["x"])
    (file,) = expand_inputs([f"file://{local}"])
    assert file.read_range(0, 5) == local.read_bytes()[:5]
    with pytest.raises(DataError, match="no file matches the input 'memory://inputs/none"):
        expand_inputs(["memory://inputs/none.jsonl"])


COMPRESS = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("extension", COMPRESS)
def test_streams_end_where_the_data_does(tmp_path, extension):
    content = os.urandom(300_000)
    compress = COMPRESS[extension]
    path = tmp_path / f"a.jsonl.{extension}"

    def stream() -> bytes:
        parts = list(input_file(path).stream())
        assert sum(taken for _, taken in parts) == path.stat().st_size
        return b"".join(part for part, _ in parts)

    whole = compress(content)
    path.write_bytes(whole)
    assert stream() == content
    path.write_bytes(compress(content[:1000]) + compress(content[1000:]))  # several members
    assert stream() == content
    path.write_bytes(b"")
    assert stream() == b""
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=rf"a\.jsonl\.{extension} ends in the middle of its"):
        stream()
    path.write_bytes(b"no such format" * 10)
    with pytest.raises(DataError, match=rf"a\.jsonl\.{extension} is damaged"):
        stream()


def test_padding_after_a_gzip_member_is_no_data(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"abc") + b"\0" * 512)
    assert b"".join(part for part, _ in input_file(tmp_path / "a.jsonl.gz").stream()) == b"abc"
