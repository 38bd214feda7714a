"""What tasks may ask of a model.

B: rows, S: tokens, V: vocabulary.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sambalm.evaluation.errors import EvaluationError
from sambalm.model.hf.stream import Scores
from sambalm.pretrain.generation.text import TextStream

_PROBE = "The grass is green.\nKey: 12345; def f(x):\n    return x ** 2  # \u00e9t\u00e9, \u6f22\u5b57 \U0001f600\t<s>"
# The text before one whose ids should be those of a text that goes on: a letter, which joins no space and no newline.
_BEFORE = "a"


class Reader(ABC):
    """Rows of equal length that a model is reading, and its state after them. `logits` [B, V] are those of the end."""

    logits: Tensor | None

    @abstractmethod
    def score(self, ids: Tensor, *, progress: Callable[[int], None] | None = None) -> Scores:
        """Reads further tokens of every row, in pieces, with the state carried from piece to piece.

        Args:
            ids: int64 [B, S], on any device.
            progress: is told the tokens of each piece, of all rows.
        """

    @abstractmethod
    def read(self, ids: Tensor, *, progress: Callable[[int], None] | None = None) -> Tensor:
        """Reads further tokens as `score` does; returns the logits after the last of them, [B, V]."""

    @abstractmethod
    def step(self, ids: Tensor) -> Tensor:
        """Reads one token of every row, int64 [B]; returns the logits after it, [B, V]."""


@dataclass(frozen=True)
class Identity:
    """What results say of a model.

    Args:
        path: as the user named it.
        kind: name of its class.
        fingerprint: hexadecimal SHA-256 that other weights or another dtype change.
        step: of the checkpoint that the weights come from, None for a folder of weights alone.
    """

    path: str
    kind: str
    parameters: int
    dtype: str
    device: str
    fingerprint: str
    step: int | None = None


class LanguageModel(ABC):
    """A causal language model with its tokenizer.

    Attributes:
        identity: what it is.
        vocab_size: ids are below it.
        eos_ids: the tokens that end a text. `end_id` is the one that documents of training data end with, if any.
        begin_ids: what its tokenizer puts before a text.
        begin_id: the token that it names as the one that begins a text, if any, whether it puts it there or not.
        max_tokens: how many it can read, None for no limit.
        joins_rows: whether readers can be `joined`.
    """

    identity: Identity
    vocab_size: int
    eos_ids: frozenset[int]
    end_id: int | None
    begin_ids: list[int]
    begin_id: int | None
    max_tokens: int | None
    joins_rows: bool = False
    device: torch.device

    @abstractmethod
    def new_reader(self, rows: int) -> Reader:
        """Returns a reader that has read nothing."""

    def joined(self, readers: Sequence[Reader]) -> Reader:
        """Returns one reader with the rows of several, which may have read texts of different lengths."""
        raise NotImplementedError(f"{type(self).__name__} cannot step rows of different lengths together")

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of a text as `encode` does, whether the model knows them or not."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without tokens that only begin or end one.

        Raises:
            EvaluationError: the tokenizer is not the model's.
        """
        ids = self.tokenize(text)
        highest = max(ids, default=0)
        if highest >= self.vocab_size:
            raise EvaluationError(
                f"the tokenizer gives the id {highest}, but {self.identity.path} knows ids below {self.vocab_size}; "
                "give the tokenizer that it was trained with"
            )
        return ids

    @abstractmethod
    def new_text(self) -> TextStream:
        """Makes the text of a new list of ids; tokens that end a text add nothing."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        text = self.new_text()
        return "".join([*(text.push(number) for number in ids), text.flush()])

    def bytes_until(self, ids: Sequence[int]) -> np.ndarray:
        """Counts the bytes of text, in UTF-8, up to each token and with it, int64 [tokens].

        Those of a character count for the token that completes it.
        """
        text = self.new_text()
        sizes = [len(text.push(number).encode()) for number in ids]
        sizes[-1] += len(text.flush().encode())
        return np.cumsum(sizes, dtype=np.int64)

    def tokenizer_hash(self) -> str:
        """Returns a hexadecimal SHA-256 that another tokenizer would change: of the ids of a text of many kinds."""
        return hashlib.sha256(json.dumps(self.encode(_PROBE)).encode()).hexdigest()

    def encode_first(self, text: str) -> list[int]:
        """Returns the ids of a text that nothing stands before, with what the tokenizer puts there."""
        return [*self.begin_ids, *self.encode(text)]

    def encode_next(self, text: str) -> list[int]:
        """Returns the ids of a text that follows another one, which it must be parted from by a space or a newline."""
        before, both = self.encode(_BEFORE), self.encode(_BEFORE + text)
        return both[len(before) :] if both[: len(before)] == before else self.encode(text)


def greedy(
    model: LanguageModel, prompts: Tensor, *, max_new_tokens: int, progress: Callable[[int], None] | None = None
) -> list[list[int]]:
    """Continues prompts of equal length with the likeliest token each time.

    Args:
        prompts: int64 [B, S].
        progress: is told the tokens read, of all rows.

    Returns:
        the new ids of each row, without the token that ended it.
    """
    reader = model.new_reader(len(prompts))
    logits = reader.read(prompts, progress=progress)
    found: list[list[int]] = [[] for _ in range(len(prompts))]
    going_on = set(range(len(prompts)))
    for number in range(max_new_tokens):
        ids = logits.argmax(dim=-1)
        for row, token in enumerate(ids.tolist()):
            if row in going_on and token in model.eos_ids:
                going_on.remove(row)
            elif row in going_on:
                found[row].append(token)
        if not going_on or number + 1 == max_new_tokens:
            break
        logits = reader.step(ids)
    return found
