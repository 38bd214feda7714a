import json

import pytest
from data_support import write_jsonl

from sambalm.data_pipeline.documents import expand_inputs, read_documents
from sambalm.data_pipeline.errors import DataError


def test_documents_carry_text_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n  \n{"body": "x", "text": "t\\u00e9"}')
    documents = list(read_documents(path))
    assert [(d.text, d.line_number) for d in documents] == [("one", 1), ("té", 4)]
    assert documents[0].size_bytes == len('{"text": "one"}\n')
    assert [d.text for d in read_documents(write_jsonl(path, ["a"]), text_key="text")] == ["a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b'["text"]', "expected a JSON object, found list"),
        (b'{"txt": "a", "id": 3}', r"no key 'text' \(keys: txt, id\)"),
        (b'{"text": 5}', "is int, not a string"),
        (b'{"text": "\xff"}', "byte 10 of the line is not UTF-8"),
        (b'{"text": "ab\\ud800"}', "character 2 of 'text' is an unpaired surrogate"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents(path))
    assert str(caught.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_a_file_without_documents_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}:{content.count(10)}: .*without a document"):
        list(read_documents(path))


def test_an_escaped_pair_of_surrogates_is_one_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "😀"}))
    assert "\\ud83d" in path.read_text()
    assert next(read_documents(path)).text == "😀"


def test_inputs_expand_sorted_and_once(tmp_path):
    (tmp_path / "deep").mkdir()
    names = ["b.jsonl", "a.jsonl", "deep/c.jsonl", "odd[1].jsonl"]
    paths = [write_jsonl(tmp_path / name, ["x"]) for name in names]
    assert expand_inputs([tmp_path / "b.jsonl", f"{tmp_path}/**/*.jsonl"]) == sorted(paths)
    assert expand_inputs([str(paths[3])]) == [paths[3]]


def test_inputs_without_a_match_or_a_reader_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"no file matches the input '.*none\*\.jsonl'"):
        expand_inputs([f"{tmp_path}/none*.jsonl"])
    with pytest.raises(DataError, match=r"extension '\.csv'; supported: \.jsonl"):
        expand_inputs([tmp_path / "a.csv"])
    with pytest.raises(DataError, match="is a directory"):
        expand_inputs([tmp_path])
