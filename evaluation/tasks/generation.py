"""Greedy text after a context, up to a string that ends it."""

from collections.abc import Callable, Sequence

import torch

from sambalm.evaluation.models.base import LanguageModel
from sambalm.pretrain.generation.text import StopStrings


def continued_text(
    model: LanguageModel,
    ids: Sequence[int],
    *,
    stops: Sequence[str],
    max_new_tokens: int,
    tick: Callable[[int], None] = lambda _: None,
) -> str:
    """Continues ids with the likeliest token each time.

    Args:
        ids: of the context, at least one.
        stops: strings before which the text ends.
        tick: is told the tokens of the context that are read.
    """
    reader, text, end = model.new_reader(1), model.new_text(), StopStrings(stops)
    for number in ids:
        text.push(number)
    text.flush()
    logits, shown = reader.read(torch.tensor([list(ids)]), progress=tick), ""
    for number in range(max_new_tokens):
        token = logits.argmax(dim=-1)
        if int(token) in model.eos_ids:
            break
        shown += end.push(text.push(int(token)))
        if end.found:
            return shown
        if number + 1 < max_new_tokens:
            logits = reader.step(token)
    shown += end.push(text.flush())
    return shown if end.found else shown + end.finish()
