"""What clients get: answers and events in OpenAI's form."""

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from sambalm.pretrain.serving.errors import RequestError

DONE = "data: [DONE]\n\n"
_FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


def error_content(error: RequestError) -> dict[str, Any]:
    """Returns an error as OpenAI's clients read it."""
    return {
        "error": {"message": str(error), "type": error.kind, "param": error.parameter, "code": error.code},
    }


def usage(*, prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Returns the counts of an answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def event(content: Mapping[str, Any]) -> str:
    """Returns an event of a stream."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class Reply:
    """The form of the answers to one request: of completions, or of chats."""

    def __init__(self, model: str, *, is_chat: bool) -> None:
        self._is_chat = is_chat
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._model, self._created = model, int(time.time())

    def _content(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def whole(self, texts: list[str], reasons: list[str], counts: Mapping[str, int]) -> dict[str, Any]:
        """Returns the answer that has every text, each with the reason of its end."""
        choices = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            shown = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
            choices.append({"index": index, **shown, "logprobs": None, "finish_reason": _FINISH[reason]})
        content = self._content("chat.completion" if self._is_chat else "text_completion", choices)
        return content | {"usage": counts}

    def first(self, index: int) -> dict[str, Any] | None:
        """Returns the event that opens a text, which a chat has."""
        return self._event(index, {"role": "assistant", "content": ""}, None) if self._is_chat else None

    def piece(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """Returns the event of a piece of a text."""
        delta = {"content": text} if text else {}
        return self._event(index, delta if self._is_chat else {"text": text}, reason)

    def _event(self, index: int, content: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
        shown = {"delta": content} if self._is_chat else content
        choice = {"index": index, **shown, "logprobs": None, "finish_reason": _FINISH[reason] if reason else None}
        return self._content("chat.completion.chunk" if self._is_chat else "text_completion", [choice])

    def counts(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Returns the event with the counts, which has no text."""
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return self._content(kind, []) | {"usage": counts}
