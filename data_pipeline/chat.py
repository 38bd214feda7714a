"""Conversations to ids by a chat template, and which of them the assistant says.

A template is jinja, as transformers' `apply_chat_template` takes it. What a message adds to the conversation is
what its rendering has beyond that of the messages before it, with the prompt for the assistant's turn before an answer.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import DataError, first_line
from .loss_mask import counts_of_parts
from .tokenizer import Tokenizer

ASSISTANT: Final = "assistant"
Message = dict[str, Any]
# Put into a control token that a message writes out, so that it stays text. No text has it: Unicode keeps it for this.
_WITHIN_TEXT = "\ufdd0"


class ChatError(Exception):
    """Why a conversation cannot be trained on, as a part of a sentence."""


@dataclass(frozen=True)
class ChatOptions:
    """How conversations become ids: the template's text, and whether only the assistant's tokens count in the loss."""

    template: str
    loss: Literal["assistant", "all"] = ASSISTANT


class ChatTemplate:
    """A template, compiled; it can do nothing but render."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        """Raises DataError where the text is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.globals["raise_exception"] = _refuse
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._tokens = {name: tokenizer.piece(token_id) if token_id >= 0 else "" for name, token_id in ids.items()}
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise DataError(f"the chat template is no jinja template ({first_line(error)}); mend it") from error

    def parts(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """The conversation as pieces of text, each with whether the assistant says it.

        Raises ChatError where the template refuses it, or changes what it made of earlier messages.
        """
        whole, done, parts = self._render(messages), 0, []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            prompt = self._render(messages[:number], add_generation_prompt=True) if number else ""
            answered = self._render(messages[: number + 1])
            if not (whole.startswith(answered) and answered.startswith(prompt)) or len(prompt) < done:
                raise ChatError(
                    f"the chat template writes what is before message {number + 1} in another way once that is there, "
                    "so that what the assistant says cannot be told apart"
                )
            parts += [(whole[done : len(prompt)], False), (whole[len(prompt) : len(answered)], True)]
            done = len(answered)
        return [(text, counts) for text, counts in [*parts, (whole[done:], False)] if text]

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the assistant's answer begins. Raises ChatError where it is refused."""
        return self._render(messages, add_generation_prompt=True)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._tokens)
        except TemplateError as error:
            raise ChatError(f"the chat template refuses it ({first_line(error)})") from error
        except Exception as error:  # whatever a template does with values that it did not expect
            raise ChatError(f"the chat template fails ({type(error).__name__}: {first_line(error)})") from error


class ChatEncoder:
    """Turns conversations into ids.

    Control tokens in the template's own text are taken for what they name, those that a message writes out are not.
    """

    def __init__(self, options: ChatOptions, tokenizer: Tokenizer, *, append_eos: bool) -> None:
        """Raises DataError where the template is none."""
        self._template, self._tokenizer = ChatTemplate(options.template, tokenizer), tokenizer
        self._append_eos, self._counts_all = append_eos, options.loss == "all"
        literals = sorted((one for one in tokenizer.literals if one), key=len, reverse=True)
        self._literals = re.compile("|".join(map(re.escape, literals)) or r"(?!)")

    def encode(self, messages: Any) -> tuple[list[int], list[bool]]:
        """Ids, and of each whether it counts in the loss. Raises ChatError for no conversation to learn from."""
        checked = _checked(messages)
        if not self._counts_all and not any(message["role"] == ASSISTANT for message in checked):
            raise ChatError("no message has the role 'assistant', so there is nothing to learn")
        parts = self._template.parts([self._as_text(message) for message in checked])
        ids: list[int] = []
        counts: list[bool] = []
        for run in self._runs(parts):
            if isinstance(run, tuple):
                run_ids, run_counts = [self._tokenizer.id_of(run[0])], [run[1]]
            else:
                run_ids, run_counts = self._encode_text(run.parts)
            ids += run_ids
            counts += run_counts
        if self._append_eos and (not ids or ids[-1] != self._tokenizer.eos_id):
            ids.append(self._tokenizer.eos_id)
            counts.append(checked[-1]["role"] == ASSISTANT)
        return ids, [True] * len(ids) if self._counts_all else counts

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text of a conversation up to where the assistant's answer begins, for `encode_prompt`.

        Raises ChatError where the template refuses it.
        """
        return self._template.prompt([self._as_text(message) for message in messages])

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of such a text, or of its end."""
        ids: list[int] = []
        for run in self._runs([(text, False)]):
            ids += [self._tokenizer.id_of(run[0])] if isinstance(run, tuple) else self._encode_text(run.parts)[0]
        return ids

    def _as_text(self, message: Message) -> Message:
        content = self._literals.sub(lambda found: found[0][:1] + _WITHIN_TEXT + found[0][1:], message["content"])
        return {**message, "content": content}

    def _runs(self, parts: Sequence[tuple[str, bool]]) -> "list[_Text | tuple[str, bool]]":
        """Stretches of text between control tokens, and these, each with whether it counts."""
        runs: list[_Text | tuple[str, bool]] = []
        for text, counts in parts:
            position = 0
            for found in itertools.chain(self._literals.finditer(text), [None]):
                plain = text[position : found.start() if found else len(text)].replace(_WITHIN_TEXT, "")
                if plain:
                    if not (runs and isinstance(runs[-1], _Text)):
                        runs.append(_Text([]))
                    runs[-1].parts.append((plain, counts))  # type: ignore[union-attr]
                if found:
                    runs.append((found[0], counts))
                    position = found.end()
        return runs

    def _encode_text(self, parts: Sequence[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
        """Encodes text as a whole, as whoever talks to the model does; a token across parts is the later one's."""
        prefixes = self._tokenizer.encode_batch(list(itertools.accumulate(text for text, _ in parts)))
        return prefixes[-1], counts_of_parts(prefixes, [counted for _, counted in parts])


@dataclass(frozen=True)
class _Text:
    """Text without control tokens, in parts that each count in the loss or do not."""

    parts: list[tuple[str, bool]]


def _checked(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise ChatError("its messages are no list with at least one message")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise ChatError(f"message {number} is {type(message).__name__}, not an object with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ChatError(f"message {number} has no {key!r} that is a string")
        if _WITHIN_TEXT in message["content"]:
            raise ChatError(f"message {number} holds U+FDD0, which is no character of any text")
        try:
            message["content"].encode("utf-8")
        except UnicodeEncodeError:
            raise ChatError(f"message {number} holds an unpaired surrogate") from None
    return messages


def _refuse(reason: str) -> None:
    raise TemplateError(reason)


class _Generation(Extension):
    """The tags {% generation %} and {% endgeneration %} of transformers, which change nothing of the text."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 has it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def token_arrays(documents: Sequence[tuple[list[int], list[bool]]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 and what counts, bool, of all documents in a row."""
    ids = np.array([token for one, _ in documents for token in one], dtype=np.int64)
    return ids, np.array([counted for _, some in documents for counted in some], dtype=bool)
