"""What clients send: the bodies of requests in OpenAI's form, checked.

Fields that would change the answer and cannot be honoured are refused, unknown ones too; those that say nothing of the
text are ignored.
"""

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, cast

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from sambalm.pretrain.errors import one_sentence
from sambalm.pretrain.generation.sampling import Sampling
from sambalm.pretrain.serving.errors import RequestError

COMPLETION_TOKENS = 16  # of a completion that names no number, as OpenAI has it
MAX_STOPS = 16
MAX_PROMPTS = 128
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields that are not there yet, and the values beside null with which they ask for nothing."""
IGNORED = {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}


class StreamOptions(BaseModel):
    """What a stream of events has besides text."""

    include_usage: bool = False


class _Body(BaseModel):
    """What both kinds of request have. Fields that OpenAI does not have are vLLM's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self) -> Sampling:
        """Returns how tokens are drawn: OpenAI's defaults, and another seed each time where none is given."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=secrets.randbits(62) if self.seed is None else self.seed,
        )

    def stops(self) -> list[str]:
        """Returns the strings before which a text ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionBody(_Body):
    """A request to go on from texts."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None

    def prompts(self) -> Sequence[str | list[int]]:
        """Returns the texts or lists of ids to go on from."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        are_ids = bool(self.prompt) and isinstance(self.prompt[0], int)
        return cast(Sequence[str | list[int]], [self.prompt] if are_ids else self.prompt)


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """What somebody said in a chat."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """Returns the message as templates take it."""
        content = self.content
        return {"role": self.role, "content": content if isinstance(content, str) else "".join(p.text for p in content)}


class ChatBody(_Body):
    """A request for the next answer in a chat."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


Body = TypeVar("Body", bound=_Body)


def checked(kind: type[Body], content: Any) -> Body:
    """Returns the body of a request.

    Raises:
        RequestError: names the field that is wrong.
    """
    if not isinstance(content, dict):
        raise RequestError("the body is no JSON object: send one with the fields of the request")
    for name, neutral in NEUTRAL.items():
        value = content.get(name)
        if value is not None and (type(value), value) not in [(type(one), one) for one in neutral]:
            raise RequestError(f"{name} is not supported: leave it out", parameter=name, code="unsupported_parameter")
    content = {name: value for name, value in content.items() if name not in {*NEUTRAL, *IGNORED}}
    try:
        return kind.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        field = str(first["loc"][0]) if first["loc"] else None
        raise RequestError(one_sentence(f"{place}: {first['msg']}"), parameter=field) from None
