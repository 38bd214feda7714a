"""Greedy texts after contexts, up to strings that end them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sambalm.evaluation.models.base import LanguageModel, Reader
from sambalm.pretrain.generation.text import StopStrings


@dataclass(frozen=True)
class Context:
    """What a text begins with, and where it ends.

    Attributes:
        ids: at least one.
        stops: strings before which the text ends.
    """

    ids: Sequence[int]
    stops: Sequence[str]
    max_new_tokens: int


def continued_texts(
    model: LanguageModel, contexts: Sequence[Context], *, tick: Callable[[int], None] = lambda _: None
) -> list[str]:
    """Continues contexts with the likeliest token each time.

    Each context is read by itself; then all are stepped together where the model's rows can be of different lengths.

    Args:
        tick: is told the tokens of the contexts that are read.
    """
    if len(contexts) == 1 or not model.joins_rows:
        return [_stepped(model, _read(model, context, tick), [context])[0] for context in contexts]
    return _stepped(model, model.joined([_read(model, context, tick) for context in contexts]), contexts)


def _read(model: LanguageModel, context: Context, tick: Callable[[int], None]) -> Reader:
    reader = model.new_reader(1)
    reader.read(torch.tensor([list(context.ids)]), progress=tick)
    return reader


def _stepped(model: LanguageModel, reader: Reader, contexts: Sequence[Context]) -> list[str]:
    texts, logits = [_Text(model, context) for context in contexts], reader.logits
    while logits is not None:
        tokens = logits.argmax(dim=-1)
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.take(token)
        logits = None if all(text.ends for text in texts) else reader.step(tokens)
    return [text.whole() for text in texts]


class _Text:
    """A text that grows by a token at a time until it ends."""

    def __init__(self, model: LanguageModel, context: Context) -> None:
        self._eos_ids, self._left = model.eos_ids, context.max_new_tokens
        self._stream, self._stop, self._shown = model.new_text(), StopStrings(context.stops), ""
        for number in context.ids:
            self._stream.push(number)
        self._stream.flush()
        self.ends = False

    def take(self, token: int) -> None:
        if self.ends:
            return
        self._left -= 1
        self.ends = token in self._eos_ids or self._left == 0
        if token not in self._eos_ids:
            self._shown += self._stop.push(self._stream.push(token))
            self.ends = self.ends or self._stop.found

    def whole(self) -> str:
        if self._stop.found:
            return self._shown
        self._shown += self._stop.push(self._stream.flush())
        return self._shown if self._stop.found else self._shown + self._stop.finish()
