import json
import posix

from sambalm.data_pipeline import corpus as module
from sambalm.data_pipeline.corpus import write_python_corpus


def test_corpus_is_deterministic_mixed_and_free_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(posix, "environ", {b"SECRET_OF_THIS_MACHINE": b"hunter2"})
    # The standard library at large takes seconds; one package of it shows the same.
    get_path = module.sysconfig.get_path
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: f"{get_path(name)}/json")
    seen = []
    summary = write_python_corpus(tmp_path / "a.jsonl", progress=lambda done, total: seen.append((done, total)))
    write_python_corpus(tmp_path / "b.jsonl")
    write_python_corpus(tmp_path / "c.jsonl", seed=1)

    content = (tmp_path / "a.jsonl").read_bytes()
    assert content == (tmp_path / "b.jsonl").read_bytes()
    records = [json.loads(line) for line in content.splitlines()]
    other = [json.loads(line) for line in (tmp_path / "c.jsonl").read_bytes().splitlines()]
    assert records != other
    assert sorted(r["source"] for r in records) == sorted(r["source"] for r in other)

    sources = [record["source"] for record in records]
    assert len(set(sources)) == len(sources) == summary.documents
    assert {"stdlib/decoder.py", "reference/while", "docstrings/builtins", "docstrings/itertools"} <= set(sources)
    assert sources != sorted(sources)
    assert summary.text_bytes == sum(len(record["text"].encode()) for record in records) == seen[-1][0]
    assert b"hunter2" not in content
    assert b" at 0x7" not in content


def test_skipped_directories(tmp_path):
    for name in ("kept.py", "test/a.py", "site-packages/b.py", "pkg/tests/c.py", "pydoc_data/topics.py", "empty.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("" if name == "empty.py" else "x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    assert [source for source, _ in module._library_sources(tmp_path)] == ["stdlib/kept.py"]


def test_the_order_of_a_corpus_is_not_that_of_the_file_system(tmp_path, monkeypatch):
    texts = [(f"stdlib/{number}.py", f"x = {number}") for number in range(9)]
    written = []
    for listed in (texts, texts[::-1]):
        monkeypatch.setattr(module, "_python_texts", lambda listed=listed: iter(listed))
        write_python_corpus(tmp_path / "c.jsonl", overwrite=True)
        written.append((tmp_path / "c.jsonl").read_bytes())
    assert written[0] == written[1]
