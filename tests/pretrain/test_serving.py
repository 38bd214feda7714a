"""`sambalm serve`: the stock openai client against a real process, whose texts are those of `sambalm generate`."""

import json
import queue
import re
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from openai import APIError, APITimeoutError, BadRequestError, InternalServerError, NotFoundError, OpenAI

from sambalm.model.hf import Stream, load_for_generation
from sambalm.model.hf.tokenizer import save_tokenizer
from sambalm.pretrain.generation.command import Request, generate_text
from sambalm.pretrain.generation.rows import Settings
from sambalm.pretrain.generation.sampling import Sampling
from sambalm.pretrain.generation.source import load_source
from sambalm.pretrain.serving import engine as engine_file
from sambalm.pretrain.serving.command import serve_model
from sambalm.pretrain.serving.engine import Engine, Job
from sambalm.pretrain.serving.errors import RequestError, ServingError
from sambalm.pretrain.serving.replies import Reply
from tests.pretrain.test_generated_text import sentencepiece_file
from tests.pretrain.test_generation import TEMPLATE
from tests.support import program
from tests.support.hf import RandomState, hf_model, tiny_config

PROMPTS = ["one", "don't stop", "  two spaces first, and a long prompt that is longer than the window of the model"]
EOS_ID = 341  # what follows the second prompt has it, and what follows the others has not
MAX_BATCH, MAX_TOKENS = 4, 100_000
ENDLESS = {"prompt": "one", "max_tokens": MAX_TOKENS, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder with random weights and a chat template."""
    path = tmp_path_factory.mktemp("serving") / "hf"
    path.mkdir()
    model = sentencepiece_file(path)
    save_tokenizer(model, path)
    model.unlink()
    config = tiny_config("M-*-", tie_embeddings=False, vocab_size=400)
    hf = hf_model(config, RandomState(config))
    hf.config.eos_token_id, hf.generation_config.eos_token_id = 2, [2, EOS_ID]
    hf.save_pretrained(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@contextmanager
def serving(folder, log, *options):
    with program.start("serve", folder, "--port", 0, "--name", "tiny", *options, log=log) as server:

        def address():
            return re.search(
                r"^serving tiny at (http://127\.0\.0\.1:\d+/v1) \(Ctrl-C ends it\)$", log.read_text(), re.M
            )

        program.wait_until(lambda: address() or server.poll() is not None, 60, log.read_text)
        assert server.poll() is None, log.read_text()
        yield server, OpenAI(base_url=address()[1], api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory) -> OpenAI:
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(folder, log, "--max-batch", MAX_BATCH, "--max-tokens", MAX_TOKENS) as (_, client):
        yield client
    assert "Traceback" not in log.read_text()


def complete(client, **options):
    return client.completions.create(model="tiny", **{"prompt": "one", "temperature": 0, "max_tokens": 20} | options)


@pytest.fixture
def generated(folder, capsys):
    """The records that `sambalm generate --json` prints."""

    def run(*prompts, samples=1, stops=(), max_new_tokens=20, **sampling):
        settings = Sampling(**{"temperature": 0} | sampling)
        generate_text(
            folder,
            Request(
                prompts, settings, samples=samples, stops=stops, max_new_tokens=max_new_tokens, echo=False, as_json=True
            ),
        )
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_greedy_texts_are_those_of_generate(client, generated):
    wanted = [record for prompt in PROMPTS for record in generated(prompt)]
    for prompt, record in zip(PROMPTS, wanted, strict=True):
        answer = complete(client, prompt=prompt)
        assert answer.choices[0].text == record["text"]
        assert answer.choices[0].finish_reason == {"length": "length", "eos": "stop"}[record["reason"]]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
            record["prompt_tokens"],
            record["tokens"],
        )
        pieces = list(complete(client, prompt=prompt, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == record["text"]
        assert len(pieces) > 2, "the text comes as it is made"
        assert [bool(piece.choices[0].finish_reason) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [record["reason"] for record in wanted] == ["length", "eos", "length"]
    ignoring = complete(client, prompt=PROMPTS[1], extra_body={"ignore_eos": True})
    assert (ignoring.choices[0].finish_reason, ignoring.usage.completion_tokens) == ("length", 20)
    several = complete(client, prompt=PROMPTS)
    assert [choice.text for choice in several.choices] == [record["text"] for record in wanted]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len({record["text"] for record in wanted}) == 3


def test_ids_as_prompts_and_echo(client, folder):
    ids = load_for_generation(folder)[1].encode(PROMPTS[1])
    text = complete(client, prompt=PROMPTS[1]).choices[0].text
    assert complete(client, prompt=ids).choices[0].text == text
    assert [choice.text for choice in complete(client, prompt=[ids, ids]).choices] == [text, text]
    assert complete(client, prompt=PROMPTS[1], echo=True).choices[0].text == PROMPTS[1] + text


def test_samples_and_seeds_are_those_of_generate(client, generated):
    extra = {"top_k": 50, "min_p": 0.001, "repetition_penalty": 1.3}
    records = generated("one", samples=3, seed=5, temperature=0.9, top_p=0.9, **extra)
    answer = complete(client, n=3, seed=5, temperature=0.9, top_p=0.9, extra_body=extra)
    assert [choice.text for choice in answer.choices] == [record["text"] for record in records]
    assert len({record["text"] for record in records}) == 3
    assert len({complete(client, temperature=1).choices[0].text for _ in range(3)}) == 3, "no seed: another each time"
    first = complete(client, seed=5, temperature=1).choices[0].text
    for all_tokens in ({"top_k": -1}, {"top_k": 0}, {"top_p": 1, "min_p": 0, "repetition_penalty": 1}):
        assert complete(client, seed=5, temperature=1, extra_body=all_tokens).choices[0].text == first


def test_stop_strings_end_before_themselves(client, generated):
    whole = generated("one")[0]["text"]
    stop = next(part for place in range(4, len(whole)) if whole.index(part := whole[place : place + 2]) == place)
    wanted = whole[: whole.index(stop)]
    for stops in (stop, ["never there", stop]):
        answer = complete(client, stop=stops)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (wanted, "stop")
        pieces = complete(client, stop=stops, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == wanted


def test_chats_follow_the_template(client, folder):
    model, tokenizer = load_for_generation(folder)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]},
    ]
    text = "<s>system: be brief</s><s>user: one two</s><s>assistant: "
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = False
    ids = backend.encode(text, add_special_tokens=False).ids
    assert ids.count(1) == 3
    made = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    wanted = tokenizer.decode([*ids, *made], skip_special_tokens=True).removeprefix(
        tokenizer.decode(ids, skip_special_tokens=True)
    )
    options = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 12}
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == wanted
    assert answer.usage.prompt_tokens == len(ids)
    pieces = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == wanted
    assert (pieces[-1].choices, pieces[-1].usage) == ([], answer.usage)


def test_eight_clients_at_once_get_what_they_would_get_alone(client):
    requests = [
        {
            "prompt": PROMPTS[number % 3],
            "seed": number,
            "temperature": 0 if number < 4 else 1,
            "max_tokens": 10 + number,
        }
        for number in range(8)
    ]

    def text(options):
        return complete(client, **options).choices[0].text

    def streamed(options):
        return "".join(piece.choices[0].text for piece in complete(client, **options, stream=True))

    alone = [text(options) for options in requests]
    with ThreadPoolExecutor(8) as pool:
        for make in (text, streamed, text):
            assert list(pool.map(make, requests)) == alone


def test_a_client_that_leaves_frees_its_place(client):
    for _ in range(MAX_BATCH):
        stream = complete(client, **ENDLESS, stream=True)
        next(iter(stream))
        stream.close()
    with pytest.raises(APITimeoutError):
        complete(client, **ENDLESS, n=MAX_BATCH, timeout=0.5)
    assert complete(client, timeout=20).choices[0].finish_reason


@pytest.mark.parametrize(
    ("options", "parameter", "message"),
    [
        ({"prompt": ""}, "prompt", "there is no text to go on from: give at least one character"),
        ({"prompt": []}, "prompt", "there are 0 prompts: give 1 to 128"),
        ({"prompt": [7, 400]}, "prompt", "400 is no token: ids are 0 to 399"),
        ({"temperature": -1}, "temperature", "temperature: Input should be greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": MAX_TOKENS + 1}, "max_tokens", "max_tokens is 100001: ask for 100000 at most"),
        ({"n": MAX_BATCH + 1}, "n", "n is 5: ask for 4 texts at most"),
        ({"logprobs": 0}, "logprobs", "logprobs is not supported: leave it out"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty is not supported: leave it out"),
        ({"extra_body": {"heat": 1}}, "heat", "heat: Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_bad_requests_are_answered_in_openais_form(client, options, parameter, message):
    with pytest.raises(BadRequestError) as caught:
        complete(client, **options)
    assert caught.value.body["message"] == message
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", parameter)


def test_neutral_and_silent_fields_are_taken(client):
    assert complete(client, frequency_penalty=0, presence_penalty=0.0, best_of=1, user="somebody", suffix="", n=1)


def test_another_model_is_not_found(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    for ask in (client.models.retrieve, lambda name: client.completions.create(model=name, prompt="one")):
        with pytest.raises(NotFoundError, match="there is no model 'large' here: ask for 'tiny'") as caught:
            ask("large")
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", b"{", 400, "the body is no JSON"),
        ("/v1/completions", b"[]", 400, "the body is no JSON object"),
        ("/v1/completions", rb'{"model": "\ud800"}', 400, "the body is no JSON"),
        ("/v1/completions", b" " * (65 * 2**20), 413, "the body has more than 67108864 bytes"),
        ("/v1/completions", None, 405, "GET /v1/completions is not served here"),
        ("/v1/nothing", b"{}", 404, "POST /v1/nothing is not served here"),
    ],
    ids=["cut off", "a list", "a lone surrogate", "too long", "another method", "another path"],
)
def test_what_no_client_of_openais_sends(client, path, body, status, message):
    url = str(client.base_url).removesuffix("/v1/") + path
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=60)
    assert caught.value.code == status
    assert json.load(caught.value)["error"]["message"].startswith(message)


def test_ctrl_c_ends_texts_under_way(folder, tmp_path):
    (tmp_path / "plain").mkdir()
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            shutil.copy(file, tmp_path / "plain")
    log = tmp_path / "log"
    with serving(tmp_path / "plain", log, "--max-tokens", MAX_TOKENS, "--max-batch", 1) as (server, client):
        with pytest.raises(BadRequestError, match="the model has no chat template, so it takes completions alone"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "one"}])
        with ThreadPoolExecutor(1) as pool:
            stream = iter(complete(client, **ENDLESS, stream=True))
            next(stream)
            waiting = pool.submit(complete, client)
            time.sleep(0.2)
            server.send_signal(signal.SIGINT)
            with pytest.raises(APIError, match="the server is shutting down"):
                list(stream)
            with pytest.raises(InternalServerError, match="the server is shutting down"):
                waiting.result()
        assert server.wait(20) == 130
    first, *last = log.read_text().splitlines()
    assert first.startswith("serving ")
    assert last == ["interrupted from the keyboard"]


def test_a_server_that_cannot_start_says_why(folder, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = program.run("serve", folder, "--port", port)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"error: port {port} of 127.0.0.1 cannot be used (Address already in use): give another --port or --host\n"
    )
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ServingError, match=r"^serving needs uvicorn: pip install 'sambalm\[serve\]'$"):
        serve_model(folder, host="127.0.0.1", port=0, max_batch=1, max_tokens=1)


@pytest.fixture
def engine(folder):
    engine = Engine(load_source(folder, device="cpu", dtype=None, tokenizer=None), max_rows=4)
    yield engine
    engine.end()
    engine.join(20)


class Taken:
    """A job, and what the engine delivers of it."""

    def __init__(self, prompt=(7, 8, 9), *, tokens=30, samples=1, seed=0, temperature=1.0):
        self.pieces = queue.Queue()
        settings = Settings(Sampling(temperature, seed=seed), tokens)
        self.job = Job(list(prompt), settings, samples, False, self.pieces.put)

    def text(self):
        """The texts of its samples, or the error of its end."""
        texts, unfinished = {}, self.job.samples
        while unfinished:
            piece = self.pieces.get(timeout=30)
            if isinstance(piece, RequestError):
                return str(piece)
            texts[piece.sample] = texts.get(piece.sample, "") + piece.text
            unfinished -= bool(piece.reason)
        return [texts[sample] for sample in range(self.job.samples)]


def test_requests_share_steps(engine, monkeypatch):
    rows, step, reading = [], Stream.step, threading.Event()
    monkeypatch.setattr(Stream, "step", lambda self, ids: (rows.append(len(ids)), step(self, ids))[1])
    monkeypatch.setattr(engine_file, "PIECE_TOKENS", 4)
    read = Stream.read
    monkeypatch.setattr(Stream, "read", lambda self, ids: (reading.wait(), read(self, ids))[1])
    jobs = [Taken(seed=1), Taken(range(3, 23), tokens=20, samples=2, seed=2), Taken(tokens=5), Taken(tokens=9)]
    for taken in jobs:
        engine.submit(taken.job)
    reading.set()
    together = [taken.text() for taken in jobs]
    assert max(rows) == 4
    assert len(rows) < 60, "80 tokens of rows that overlap"
    assert rows[:4] == [1, 1, 1, 1], "a prompt of five pieces is read between the steps of the others"
    for taken, texts in zip([Taken(seed=1), Taken(range(3, 23), tokens=20, samples=2, seed=2)], together, strict=False):
        engine.submit(taken.job)
        assert taken.text() == texts


def test_a_failure_reaches_those_that_it_hit_and_nobody_else(engine, monkeypatch, capsys):
    step = Stream.step
    failing = iter([True])
    monkeypatch.setattr(Stream, "step", lambda self, ids: 1 / 0 if next(failing, False) else step(self, ids))
    hit, later = Taken(), Taken(tokens=3)
    engine.submit(hit.job)
    assert hit.text() == "the server failed on this request: its log has the reason"
    assert "ZeroDivisionError" in capsys.readouterr().err
    engine.submit(later.job)
    assert len(later.text()) == 1


def test_too_many_waiting_requests_are_refused(engine, monkeypatch):
    monkeypatch.setattr(engine_file, "MAX_WAITING", 0)
    with pytest.raises(RequestError, match="0 requests are waiting") as caught:
        engine.submit(Taken().job)
    assert caught.value.status == 503
    engine.end()
    with pytest.raises(RequestError, match="the server is shutting down"):
        engine.submit(Taken().job)


@pytest.mark.parametrize(
    ("text", "reason", "delta"),
    [("a", None, {"content": "a"}), ("", "length", {}), ("a", "length", {"content": "a"})],
)
def test_a_chats_last_event_has_no_content_where_there_is_none(text, reason, delta):
    (choice,) = Reply("m", is_chat=True).piece(0, text, reason)["choices"]
    assert choice["delta"] == delta
    assert choice["finish_reason"] == reason
