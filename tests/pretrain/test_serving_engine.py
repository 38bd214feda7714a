"""Requests that are generated together in one thread, without a server, and what fails among them."""

import queue
import threading
from dataclasses import replace

import pytest
import torch
from starlette.testclient import TestClient

from sambalm.model.hf import Stream
from sambalm.pretrain.generation.rows import Settings
from sambalm.pretrain.generation.sampling import Sampling
from sambalm.pretrain.generation.source import load_source
from sambalm.pretrain.serving import engine as engine_file
from sambalm.pretrain.serving.app import Served, make_app
from sambalm.pretrain.serving.engine import Engine, Job
from sambalm.pretrain.serving.errors import RequestError
from tests.pretrain.test_serving import make_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("engine") / "hf")
    return load_source(folder, device="cpu", dtype=None, tokenizer=None)


@pytest.fixture
def engine(source):
    engine = Engine(source, max_rows=4)
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


@pytest.mark.parametrize(
    ("error", "sentence", "is_logged"),
    [
        (ZeroDivisionError(), "the server failed on this request: its log has the reason", True),
        (
            torch.OutOfMemoryError(),
            "the server ran out of memory: send fewer or shorter requests at once",
            False,
        ),
    ],
    ids=["a mistake", "memory"],
)
@pytest.mark.parametrize("method", ["read", "step"])
def test_a_failure_reaches_those_that_it_hit_and_nobody_else(
    method, error, sentence, is_logged, engine, monkeypatch, capsys
):
    works, failing, submitted = getattr(Stream, method), iter([True]), threading.Event()

    def fail(self, ids):
        if next(failing, False):
            submitted.wait(20)
            raise error
        return works(self, ids)

    monkeypatch.setattr(Stream, method, fail)
    hit, waiting = Taken(samples=4), Taken(tokens=3)
    for taken in (hit, waiting):
        engine.submit(taken.job)
    submitted.set()
    assert hit.text() == sentence
    assert len(waiting.text()) == 1
    assert (type(error).__name__ in capsys.readouterr().err) == is_logged


def test_a_prompt_whose_client_has_left_is_read_no_further(engine, monkeypatch):
    monkeypatch.setattr(engine_file, "PIECE_TOKENS", 1)
    gone, later, read, pieces = Taken(range(20, 50)), Taken(tokens=2), Stream.read, []

    def read_and_leave(self, ids):
        gone.job.cancel()
        pieces.append(ids.item())
        return read(self, ids)

    monkeypatch.setattr(Stream, "read", read_and_leave)
    for taken in (gone, later):
        engine.submit(taken.job)
    assert len(later.text()) == 1
    assert pieces == [20, 7, 8, 9]


def test_a_failure_beside_the_engine_is_told_in_openais_form(source, engine):
    broken = replace(source, encode=lambda text: 1 / 0)
    client = TestClient(make_app(Served(broken, "tiny", 9), engine), raise_server_exceptions=False)
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "one"})
    sentence = "the server failed on this request: its log has the reason"
    error = {"message": sentence, "type": "server_error", "param": None, "code": None}
    assert (answer.status_code, answer.json()) == (500, {"error": error})


def test_too_many_waiting_requests_are_refused(engine, monkeypatch):
    monkeypatch.setattr(engine_file, "MAX_WAITING", 0)
    with pytest.raises(RequestError, match="0 requests are waiting") as caught:
        engine.submit(Taken().job)
    assert caught.value.status == 503
    engine.end()
    with pytest.raises(RequestError, match="the server is shutting down"):
        engine.submit(Taken().job)
