"""The routes of the server, in OpenAI's form."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sambalm.pretrain.generation.errors import GenerationError
from sambalm.pretrain.generation.rows import Settings
from sambalm.pretrain.generation.source import Source
from sambalm.pretrain.serving.bodies import COMPLETION_TOKENS, MAX_PROMPTS, Body, ChatBody, CompletionBody, checked
from sambalm.pretrain.serving.engine import Engine, Job, Piece
from sambalm.pretrain.serving.errors import RequestError
from sambalm.pretrain.serving.replies import DONE, Reply, error_content, event, usage

MAX_BODY_BYTES = 64 * 2**20
CLIENT_GONE = 499  # nobody reads the answer that has it


@dataclass(frozen=True)
class Served:
    """What is served, and under which name and limit."""

    source: Source
    name: str
    max_tokens: int


def make_app(served: Served, engine: Engine) -> Starlette:
    """Returns the application over a running engine."""
    api = _Api(served, engine)
    return Starlette(
        routes=[
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/health", api.health),
        ],
        exception_handlers={RequestError: _answer_error, HTTPException: _answer_http_error, Exception: _answer_failure},
    )


class _Api:
    def __init__(self, served: Served, engine: Engine) -> None:
        self._served, self._source, self._engine = served, served.source, engine
        self._since = int(time.time())
        self._tokenizing = threading.Lock()  # a template's text is encoded under another setting of the tokenizer

    async def completions(self, request: Request) -> Response:
        body = await self._body(CompletionBody, request)
        prompts = body.prompts()
        if not 0 < len(prompts) <= MAX_PROMPTS:
            raise RequestError(f"there are {len(prompts)} prompts: give 1 to {MAX_PROMPTS}", parameter="prompt")
        ids = await asyncio.to_thread(self._in_turn, lambda: [self._prompt_ids(prompt) for prompt in prompts])
        limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        return await self._answer(request, body, ids, limit=limit, is_chat=False)

    async def chat_completions(self, request: Request) -> Response:
        body = await self._body(ChatBody, request)
        chat = self._source.chat
        if chat is None:
            raise RequestError(
                "the model has no chat template, so it takes completions alone: convert it with --chat-template",
                parameter="messages",
                code="no_chat_template",
            )
        messages = [message.plain() for message in body.messages]
        try:
            ids = await asyncio.to_thread(self._in_turn, lambda: chat.encode(chat.render(messages)))
        except GenerationError as error:
            raise RequestError(str(error), parameter="messages") from error
        limit = body.max_completion_tokens or body.max_tokens or self._served.max_tokens
        return await self._answer(request, body, [self._known_ids(ids, "messages")], limit=limit, is_chat=True)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._refuse_other(request.path_params["name"])
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def _model(self) -> dict[str, Any]:
        return {"id": self._served.name, "object": "model", "created": self._since, "owned_by": "sambalm"}

    def _refuse_other(self, name: str) -> None:
        if name != self._served.name:
            raise RequestError(
                f"there is no model {name!r} here: ask for {self._served.name!r}",
                status=404,
                parameter="model",
                code="model_not_found",
            )

    async def _body(self, kind: type[Body], request: Request) -> Body:
        content = bytearray()
        async for piece in request.stream():
            content += piece
            if len(content) > MAX_BODY_BYTES:
                raise RequestError(f"the body has more than {MAX_BODY_BYTES} bytes: send less", status=413)
        try:
            body = checked(kind, orjson.loads(content))
        except orjson.JSONDecodeError as error:
            raise RequestError(f"the body is no JSON ({error}): send a JSON object") from error
        self._refuse_other(body.model)
        if (body.n or 1) > self._engine.max_rows:
            raise RequestError(f"n is {body.n}: ask for {self._engine.max_rows} texts at most", parameter="n")
        return body

    def _in_turn(self, encode: Callable[[], Any]) -> Any:
        with self._tokenizing:
            return encode()

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        return self._known_ids(self._source.encode(prompt) if isinstance(prompt, str) else prompt, "prompt")

    def _known_ids(self, ids: list[int], parameter: str) -> list[int]:
        if not ids:
            raise RequestError("there is no text to go on from: give at least one character", parameter=parameter)
        size = self._source.model.config.vocab_size
        unknown = next((number for number in ids if not 0 <= number < size), None)
        if unknown is not None:
            raise RequestError(f"{unknown} is no token: ids are 0 to {size - 1}", parameter=parameter)
        return ids

    async def _answer(
        self, request: Request, body: Body, prompts: Sequence[list[int]], *, limit: int, is_chat: bool
    ) -> Response:
        if limit > self._served.max_tokens:
            raise RequestError(
                f"max_tokens is {limit}: ask for {self._served.max_tokens} at most", parameter="max_tokens"
            )
        eos_ids = () if body.ignore_eos else self._source.eos_ids
        texts = _Texts(
            self._engine,
            prompts,
            Settings(body.sampling(), limit, body.stops(), eos_ids),
            samples=body.n or 1,
            echo=isinstance(body, CompletionBody) and bool(body.echo),
        )
        reply = Reply(self._served.name, is_chat=is_chat)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(_events(texts, reply, with_usage=with_usage), media_type="text/event-stream")
        whole = asyncio.ensure_future(_whole(texts, reply))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(await whole) if whole.done() else Response(status_code=CLIENT_GONE)
        finally:
            texts.cancel()
            whole.cancel()
            gone.cancel()


class _Texts:
    """The texts of one request while they are generated. The index of a text is that of its `choices`."""

    def __init__(
        self, engine: Engine, prompts: Sequence[list[int]], settings: Settings, *, samples: int, echo: bool
    ) -> None:
        self.count, self.completion_tokens = len(prompts) * samples, 0
        self.prompt_tokens = sum(len(ids) for ids in prompts)
        self._queue: asyncio.Queue[tuple[int, Piece | RequestError]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._jobs = [
            Job(ids, settings, samples, echo, self._deliver_from(number * samples))
            for number, ids in enumerate(prompts)
        ]
        try:
            for job in self._jobs:
                engine.submit(job)
        except RequestError:
            self.cancel()
            raise

    def _deliver_from(self, index: int) -> Callable[[Piece | RequestError], None]:
        def deliver(piece: Piece | RequestError) -> None:
            with suppress(RuntimeError):  # the server has ended
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        return deliver

    def cancel(self) -> None:
        """Ends what is not generated yet."""
        for job in self._jobs:
            job.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yields the index of a text and a piece of it, until every text has ended.

        Raises:
            RequestError: a text cannot be finished.
        """
        unfinished = self.count
        while unfinished:
            index, piece = await self._queue.get()
            if isinstance(piece, RequestError):
                raise piece
            if piece.reason:
                unfinished -= 1
                self.completion_tokens += piece.tokens
            yield index + piece.sample, piece

    def usage(self) -> dict[str, int]:
        """Returns the counts, once every text has ended."""
        return usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens)


async def _whole(texts: _Texts, reply: Reply) -> dict[str, Any]:
    parts: list[list[str]] = [[] for _ in range(texts.count)]
    reasons = [""] * texts.count
    async for index, piece in texts.pieces():
        parts[index].append(piece.text)
        reasons[index] = piece.reason or ""
    return reply.whole(["".join(pieces) for pieces in parts], reasons, texts.usage())


async def _events(texts: _Texts, reply: Reply, *, with_usage: bool) -> AsyncIterator[str]:
    try:
        for index in range(texts.count):
            opening = reply.first(index)
            if opening:
                yield event(opening)
        async for index, piece in texts.pieces():
            yield event(reply.piece(index, piece.text, piece.reason))
        if with_usage:
            yield event(reply.counts(texts.usage()))
        yield DONE
    except RequestError as error:
        yield event(error_content(error))
    finally:
        texts.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error_content(error), status_code=error.status)


def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = f"{request.method} {request.url.path} is not served here: {error.detail}"
    return JSONResponse(error_content(RequestError(sentence)), status_code=error.status_code, headers=error.headers)


def _answer_failure(request: Request, error: Exception) -> Response:
    failure = RequestError("the server failed on this request: its log has the reason", status=500, kind="server_error")
    return _answer_error(request, failure)
