"""Texts that grow together are those that each grows to alone."""

import codecs

import pytest
import torch

from sambalm.evaluation.models.loading import open_model
from sambalm.evaluation.tasks.generation import Context, continued_texts
from tests.conftest import VOCAB_SIZE
from tests.evaluation import oracle
from tests.evaluation.oracle import Oracle


@pytest.mark.parametrize("kind", ["samba", "llama"])
@torch.no_grad()
def test_contexts_of_other_lengths_are_continued_together_as_alone(kind, hf_folders, monkeypatch):
    model = open_model(hf_folders[kind], device="cpu", dtype=None, tokenizer=None).model
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (1, 9, 40, 9)]
    limits = (12, 3, 12, 7)
    alone = [continued_texts(model, [Context(one, (), limit)])[0] for one, limit in zip(ids, limits, strict=True)]
    assert len(set(alone)) == len(alone)
    stop = alone[2][len(alone[2]) // 2 :]  # in one text, and perhaps in others
    contexts = [Context(one, (stop,), limit) for one, limit in zip(ids, limits, strict=True)]
    expected = [continued_texts(model, [context])[0] for context in contexts]
    assert expected[2] == alone[2][: len(alone[2]) // 2]
    read: list[int] = []
    assert continued_texts(model, contexts, tick=read.append) == expected
    assert sum(read) == 59
    assert model.joins_rows == (kind == "samba")
    model.eos_ids = frozenset(
        model.encode(alone[0])[:1]
    )  # with which the first text now ends at once, or one beside it
    assert continued_texts(model, contexts) == [continued_texts(model, [context])[0] for context in contexts]


def test_a_text_keeps_the_space_that_parts_it_from_its_context(tokenizer):
    model = Oracle(tokenizer, lambda _: " one two")
    assert continued_texts(model, [Context(model.encode("a"), (), 20)]) == [" one two"]


class Bytes:
    """A text of a model whose tokens are its bytes, as a tokenizer's may be; 300 is a letter and half a character."""

    def __init__(self):
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id):
        return self.utf8.decode(b"d\xc3" if token_id == 300 else bytes([token_id]))

    def flush(self):
        return self.utf8.decode(b"", final=True)


@pytest.mark.parametrize(
    ("said", "stops", "limit", "text", "steps"),
    [
        ("abcdef", ("d",), 20, "abc", 3),
        ("abcdef", ("de", "x"), 20, "abc", 4),
        ("abc300", ("d",), 20, "abc", 3),
        ("abcdef", ("fg",), 20, "abcdef", 6),  # what might have begun a stop belongs to the text
        ("abcdef", (), 4, "abcd", 3),
        ("ab", (), 20, "ab", 2),
        ("aé", (), 2, "a\ufffd", 1),  # half of a character
        ("aé", ("\ufffd",), 2, "a", 1),
        ("aé", ("a\ufffd",), 3, "aé", 2),
    ],
)
def test_a_text_ends_once_it_is_whole(said, stops, limit, text, steps, tokenizer, monkeypatch):
    """After a context that ends with half of a character; no more steps are taken than it needs."""
    model, stepped = Oracle(tokenizer, str), []
    monkeypatch.setattr(model, "new_text", Bytes)
    model.eos_ids = frozenset([0])

    def read(self, ids, *, progress=None):
        letters, several, _ = said.partition("300")
        self._answers = [[*letters.encode(), *([300] if several else []), 0]]
        progress(ids.numel())
        self.logits = self._logits()

    def step(self, ids):
        stepped.append(ids)
        self._number += 1
        return self._logits()

    monkeypatch.setattr(oracle._Reader, "read", read)
    monkeypatch.setattr(oracle._Reader, "step", step)
    read_tokens: list[int] = []
    context = Context([*"dé".encode()[:-1]], stops, limit)
    assert continued_texts(model, [context], tick=read_tokens.append) == [text]
    assert (len(stepped), read_tokens) == (steps, [2])
