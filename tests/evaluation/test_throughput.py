"""Throughput: what is timed is what is said, in tokens a second."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sambalm.evaluation.runner import Plan, evaluate
from sambalm.evaluation.task import Surroundings
from sambalm.evaluation.tasks import throughput
from sambalm.evaluation.tasks.throughput import Throughput, ThroughputSettings
from tests.evaluation import oracle
from tests.evaluation.oracle import Oracle

READ_S_OF_TOKEN = 2.0**-10
STEPS_S = (1.0, 8.0, 2.0, 16.0, 4.0)  # of steps in a row, whose median is 4
SETTINGS = [
    "throughput.lengths=[256,1024]",
    "throughput.batches=[1,3]",
    "throughput.repeats=2",
    "throughput.new_tokens=5",
]


CALLS = [(1, 256, 64), (1, 1024, 128), (3, 256, 64), (3, 1024, 128)]  # rows, tokens, and those that warm up


@pytest.fixture
def read(monkeypatch) -> list[torch.Tensor]:
    """What a model is given to read, by a clock of its own: so long a token of a row, and each step another time."""
    now_s, prompts = 0.0, []

    def reads(self, ids, *, progress=None):
        nonlocal now_s
        prompts.append(ids)
        now_s += READ_S_OF_TOKEN * ids.numel()
        self._answers = [[1 + row] for row in range(len(ids))]
        progress(ids.numel())
        return self._logits()

    def step(self, ids):
        nonlocal now_s
        assert ids.tolist() == [1 + row for row in range(self._rows)]
        now_s += STEPS_S[self._number]
        self._number += 1
        return self._logits()

    monkeypatch.setattr(oracle._Reader, "read", reads)
    monkeypatch.setattr(oracle._Reader, "step", step)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now_s))
    return prompts


def test_reading_and_steps_are_timed_apart(read, tokenizer, tmp_path):
    told: list[tuple[int, int]] = []

    @contextmanager
    def bar(_):
        yield lambda done, total: told.append((done, total))

    plan = Plan(["throughput"], SETTINGS, [], tmp_path, batch_tokens=10_000)
    (result,) = evaluate(plan, Surroundings(Oracle(tokenizer, str), None, Path("none")), bar=bar)
    assert result.tokens == told[-1][0] == sum(batch * length for batch, length, _ in CALLS) * 2
    assert [done for done, _ in told][:4] == [0, 256, 512, 1536], "what warms up does not count"
    expected = []
    for batch, length, _ in CALLS:
        at = {"batch": batch, "length": length}
        expected += [("prefill tokens/s", at, 1 / READ_S_OF_TOKEN), ("decode tokens/s", at, batch / 4)]
    assert [(score.name, score.at, score.value) for score in result.scores] == expected
    assert {(score.items, score.standard_error, score.chance) for score in result.scores} == {(2, 0.0, None)}
    record = json.loads((result.folder / "results.json").read_text())
    assert record["protocol"]["device"] == f"cpu, {torch.get_num_threads()} threads"
    lines = result.outcome.plot.lines
    assert [line.name for line in lines] == [
        "prefill, batch 1",
        "decode, batch 1",
        "prefill, batch 3",
        "decode, batch 3",
    ]
    assert lines[3].points == [(256, 0.75), (1024, 0.75)]
    assert (lines[3].errors, result.outcome.plot.log_y) == ([0.0, 0.0], True)


def test_a_prompt_is_read_in_part_before_the_first_time_and_is_another_each_time(read, tokenizer):
    settings = ThroughputSettings(lengths=[256, 1024], batches=[1, 3], repeats=2, new_tokens=5, seed=5)
    task = Throughput(settings, Surroundings(Oracle(tokenizer, str), None, Path("none")))
    items = task.items()
    assert [(item.rows, item.tokens // item.rows, item.content[2]) for item in items] == [
        (batch, length, repeat) for batch, length, _ in CALLS for repeat in range(2)
    ]
    task.measure(items, lambda _: None)
    shapes = [(batch, tokens) for batch, length, warm in CALLS for tokens in (warm, length, length)]
    assert [tuple(ids.shape) for ids in read] == shapes
    assert not torch.equal(read[1], read[2])
    again = Throughput(settings, Surroundings(Oracle(tokenizer, str), None, Path("none")))
    again.measure(items[1:2], lambda _: None)
    assert torch.equal(read[-1], read[2])
