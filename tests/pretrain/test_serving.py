"""`sambalm serve`: the stock openai client against a real process, whose texts are those of `sambalm generate`."""

import json
import re
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from openai import APIError, APITimeoutError, BadRequestError, InternalServerError, NotFoundError, OpenAI

from sambalm.model.hf import load_for_generation
from sambalm.model.hf.tokenizer import save_tokenizer
from sambalm.pretrain.generation.command import Request, generate_text
from sambalm.pretrain.generation.sampling import Sampling
from sambalm.pretrain.serving.command import _bind, serve_model
from sambalm.pretrain.serving.errors import ServingError
from sambalm.pretrain.serving.replies import Reply
from tests.pretrain.test_generated_text import sentencepiece_file
from tests.pretrain.test_generation import TEMPLATE
from tests.support import program
from tests.support.hf import RandomState, hf_model, tiny_config

PROMPTS = ["one", "don't stop", "  two spaces first, and a long prompt that is longer than the window of the model"]
EOS_ID = 341  # what follows the second prompt has it, and what follows the others has not
MAX_BATCH, MAX_TOKENS = 4, 100_000
ENDLESS = {"prompt": "one", "max_tokens": MAX_TOKENS, "extra_body": {"ignore_eos": True}}


def make_folder(path: Path) -> Path:
    """Makes a Hugging Face folder with random weights and a chat template, which refuses tools."""
    path.mkdir()
    model = sentencepiece_file(path)
    save_tokenizer(model, path)
    model.unlink()
    config = tiny_config("M-*-", tie_embeddings=False, vocab_size=400)
    hf = hf_model(config, RandomState(config))
    hf.config.eos_token_id, hf.generation_config.eos_token_id = 2, [2, EOS_ID]
    hf.save_pretrained(path)
    refusal = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    (path / "chat_template.jinja").write_text(refusal + TEMPLATE)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("serving") / "hf")


@contextmanager
def serving(folder, log, *options, name="tiny", host="127.0.0.1"):
    with program.start("serve", folder, "--port", 0, *options, log=log) as server:

        def address():
            place = rf"(http://{re.escape(host)}:\d+/v1)"
            return re.search(rf"^serving {re.escape(name)} at {place} \(Ctrl-C ends it\)$", log.read_text(), re.M)

        program.wait_until(lambda: address() or server.poll() is not None, 60, log.read_text)
        assert server.poll() is None, log.read_text()
        yield server, OpenAI(base_url=address()[1], api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory) -> OpenAI:
    log = tmp_path_factory.mktemp("log") / "log"
    options = ("--name", "tiny", "--max-batch", MAX_BATCH, "--max-tokens", MAX_TOKENS)
    with serving(folder, log, *options) as (_, client):
        yield client
    assert "Traceback" not in log.read_text()


def complete(client, **options):
    return client.completions.create(**{"model": "tiny", "prompt": "one", "temperature": 0, "max_tokens": 20} | options)


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
    plain = client.completions.create(model="tiny", prompt="one", seed=5, n=4)
    assert plain.usage.completion_tokens == 4 * 16
    for temperature, is_the_default in ((1, True), (0.8, False)):
        given = complete(client, seed=5, n=4, temperature=temperature, max_tokens=16)
        texts = [[choice.text for choice in answer.choices] for answer in (plain, given)]
        assert (texts[0] == texts[1]) == is_the_default
    for seed in (-(2**63), -1, 2**63 - 1):
        assert len(complete(client, seed=seed, n=2).choices) == 2, "seeds of any sign and size are taken"
    for all_tokens in ({"top_k": -1}, {"top_k": 0}, {"top_p": 1, "min_p": 0, "repetition_penalty": 1}):
        assert complete(client, seed=5, temperature=1, extra_body=all_tokens).choices[0].text == first


def test_samples_of_several_prompts_are_told_apart_and_counted_once(client, generated):
    sampling = {"seed": 5, "temperature": 0.9, "top_p": 0.9}
    records = [record for prompt in PROMPTS for record in generated(prompt, samples=2, **sampling)]
    answer = complete(client, prompt=PROMPTS, n=2, **sampling)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (number, record["text"]) for number, record in enumerate(records)
    ]
    usage = answer.usage
    assert usage.prompt_tokens == sum(record["prompt_tokens"] for record in records) // 2
    assert usage.completion_tokens == sum(record["tokens"] for record in records)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


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
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    pieces = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == wanted
    assert (pieces[-1].choices, pieces[-1].usage) == ([], answer.usage)
    assert (answer.object, answer.id[:9]) == ("chat.completion", "chatcmpl-")
    assert {(piece.object, piece.id[:9]) for piece in pieces} == {("chat.completion.chunk", "chatcmpl-")}
    assert len({piece.id for piece in pieces}) == 1
    completed = [complete(client), *complete(client, stream=True)]
    assert {(one.object, one.id[:5]) for one in completed} == {("text_completion", "cmpl-")}
    shorter = options | {"max_completion_tokens": None, "max_tokens": 5}
    assert client.chat.completions.create(**shorter).usage.completion_tokens == 5
    roles = [p.choices[0] for p in client.chat.completions.create(**options, n=2, stream=True)]
    assert [choice.index for choice in roles if choice.delta.role] == [0, 1]


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
        ({"prompt": [7, -1]}, "prompt", "-1 is no token: ids are 0 to 399"),
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


NEUTRAL = {  # as requests go without
    **{
        "best_of": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "suffix": "",
        "logit_bias": {},
        "logprobs": False,
    },
    **{"top_logprobs": 0, "functions": [], "function_call": "none", "tools": [], "tool_choice": "auto"},
    **{"modalities": ["text"], "response_format": {"type": "text"}},
}
SILENT = {
    **{"user": "somebody", "store": True, "metadata": {"a": "b"}, "parallel_tool_calls": True},
    **{"prompt_cache_key": "a", "safety_identifier": "b", "service_tier": "auto"},
}


def test_neutral_and_silent_fields_are_taken(client):
    assert complete(client, extra_body=NEUTRAL | SILENT).choices[0].text == complete(client).choices[0].text
    for name in NEUTRAL:
        with pytest.raises(BadRequestError, match=f"{name} is not supported: leave it out"):
            complete(client, extra_body={name: {"other": "wishes"}})


def test_a_conversation_that_the_template_refuses_is_the_client_s_mistake(client):
    with pytest.raises(BadRequestError, match=r"the chat template cannot be applied \(no tools\)") as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "tool", "content": "a"}])
    assert caught.value.param == "messages"


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
    assert caught.value.headers["Allow"] == ("POST" if status == 405 else None)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_ctrl_c_ends_texts_under_way(folder, tmp_path):
    (tmp_path / "plain").mkdir()
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            shutil.copy(file, tmp_path / "plain")
    log = tmp_path / "log"
    name, host = str(tmp_path / "plain"), "[::1]" if has_ipv6() else "127.0.0.1"
    options = ("--max-tokens", MAX_TOKENS, "--max-batch", 1, "--host", host.strip("[]"))
    with serving(name, log, *options, name=name, host=host) as (server, client):  # of no other name than its path
        health = urllib.request.urlopen(str(client.base_url).replace("/v1/", "/health"), timeout=60)
        assert (health.status, json.load(health)) == (200, {"status": "ok"})
        with pytest.raises(BadRequestError, match="the model has no chat template, so it takes completions alone"):
            client.chat.completions.create(model=name, messages=[{"role": "user", "content": "one"}])
        with ThreadPoolExecutor(1) as pool:
            stream = iter(complete(client, **ENDLESS, model=name, stream=True))
            next(stream)
            waiting = pool.submit(complete, client, model=name)
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


def test_a_port_can_be_taken_again_at_once():
    """While connections of the server before it are still closing."""
    with _bind("127.0.0.1", 0) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


def test_the_model_is_the_one_that_was_asked_for(monkeypatch):
    class Asked(Exception):
        """Ends the start of a server, with what is loaded."""

    def tell(path, **named):
        raise Asked(path, named)

    monkeypatch.setattr("sambalm.pretrain.serving.command.load_source", tell)
    asked = {"device": "cpu", "dtype": "bf16", "tokenizer": Path("t"), "step": 3}
    with pytest.raises(Asked) as told:
        serve_model(Path("run"), host="127.0.0.1", port=0, max_batch=1, max_tokens=1, **asked)
    assert told.value.args == (Path("run"), asked)


@pytest.mark.parametrize(
    ("text", "reason", "delta"),
    [("a", None, {"content": "a"}), ("", "length", {}), ("a", "length", {"content": "a"})],
)
def test_a_chats_last_event_has_no_content_where_there_is_none(text, reason, delta):
    (choice,) = Reply("m", is_chat=True).piece(0, text, reason)["choices"]
    assert choice["delta"] == delta
    assert choice["finish_reason"] == reason
