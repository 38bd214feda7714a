"""What becomes of requests whose prompt is being read when the model fails, or when the server stops."""

import threading

import pytest

from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.model.hf.stream import PIECE_TOKENS
from sambalm.pretrain.generation.rows import Settings
from sambalm.pretrain.generation.sampling import Sampling
from sambalm.pretrain.generation.source import Source
from sambalm.pretrain.generation.text import training_text
from sambalm.pretrain.serving.engine import Engine, Job
from sambalm.pretrain.serving.errors import RequestError
from tests.support.hf import RandomState, hf_model, tiny_config


class Client:
    """Collects what a job delivers, up to its end."""

    def __init__(self) -> None:
        self.found, self.ended = [], threading.Event()

    def take(self, piece) -> None:
        self.found.append(piece)
        if isinstance(piece, RequestError) or piece.reason:
            self.ended.set()


@pytest.fixture
def source(tokens) -> Source:
    tokenizer = load_tokenizer(tokens.with_name("tokenizer.model"))
    config = tiny_config("M-*-")
    model = hf_model(config, RandomState(config)).eval()
    return Source(model, tokenizer.encode, training_text(tokenizer), frozenset())


def ask(engine, ids) -> Client:
    client = Client()
    settings = Settings(Sampling(temperature=0), max_new_tokens=3)
    engine.submit(Job(ids, settings, samples=1, echo=False, deliver=client.take))
    return client


@pytest.mark.parametrize("pieces_before", [0, 1])
def test_a_request_whose_prompt_the_model_fails_on_is_told_and_the_next_one_served(pieces_before, source, capsys):
    read = []

    def fail(module, *_):
        read.append(module)
        if len(read) > pieces_before:
            raise RuntimeError("the card fell off")

    engine = Engine(source, max_rows=2)
    hook = source.model.backbone.register_forward_pre_hook(fail)
    client = ask(engine, [5] * (PIECE_TOKENS + 1))
    assert client.ended.wait(30)
    (error,) = client.found
    assert (error.status, str(error)) == (500, "the server failed on this request: its log has the reason")
    assert "the card fell off" in capsys.readouterr().err
    hook.remove()
    client = ask(engine, [5, 6])
    assert client.ended.wait(30)
    assert [piece.tokens for piece in client.found][-1] == 3
    engine.end()
    engine.join(30)


def test_a_server_that_stops_tells_those_whose_prompt_it_reads_and_those_that_wait(source):
    reads, goes_on = threading.Event(), threading.Event()

    def wait(*_):
        reads.set()
        goes_on.wait(30)

    engine = Engine(source, max_rows=1)
    source.model.backbone.register_forward_pre_hook(wait)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "engine")
    assert thread.daemon  # a server that fails elsewhere must not wait for texts without end
    reading = ask(engine, [5] * (PIECE_TOKENS + 1))
    assert reads.wait(30)
    waiting = ask(engine, [5])
    engine.end()
    goes_on.set()
    engine.join(30)
    for client in (reading, waiting):
        (error,) = client.found
        assert (error.status, error.code) == (503, "shutdown")
    with pytest.raises(RequestError):
        ask(engine, [5])
