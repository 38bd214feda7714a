"""Texts that grow together are those that each grows to alone."""

import pytest
import torch

from sambalm.evaluation.models.loading import open_model
from sambalm.evaluation.tasks.generation import Context, continued_texts
from tests.conftest import VOCAB_SIZE


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
