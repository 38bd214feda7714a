"""A model that answers as a function of the text it has read, to test tasks by."""

from collections.abc import Callable

import torch
from torch import Tensor

from sambalm.data_pipeline.tokenizer import Tokenizer
from sambalm.evaluation.models.base import Identity, LanguageModel, Reader
from sambalm.model.hf.stream import Scores
from sambalm.pretrain.generation.text import TextStream, training_text


class Oracle(LanguageModel):
    """Says `answer(text)` after a text."""

    max_tokens = None
    begin_ids: list[int] = []  # noqa: RUF012
    begin_id = None
    device = torch.device("cpu")

    def __init__(self, tokenizer: Tokenizer, answer: Callable[[str], str]) -> None:
        self.answer, self._tokenizer = answer, tokenizer
        self.vocab_size, self.end_id = tokenizer.vocab_size, tokenizer.eos_id
        self.eos_ids = frozenset([tokenizer.eos_id])
        self.identity = Identity("oracle", "Oracle", 0, "float32", "cpu", "f" * 64)
        self.texts: list[str] = []

    def new_reader(self, rows: int) -> Reader:
        return _Reader(self, rows)

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def new_text(self) -> TextStream:
        return training_text(self._tokenizer)()


class _Reader(Reader):
    def __init__(self, model: Oracle, rows: int) -> None:
        self._model, self._rows, self._number = model, rows, 0

    def score(self, ids: Tensor, *, progress: Callable[[int], None] | None = None) -> Scores:
        raise NotImplementedError

    def read(self, ids: Tensor, *, progress: Callable[[int], None] | None = None) -> Tensor:
        texts = [self._model.decode(row) for row in ids.tolist()]
        self._model.texts += texts
        self._answers = [[*self._model.encode_next(self._model.answer(text)), self._model.end_id] for text in texts]
        if progress:
            progress(ids.numel())
        self.logits = self._logits()
        return self.logits

    def step(self, ids: Tensor) -> Tensor:
        self._number += 1
        self.logits = self._logits()
        return self.logits

    def _logits(self) -> Tensor:
        logits = torch.zeros(self._rows, self._model.vocab_size)
        for row, answer in enumerate(self._answers):
            logits[row, answer[min(self._number, len(answer) - 1)]] = 1
        return logits
