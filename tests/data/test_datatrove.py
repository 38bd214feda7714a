"""Shards from datatrove's pipelines, in the environment that `make test-datatrove` makes."""

import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.recipes.web import main
from sambalm.data_pipeline.shards import check_shard, read_manifest
from sambalm.data_pipeline.verify import verify
from tests.support.data import make_texts, write_jsonl
from tests.support.pages import make_pages, with_changes
from tests.support.preprocess import contents

pytest.importorskip("datatrove", reason="`make test-datatrove` makes an environment with datatrove")

from datatrove.data import Document
from loguru import logger

from sambalm.data_pipeline.datatrove import EncodeShards, JoinShards, KeepLanguage, ShardOutput

SHARD_TOKENS = 3000


@pytest.fixture(autouse=True)
def _quiet():
    logger.remove()


@pytest.fixture
def output(tmp_path, tokenizer) -> ShardOutput:
    return ShardOutput(tmp_path / "out" / "d", tokenizer.path, shard_tokens=SHARD_TOKENS)


def documents(texts: list[str], path: str = "a.jsonl") -> Iterator[Document]:
    return iter([Document(text, f"{path}/{number}", metadata={"file_path": path}) for number, text in enumerate(texts)])


def encode(output: ShardOutput, ranks: list[list[str]]) -> None:
    for rank, texts in enumerate(ranks):
        EncodeShards(output).run(documents(texts, f"{rank}.jsonl"), rank, len(ranks))
    JoinShards(output, ranks=len(ranks)).run()


def tokens_by_source(prefix: Path) -> dict[str, list[bytes]]:
    """The tokens of each document under the name of the file that it came from, in the order of the shards."""
    manifest = read_manifest(prefix)
    found: dict[str, list[bytes]] = {}
    for shard in manifest.shards:
        index = check_shard(prefix.with_name(shard.name), shard)
        tokens = np.fromfile(prefix.with_name(f"{shard.name}.bin"), dtype=index.dtype)
        texts = iter(np.split(tokens, np.cumsum(index.lengths)[:-1]))
        for part in shard.sources:
            name = Path(manifest.sources[part.source].path).name
            wanted = part.records - part.skipped - part.malformed
            found.setdefault(name, []).extend(next(texts).tobytes() for _ in range(wanted))
        assert next(texts, None) is None
    return found


def encoded(tokenizer, texts: list[str]) -> list[bytes]:
    """The bytes that the documents of these texts have in a shard."""
    ends = [tokenizer.eos_id]
    return [np.array(ids + ends, dtype=np.uint16).tobytes() for ids in tokenizer.encode_batch(texts)]


def test_one_rank_writes_the_bytes_of_preprocess(tmp_path, tokenizer, output):
    texts = [*make_texts(150, seed=1), "", "</s> written out", "a" * 9000]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    preprocess([path], tokenizer=tokenizer.path, output_prefix=tmp_path / "ours" / "d", shard_tokens=SHARD_TOKENS)
    encode(output, [texts])
    expected, found = contents(tmp_path / "ours" / "d"), contents(output.prefix)
    assert len(expected) > 7
    assert {name for name in found} == {name for name in expected}
    assert [name for name in found if name != "d.json" and found[name] != expected[name]] == []
    ours, theirs = read_manifest(tmp_path / "ours" / "d"), read_manifest(output.prefix)
    assert theirs.shards == ours.shards
    assert (theirs.skipped_documents, theirs.malformed_documents) == (1, 0)
    assert verify(output.prefix).problems == []


def test_ranks_are_joined_in_their_order_and_shards_know_their_files(tokenizer, output):
    ranks = [make_texts(60, seed=rank) for rank in range(3)]
    ranks.insert(2, [])  # a rank without a file
    encode(output, ranks)
    manifest = read_manifest(output.prefix)
    assert [shard.name for shard in manifest.shards] == sorted(shard.name for shard in manifest.shards)
    assert [Path(source.path).name for source in manifest.sources] == ["0.jsonl", "1.jsonl", "3.jsonl"]
    assert [source.records for source in manifest.sources] == [60, 60, 60]
    for rank, tokens in zip((0, 1, 3), tokens_by_source(output.prefix).values(), strict=True):
        assert tokens == encoded(tokenizer, ranks[rank])
    assert verify(output.prefix).problems == []


def test_half_of_a_surrogate_pair_is_left_out_and_counted(output):
    encode(output, [["one two", "bad \ud800", "three"]])
    manifest = read_manifest(output.prefix)
    assert (manifest.shards[0].documents, manifest.malformed_documents) == (2, 1)


def test_an_attempt_that_failed_leaves_nothing_in_the_way_of_the_next(output):
    texts = make_texts(200, seed=2)

    def broken() -> Iterator[Document]:
        yield from documents(texts[:150])
        raise RuntimeError("the machine")

    def broken_at_once() -> Iterator[Document]:
        raise RuntimeError("the machine")
        yield

    with pytest.raises(RuntimeError):
        EncodeShards(output).run(broken_at_once(), 0, 2)
    assert contents(output.prefix) == {}
    EncodeShards(output).run(documents(make_texts(300, seed=9)), 0, 2)  # more shards than there will be
    with pytest.raises(RuntimeError):
        EncodeShards(output).run(broken(), 0, 2)
    with pytest.raises(DataError, match=r"2 of 2 ranks have not ended \(0, 1\)"):
        JoinShards(output, ranks=2).run()
    encode(output, [texts, texts])
    assert verify(output.prefix).problems == []
    found = contents(output.prefix)
    JoinShards(output, ranks=2).run()  # as after a kill between the manifest and datatrove's own note
    assert contents(output.prefix) == found
    assert not any(name.endswith((".progress", ".tmp")) for name in found)


def test_what_belongs_to_something_else_is_not_replaced(tokenizer, output):
    encode(output, [make_texts(5, seed=0)])
    before = contents(output.prefix)
    with pytest.raises(DataError, match=r"d\.json exists already"):
        EncodeShards(output).run(documents(["one"]), 0, 1)
    other = ShardOutput(output.prefix, output.tokenizer, shard_tokens=7)
    with pytest.raises(DataError, match="made in another way"):
        JoinShards(other, ranks=1).run()
    with pytest.raises(DataError, match="one task"):
        JoinShards(output, ranks=1).run(None, 0, 2)
    assert contents(output.prefix) == before


def test_a_language_is_kept():
    step = KeepLanguage("en", threshold=0.65)
    english, french = "The cat sat on the mat and looked at the dog.", "Le chat regarde le chien qui dort sur le lit."
    kept = step.run(documents([english, french, english]))
    assert [document.text for document in kept] == [english, english]
    with pytest.raises(DataError, match="'xx'; it knows ace, af,"):
        list(KeepLanguage("xx", threshold=0.65).run(documents([english])))


def test_a_recipe_keeps_the_pages_of_its_language(tmp_path, tokenizer):
    english, french = ([text.format(number) for number in range(3)] for text in (ENGLISH, FRENCH))
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", [french[0], *english[:2], *french[1:], english[2]])
    left = {}
    for name, options in (("en", ["--language", "en"]), ("fr", ["--language", "fr"]), ("all", [])):
        place = tmp_path / name
        words = command(tmp_path / "in", tokenizer, place, "--no-deduplicate", "--no-quality", *options)
        assert main(words) == 0
        (left[name],) = tokens_by_source(place / "out" / "d").values()
    assert left["en"] == encoded(tokenizer, english)
    assert left["fr"] == encoded(tokenizer, french)
    assert len(left["all"]) == 6


ENGLISH = "The cat number {} looks at the dog that sleeps on the bed of the house, and says nothing to the children."
FRENCH = (
    "Le chat numéro {} regarde le chien qui dort sur le lit de la maison, et il ne dit rien aux enfants du village."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Five files of pages, among which every tenth has a copy with a word changed in another file."""
    path = tmp_path_factory.mktemp("pages")
    pages = make_pages(100, words=200, seed=3)
    copies = [with_changes(page, changes=1, seed=number) for number, page in enumerate(pages[::10])]
    texts = [*pages, *copies]
    random.Random(0).shuffle(texts)
    for number in range(5):
        write_jsonl(path / f"{number}.jsonl", texts[number::5])
    return path


def command(folder, tokenizer, place: Path, *options: object) -> list[str]:
    words = ["--input", folder, "--format", "jsonl", "--tokenizer", tokenizer.path, "--output", place / "out" / "d"]
    return [str(word) for word in (*words, "--work", place / "work", "--shard-tokens", SHARD_TOKENS, *options)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder, tokenizer) -> Path:
    """What four tasks make of the pages, one after another and undisturbed."""
    place = tmp_path_factory.mktemp("whole")
    assert main(command(folder, tokenizer, place, "--tasks", 4)) == 0
    return place / "out" / "d"


@pytest.mark.parametrize("tasks", [1, 4])
def test_near_duplicates_go_and_nothing_else_does(tmp_path, tokenizer, tasks):
    """Precision and recall are 1 where copies have a Jaccard similarity over 0.9 and other pages one below 0.3."""
    pages = make_pages(120, words=200, seed=7)
    near = {number: with_changes(pages[number], changes=1 + number % 2, seed=number) for number in range(40)}
    far = {number: with_changes(pages[number], changes=40, seed=number) for number in range(40, 80)}
    assert min(jaccard(pages[number], text) for number, text in near.items()) > 0.9
    assert 0.1 < max(jaccard(pages[number], text) for number, text in far.items()) < 0.3
    texts = [*pages, *near.values(), *far.values()]
    page_of = dict(zip(texts, range(len(texts)), strict=True)) | {text: number for number, text in near.items()}
    order = random.Random(1).sample(texts, len(texts))
    (tmp_path / "in").mkdir()
    for number in range(4):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", order[number::4])
    assert main(command(tmp_path / "in", tokenizer, tmp_path, "--tasks", tasks, "--no-quality")) == 0
    page_of_tokens = dict(zip(encoded(tokenizer, texts), (page_of[text] for text in texts), strict=True))
    left = [page_of_tokens[tokens] for found in tokens_by_source(tmp_path / "out" / "d").values() for tokens in found]
    assert len(left) == len(set(left)), "a copy was missed"
    assert set(left) == set(page_of.values()), "a page was lost"


def jaccard(one: str, other: str) -> float:
    """Similarity of two texts' runs of five words."""
    first, second = ({tuple(text.lower().split()[n : n + 5]) for n in range(196)} for text in (one, other))
    return len(first & second) / len(first | second)


def start(words: list[str], log: Path) -> subprocess.Popen:
    run = [sys.executable, "-m", "sambalm.data_pipeline.recipes.web", *words]
    with log.open("w") as file:
        return subprocess.Popen(run, stdout=file, stderr=file, start_new_session=True)


def test_killed_in_every_stage_it_goes_on_to_the_same_bytes(tmp_path, folder, tokenizer, whole):
    """With two workers in place of one, too: the shards depend on the tasks alone."""
    words = command(folder, tokenizer, tmp_path, "--tasks", 4, "--workers", 2)
    logs = tmp_path / "work" / "logs"
    moments = [
        lambda: any((tmp_path / "work" / "kept").glob("*")),
        lambda: any((logs / "signatures" / "completions").glob("*")),
        lambda: any((tmp_path / "out").glob("*_00001.idx")),
    ]
    killed = 0
    for reached in moments:
        process = start(words, tmp_path / "log")
        while process.poll() is None and not reached():
            time.sleep(0.001)
        killed += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out" / "d.json").exists()
    assert killed == len(moments)
    process = start(words, tmp_path / "log")
    assert process.wait(timeout=300) == 0
    assert (tmp_path / "log").read_text().count("already been completed") >= 4  # stages with nothing left to do
    found, expected = contents(tmp_path / "out" / "d"), contents(whole)
    assert [*found] == [*expected]
    assert [name for name in found if found[name] != expected[name]] == []


def test_without_deduplication_any_number_of_tasks_writes_the_same_files_in_another_order(tmp_path, folder, tokenizer):
    found = []
    for tasks in (1, 4, 7):
        place = tmp_path / str(tasks)
        assert main(command(folder, tokenizer, place, "--tasks", tasks, "--no-deduplicate", "--no-quality")) == 0
        found.append(tokens_by_source(place / "out" / "d"))
    assert [*found[0]] == ["0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl", "4.jsonl"]
    assert [*found[1]] == ["0.jsonl", "4.jsonl", "1.jsonl", "2.jsonl", "3.jsonl"]
    assert found[0] == found[1] == found[2]
    assert sum(map(len, found[0].values())) == 110


GIBBERISH = "x1 y2 #### " * 80
REPETITION = "The cat sat on the mat and looked at the dog of the house with one eye. " * 8


def write_warc(path: Path, texts: list[str]) -> None:
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for number, text in enumerate(texts):
            paragraphs = "".join(f"<p>{sentence}.</p>" for sentence in text.removesuffix(".").split(". "))
            html = f"<html><head><title>{number}</title></head><body><article>{paragraphs}</article></body></html>"
            http = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.1")
            payload = {"WARC-Identified-Payload-Type": "text/html"}
            record = writer.create_warc_record(
                f"http://example.org/{number}",
                "response",
                payload=io.BytesIO(html.encode()),
                http_headers=http,
                warc_headers_dict=payload,
            )
            writer.write_record(record)


def write_parquet(path: Path, texts: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


@pytest.mark.parametrize(
    ("kind", "name", "write"),
    [
        ("jsonl", "a.jsonl", write_jsonl),
        ("parquet", "a.parquet", write_parquet),
        ("warc", "a.warc.gz", write_warc),
    ],
)
def test_every_format_is_read_and_bad_pages_are_left_out(tmp_path, tokenizer, kind, name, write):
    if kind == "warc":
        pytest.importorskip("magic", reason="libmagic is missing", exc_type=ImportError)
    pages = make_pages(5, words=200, seed=1)
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / name, [pages[0], GIBBERISH, *pages[1:3], REPETITION, *pages[3:]])
    words = command(tmp_path / "in", tokenizer, tmp_path, "--no-deduplicate")
    words[words.index("jsonl")] = kind
    assert main(words) == 0
    (tokens,) = tokens_by_source(tmp_path / "out" / "d").values()
    texts = [page.replace(". ", ".\n") if kind == "warc" else page for page in pages]
    assert tokens == encoded(tokenizer, texts)


def test_a_recipe_says_what_is_wrong_in_one_sentence(tmp_path, folder, tokenizer, whole, capsys):
    def said(words: list[str]) -> str:
        capsys.readouterr()
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    place = whole.parents[1]
    before = contents(whole)
    assert "other values of quality, tasks" in said(command(folder, tokenizer, place, "--tasks", 3, "--no-quality"))
    assert "holds no file for --glob '*.txt'" in said(command(folder, tokenizer, tmp_path, "--glob", "*.txt"))
    assert "holds no file; give" in said(command(tmp_path / "none", tokenizer, tmp_path))
    assert "tasks=0" in said(command(folder, tokenizer, tmp_path, "--tasks", 0))
    other = tmp_path / "other.model"
    assert "other.model" in said([*command(folder, tokenizer, tmp_path), "--tokenizer", str(other)])
    assert "workers=0" in said(command(folder, tokenizer, tmp_path, "--workers", 0))
    assert "'zz'" in said(command(folder, tokenizer, tmp_path, "--language", "zz"))
    assert "--partition" in said(command(folder, tokenizer, tmp_path, "--executor", "slurm"))
    assert "d.json exists already" in said([*command(folder, tokenizer, place), "--work", str(tmp_path / "other")])
    assert main(command(folder, tokenizer, place, "--tasks", 4)) == 0  # all is done
    assert contents(whole) == before


def test_nothing_left_ends_in_one_sentence(tmp_path, tokenizer, capsys):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", [GIBBERISH])
    assert main(command(tmp_path / "in", tokenizer, tmp_path)) == 2
    assert "a task of the stage 'signatures' failed" in capsys.readouterr().err.splitlines()[-1]
