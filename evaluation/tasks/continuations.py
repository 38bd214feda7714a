"""How likely a model finds continuations of contexts, in rows of different lengths."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sambalm.evaluation.models.base import LanguageModel

Ids = list[int]


@dataclass(frozen=True)
class Continuation:
    """What a model says of a continuation.

    Args:
        log_likelihood: natural logarithm of its probability after the context.
        is_greedy: whether each of its tokens was the likeliest.
    """

    log_likelihood: float
    is_greedy: bool


def encode_pair(model: LanguageModel, context: str, continuation: str) -> tuple[Ids, Ids]:
    """Returns the ids of a context, at least one, and those that a continuation adds to it.

    Spaces at the context's end count for the continuation, because tokens begin with spaces. Where there is no context,
    the token stands there that the tokenizer begins a text with, or else the one that ends a text.
    """
    kept = context.rstrip(" ")
    continuation, context = context[len(kept) :] + continuation, kept
    before = model.encode_first(context)
    if context:
        return before, model.encode_first(context + continuation)[len(before) :]
    begin = before or ([] if model.end_id is None else [model.end_id])
    ids = model.encode(continuation)
    return (begin, ids) if begin else (ids[:1], ids[1:])


def continuation_scores(model: LanguageModel, pairs: Sequence[tuple[Ids, Ids]]) -> list[Continuation]:
    """Reads pairs of contexts and continuations together, padded at their ends, which no token before sees."""
    rows = [[*context, *continuation] for context, continuation in pairs]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    scores = model.new_reader(len(rows)).score(ids)
    likelihoods, is_likeliest = scores.log_likelihoods.double().cpu(), scores.is_likeliest.cpu()
    found = []
    for number, (context, row) in enumerate(zip((context for context, _ in pairs), rows, strict=True)):
        places = slice(len(context), len(row))
        found.append(Continuation(float(likelihoods[number, places].sum()), bool(is_likeliest[number, places].all())))
    return found
