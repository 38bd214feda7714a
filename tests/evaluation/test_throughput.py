"""Throughput: what is timed is what is said, in tokens a second."""

import time
from pathlib import Path

import pytest

from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.evaluation.runner import Plan, evaluate
from sambalm.evaluation.task import Surroundings
from tests.evaluation import oracle
from tests.evaluation.oracle import Oracle
from tests.evaluation.test_runner import quiet

READ_S_OF_TOKEN, STEP_S = 1e-4, 1e-2


@pytest.fixture
def slow_model(tokens, monkeypatch):
    """Reads a token of a row in a tenth of a millisecond, and takes ten for a step."""

    def read(self, ids, *, progress=None):
        time.sleep(READ_S_OF_TOKEN * ids.numel())
        self._answers = [[1]] * len(ids)
        return self._logits()

    def step(self, ids):
        time.sleep(STEP_S)
        return self._logits()

    monkeypatch.setattr(oracle._Reader, "read", read)
    monkeypatch.setattr(oracle._Reader, "step", step)
    return Oracle(load_tokenizer(tokens.parent / "tokenizer.model"), str)


def test_reading_and_steps_are_timed_apart(slow_model, tmp_path):
    settings = [
        "throughput.lengths=[200,400]",
        "throughput.batches=[1,3]",
        "throughput.repeats=2",
        "throughput.new_tokens=5",
    ]
    plan = Plan(["throughput"], settings, [], tmp_path, batch_tokens=10_000)
    (result,) = evaluate(plan, Surroundings(slow_model, None, Path("none")), bar=quiet)
    assert len(result.scores) == 8
    assert result.tokens == 2 * (200 + 400) * (1 + 3)
    for score in result.scores:
        expected = 1 / READ_S_OF_TOKEN if score.name == "prefill tokens/s" else score.at["batch"] / STEP_S
        assert 0.4 * expected < score.value < 1.01 * expected
        assert (score.items, score.chance) == (2, None)
