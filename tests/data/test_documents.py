import gzip
import json
import os
import random

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from sambalm.data_pipeline.documents import BadRecord, ReadOptions, pieces, place, read_documents
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.inputs import input_file
from tests.support.data import write_jsonl
from tests.support.marks import slow_except


def test_documents_carry_text_and_position(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n  \n{"body": "x", "text": "t\\u00e9"}')
    documents = list(read_documents(path))
    assert [(d.text, d.position) for d in documents] == [("one", 0), ("té", 20)]
    assert documents[0].size_bytes == len('{"text": "one"}\n')
    assert [d.text for d in read_documents(write_jsonl(path, ["a"]), text_key="text")] == ["a"]


BAD_LINES = [
    (b'{"text": "a"', "malformed JSON"),
    (b"[" * 100_000, "malformed JSON"),
    (b'["text"]', "expected a JSON object, found a list"),
    (b"7", "expected a JSON object, found a number"),
    (b'{"txt": "a", "id": 3}', r"no key 'text' \(keys: txt, id\)"),
    (b'{"text": 5}', "is a number, not a string"),
    (b'{"text": "\xff"}', "byte 10 of the line is not UTF-8"),
    (b'{"text": "ab\\ud800"}', "character 2 of 'text' is an unpaired surrogate"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
@pytest.mark.parametrize("extension", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_bad_lines_are_named(tmp_path, line, message, extension):
    path = tmp_path / f"bad.{extension}"
    path.write_bytes(_compressed(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n', extension))
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents(path))
    assert str(caught.value).startswith(f"{path}:3: ")


def test_what_only_the_slower_parser_takes_is_fine(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "😀", "x": NaN}\n' + json.dumps({"text": "😀", "n": 2**70}) + "\n")
    assert "\\ud83d" in path.read_text()
    assert [document.text for document in read_documents(path)] == ["😀", "😀"]


def _compressed(content: bytes, extension: str) -> bytes:
    if extension.endswith(".gz"):
        return gzip.compress(content)
    return zstandard.ZstdCompressor().compress(content) if extension.endswith(".zst") else content


def _lines(seed: int) -> bytes:
    draw = random.Random(seed)
    lines = [json.dumps({"text": "é" * draw.choice([0, 1, 30, 700])}, ensure_ascii=False) for _ in range(60)]
    lines += ["", "  ", ""] * 3
    draw.shuffle(lines)
    return "\n".join(lines).encode() + b"\n" * draw.randint(0, 2)


@pytest.mark.parametrize(
    "extension",
    slow_except(["jsonl.zst", "parquet"], ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"], long=["jsonl", "jsonl.gz"]),
)
def test_pieces_of_any_size_and_start_hold_every_record_once(tmp_path, extension):
    for seed in range(4):
        content = _lines(seed)
        path = tmp_path / f"a.{extension}"
        if extension == "parquet":
            texts = [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
            parquet.write_table(pyarrow.table({"n": list(range(len(texts))), "text": texts}), path, row_group_size=7)
        else:
            path.write_bytes(_compressed(content, extension))
        file, options = input_file(path), ReadOptions()
        whole = [record for piece in pieces(file, options) for record in piece.records(options)]
        assert [record.text for record in whole] == [
            json.loads(line)["text"] for line in content.split(b"\n") if line.strip()
        ]
        for piece_bytes in (1, 2, 7, 100, 1000):
            cut = list(pieces(file, options, piece_bytes=piece_bytes))
            assert [record for piece in cut for record in piece.records(options)] == whole
            assert sum(piece.size_bytes for piece in cut) == pytest.approx(file.size_bytes, abs=len(cut))
            for number in (0, 1, 17, 59):
                rest = pieces(file, options, start=whole[number].position, piece_bytes=piece_bytes)
                assert [record for piece in rest for record in piece.records(options)] == whole[number:]
                if extension == "parquet":  # where positions are rows, and a part may end within a group of them
                    head = pieces(file, options, stop=whole[number].position, piece_bytes=piece_bytes)
                    assert [record for piece in head for record in piece.records(options)] == whole[:number]


def test_lines_of_a_plain_file_lie_where_their_records_say(tmp_path):
    lines = [b'{"text": "%d"}' % number for number in range(8, 12)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n \n".join(lines))
    file, options = input_file(path), ReadOptions()
    for piece_bytes in (3, 20, 100):
        cut = list(pieces(file, options, piece_bytes=piece_bytes))
        records = [record for piece in cut for record in piece.records(options)]
        assert [path.read_bytes()[r.position :][: r.size_bytes].strip() for r in records] == lines
        assert [record.text for record in records] == ["8", "9", "10", "11"]


def test_plain_text_is_one_document_or_one_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("erste Zeile\r\n\nzweite é\n".encode())
    for name, content in (("a.txt", path.read_bytes()), ("a.txt.gz", gzip.compress(path.read_bytes()))):
        (tmp_path / name).write_bytes(content)
        file = input_file(tmp_path / name)
        for options, expected in (
            (ReadOptions(), ["erste Zeile\r\n\nzweite é\n"]),
            (ReadOptions(text_documents="line"), ["erste Zeile", "zweite é"]),
        ):
            records = [record for piece in pieces(file, options) for record in piece.records(options)]
            assert [record.text for record in records] == expected
    (tmp_path / "a.txt").write_bytes(b"fine\nb\xff\n")
    with pytest.raises(DataError, match=r"a\.txt:1: byte 6 is not UTF-8"):
        list(read_documents(path))


def test_a_text_file_too_large_for_one_document_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sambalm.data_pipeline.documents._MAX_TEXT_FILE_BYTES", 1 << 20)
    (tmp_path / "a.txt").write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(DataError, match=r"a\.txt would be one document of more than 1 MiB; take each line"):
        list(read_documents(tmp_path / "a.txt"))


def test_what_is_wrong_with_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None], "n": [1, 2]}), path)
    with pytest.raises(DataError, match=r"a\.parquet: row 1: the value of 'text' is null"):
        list(read_documents(path))
    with pytest.raises(DataError, match=r"a\.parquet: no column 'body' \(columns: text, n\)"):
        list(read_documents(path, text_key="body"))
    with pytest.raises(DataError, match=r"a\.parquet: the column 'n' holds int64, not strings"):
        list(read_documents(path, text_key="n"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.parquet is not a sound Parquet file"):
        list(read_documents(path))


def test_the_place_of_a_record_is_its_line(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 100_000, "y", "z"])
    file = input_file(path)
    records = [record for piece in pieces(file, ReadOptions()) for record in piece.records(ReadOptions())]
    assert [place(file, record.position) for record in records] == [f"{path}:{line}" for line in (1, 2, 3)]
    assert not [record for record in records if isinstance(record, BadRecord)]


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("pieces_of", [5, 1 << 22])
@pytest.mark.parametrize("extension", ["jsonl", "jsonl.gz"])
def test_a_mark_of_utf_8_is_no_part_of_the_first_line(extension, pieces_of, tmp_path):
    content = MARK + b'{"text": "one"}\n{"text": "two"}\n'
    path = tmp_path / f"a.{extension}"
    path.write_bytes(gzip.compress(content) if extension.endswith("gz") else content)
    file = input_file(path)
    found = [
        record
        for piece in pieces(file, ReadOptions(), piece_bytes=pieces_of)
        for record in piece.records(ReadOptions())
    ]
    assert [(record.text, record.position) for record in found] == [("one", 0), ("two", len(content) // 2 + 2)]
    # From where each begins, all that follows is read again.
    for number, record in enumerate(found):
        again = pieces(file, ReadOptions(), start=record.position, piece_bytes=pieces_of)
        assert [one.text for piece in again for one in piece.records(ReadOptions())] == ["one", "two"][number:]


def test_a_mark_of_utf_8_is_no_part_of_a_text_or_a_list(tmp_path):
    (tmp_path / "a.txt").write_bytes(MARK + "té".encode())
    (tmp_path / "list").write_bytes(MARK + f"{tmp_path}/a.txt\n".encode())
    assert [document.text for document in read_documents(input_file(f"@{tmp_path}/list"))] == ["té"]


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary", "string_view", "binary_view"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_every_column_that_holds_text_is_read(kind, dictionary, tmp_path):
    texts = ["one", "té", None, "one"]
    column = pyarrow.array(texts, pyarrow.string()).cast(pyarrow.type_for_alias(kind))
    if dictionary:
        if kind.endswith("view"):
            pytest.skip("pyarrow makes no dictionary of views")
        column = column.dictionary_encode()
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    (piece,) = pieces(input_file(tmp_path / "a.parquet"), ReadOptions())
    records = list(piece.records(ReadOptions()))
    assert [getattr(record, "text", None) for record in records] == texts
    assert records[2] == BadRecord("the value of 'text' is null", 2, 0)


def test_bytes_that_are_no_text_are_bad_records(tmp_path):
    parquet.write_table(pyarrow.table({"text": [b"\xff", b"a"]}), tmp_path / "a.parquet")
    (piece,) = pieces(input_file(tmp_path / "a.parquet"), ReadOptions())
    bad, good = piece.records(ReadOptions())
    assert (bad.reason, good.text) == ("byte 0 is not UTF-8; convert the file to plain text in UTF-8", "a")


def test_a_damaged_page_of_parquet_is_blamed_on_its_file(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"word {number}" * 20 for number in range(5000)]}), path)
    content = bytearray(path.read_bytes())
    content[3000:6000] = bytes(3000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet is not a sound Parquet file"):
        list(read_documents(path))


def test_a_file_whose_name_is_no_text_is_refused(tmp_path):
    path = os.fsencode(tmp_path) + b"/n\xff.jsonl"
    with open(path, "wb") as file:
        file.write(b"{}")
    with pytest.raises(DataError, match="is not UTF-8; rename the file"):
        input_file(os.fsdecode(path))
