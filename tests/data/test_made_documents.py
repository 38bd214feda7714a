"""Passkeys and phone books: what they ask for is in them once, at every depth, and the answers alone count."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

from sambalm.data_pipeline import made_documents
from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.encoding import NotProven
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.made_documents import MadeConfig, Maker, Passkey, Phonebook, make_documents
from sambalm.data_pipeline.sources import open_sources
from sambalm.data_pipeline.verify import verify

DOCUMENTS = 80


def make(maker: Maker, tokenizer, prefix: Path, **changes):
    options = {"documents": DOCUMENTS, "tokens": 700, "seed": 5} | changes
    return make_documents(maker, MadeConfig(tokenizer.path, **options), prefix)


def documents(prefix: Path, tokenizer) -> list[tuple[str, list[str], int]]:
    """Of each document its text, the texts that count, and its tokens."""
    (source,) = open_sources(DataConfig(train="unused", validation=str(prefix), sequence_length=8).separate_validation)
    stream = source.stream(held_out=False)
    found, start = [], 0
    for end in stream.document_ends().tolist():
        ids, counts = stream.read(start, end - start), stream.counts(start, end - start)
        assert ids[-1] == tokenizer.eos_id
        runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(counts)) + 1)
        answers = [tokenizer.decode(ids[run].tolist()).strip() for run in runs if counts[run[0]]]
        found.append((tokenizer.decode(ids.tolist()), answers, len(ids)))
        start = end
    return found


def test_a_passkey_is_hidden_at_every_depth_and_asked_for_at_the_end(tokenizer, tmp_path):
    make(Passkey(), tokenizer, tmp_path / "d")
    keys, depths, ends = set(), [], []
    for text, answers, tokens in documents(tmp_path / "d", tokenizer):
        (key,) = set(re.findall(r"\d{5}", text))
        assert text.startswith("There is an important info hidden inside a lot of irrelevant text.")
        assert f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n" in text
        assert text.endswith(f"\nWhat is the pass key? The pass key is {key}.")
        assert answers == [f"{key}."]
        assert 600 < tokens <= 700
        keys.add(key)
        depths.append(text.index("Remember") / len(text))
        ends.append(text.split("\n")[-2][-1])
        assert " \n" not in text
    assert (
        0.5 < sum(end != "." for end in ends) / DOCUMENTS < 1.0
    )  # most end within a sentence, as texts of exact lengths
    assert len(keys) > DOCUMENTS - 5
    assert min(depths) < 0.25
    assert max(depths) > 0.75


def test_a_phone_book_asks_for_three_of_its_names(tokenizer, tmp_path):
    make(Phonebook(), tokenizer, tmp_path / "d")
    asked = []
    for text, answers, tokens in documents(tmp_path / "d", tokenizer):
        book, questions = text.split("\n\n")
        numbers = dict(line.split(": ") for line in book.split("\n"))
        assert all(re.fullmatch(r"\d{10}", number) for number in numbers.values())
        header, *lines = questions.split("\n")
        assert header == "Numbers from the phonebook above:"
        lines = [line.split(": ") for line in lines]
        assert len({name for name, _ in lines}) == 3
        assert [numbers[name] for name, _ in lines] == [number for _, number in lines] == answers
        assert 600 < tokens <= 700
        asked += [list(numbers).index(name) / len(numbers) for name, _ in lines]
    assert min(asked) < 0.1
    assert max(asked) > 0.9


@pytest.mark.parametrize("maker", [Passkey(), Phonebook()])
def test_they_follow_from_the_seed_alone(maker, tokenizer, tmp_path, monkeypatch):
    """Whether or not the fast tokenizer is taken, and however shards divide them."""
    make(maker, tokenizer, tmp_path / "one")
    make(maker, tokenizer, tmp_path / "other", seed=6)

    def unproven(*_):
        raise NotProven("for this test")

    monkeypatch.setattr(made_documents.FastPath, "proven", unproven)
    manifest = make(maker, tokenizer, tmp_path / "many", shard_tokens=5000)
    assert len(manifest.shards) > 5
    assert sum(shard.sources[0].records for shard in manifest.shards) == DOCUMENTS
    assert max(shard.tokens for shard in manifest.shards) <= 5000
    assert documents(tmp_path / "one", tokenizer) == documents(tmp_path / "many", tokenizer)
    assert documents(tmp_path / "one", tokenizer)[0] != documents(tmp_path / "other", tokenizer)[0]
    assert verify(tmp_path / "many").problems == []


@pytest.mark.parametrize("maker", [Passkey(), Phonebook()])
def test_as_many_units_as_fit_with_the_end_of_text(maker, tokenizer, tmp_path):
    text = "".join(part for part, _ in maker.document(random.Random(0), 9))
    tokens = len(tokenizer.encode(text)) + 1
    for room, units in ((tokens, 9), (tokens - 1, 8)):
        config = MadeConfig(tokenizer.path, documents=1, tokens=room)
        assert made_documents._Writer(maker, config, tokenizer)._size == units


@pytest.mark.parametrize(("size", "words"), [(700, 2), (701, 4)])
def test_names_have_initials_where_there_would_be_too_few(size, words):
    book, _ = Phonebook().document(random.Random(0), size)[0][0].split("\n\n")
    names = {line.split(":")[0] for line in book.split("\n")}
    assert len(names) == size
    assert {len(name.split()) for name in names} == {words}


def test_all_tokens_count_where_that_is_asked_for(tokenizer, tmp_path):
    make(Passkey(), tokenizer, tmp_path / "d", loss="all", documents=3)
    assert not list(tmp_path.glob("*.mask"))
    assert all(len(answers) == 1 for _, answers, _ in documents(tmp_path / "d", tokenizer))


def test_what_cannot_be_made_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"a passkey document of 60 tokens has no room .* give more tokens a document"):
        make(Passkey(), tokenizer, tmp_path / "d", tokens=60)
    assert not list(tmp_path.iterdir())
    make(Phonebook(), tokenizer, tmp_path / "d", documents=2)
    with pytest.raises(DataError, match=r"d\.json exists already"):
        make(Phonebook(), tokenizer, tmp_path / "d", documents=2)
    config = MadeConfig(tokenizer.path, documents=1, tokens=300, loss="all")
    make_documents(Passkey(), config, tmp_path / "d", overwrite=True)
    assert not list(tmp_path.glob("*.mask"))  # of what was there before
    assert len(documents(tmp_path / "d", tokenizer)) == 1
