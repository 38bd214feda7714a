"""Evaluations go on after a kill, measure nothing twice, and keep what differs apart."""

import itertools
import json
import math
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.evaluation import runner
from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.ranks import Alone, main_first, on_each
from sambalm.evaluation.records import FILE_NAME, Records
from sambalm.evaluation.results import table
from sambalm.evaluation.runner import Plan, evaluate
from sambalm.evaluation.task import Item, Score, Surroundings
from sambalm.evaluation.tasks.passkey import Passkey
from tests.evaluation.oracle import Oracle

OVERRIDES = ["passkey.lengths=[300,400]", "passkey.depths=2", "passkey.samples=3"]


@contextmanager
def quiet(_: str) -> Iterator:
    yield lambda done, total: None


@pytest.fixture
def model(tokens):
    return Oracle(load_tokenizer(tokens.parent / "tokenizer.model"), lambda text: f" {len(text) % 7}2")


def run(model, folder, *overrides, bar=quiet, batch_tokens=600):
    plan = Plan(["passkey"], [*OVERRIDES, *overrides], [], folder, batch_tokens)
    (result,) = evaluate(plan, Surroundings(model, None, folder), bar=bar)
    return result


def without_times(result) -> tuple:
    record = json.loads((result.folder / "results.json").read_text())
    lines = [json.loads(line) for line in (result.folder / FILE_NAME).read_text().splitlines()]
    return {**record, "seconds": 0}, [{**line, "seconds": 0} for line in lines]


def test_an_evaluation_goes_on_where_it_was_killed(model, tmp_path, monkeypatch):
    whole = run(model, tmp_path / "whole")
    calls = []
    measure = Passkey.measure

    def dies_at_the_third(self, items, tick):
        calls.append([item.id for item in items])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, items, tick)

    monkeypatch.setattr(Passkey, "measure", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "killed")
    (folder,) = (tmp_path / "killed").glob("passkey-*")
    assert not (folder / "results.json").exists()
    with (folder / FILE_NAME).open("a") as file:
        file.write('{"item": "length=400/depth=0.0/0", "sco')  # what a kill leaves of a line
    told = []

    @contextmanager
    def bar(name):
        yield lambda done, total: told.append((name, done, total))

    result = run(model, tmp_path / "killed", bar=bar)
    assert without_times(result) == without_times(whole)
    measured = [item for call in calls for item in call if call is not calls[2]]
    assert len(measured) == len(set(measured)) == 12
    assert told[0] == ("passkey", 1200, 4200)
    assert told[-1] == ("passkey", 4200, 4200)
    calls.clear()
    assert without_times(run(model, tmp_path / "killed")) == without_times(whole)
    assert calls == []


def test_the_seconds_of_a_batch_are_shared_by_its_items(model, tmp_path, monkeypatch):
    moments = itertools.count()
    monkeypatch.setattr(runner, "time", SimpleNamespace(perf_counter=lambda: float(next(moments))))
    result = run(model, tmp_path, batch_tokens=900)
    lines = [json.loads(line) for line in (result.folder / FILE_NAME).read_text().splitlines()]
    assert [line["seconds"] for line in lines] == [pytest.approx(1 / 3)] * 6 + [0.5] * 6  # of 300 tokens, and of 400
    assert result.seconds == 2 + 3


def test_batches_change_nothing(model, tmp_path):
    results = [run(model, tmp_path / str(size), batch_tokens=size) for size in (1, 700, 10**6)]
    assert without_times(results[0]) == without_times(results[1]) == without_times(results[2])


@pytest.mark.parametrize(
    ("batch_tokens", "pads", "wanted"),
    [
        (1, True, ["a", "b", "c", "d"]),
        (16, True, ["ab", "c", "d"]),
        (18, True, ["ab", "cd"]),
        (99, False, ["ab", "c", "d"]),
    ],
)
def test_batches_hold_as_many_rows_as_fit(batch_tokens, pads, wanted):
    """Items of four rows of 2 tokens each, two of 6, and one of 4."""
    items = [Item("a", 8, rows=4), Item("b", 8, rows=4), Item("c", 12, rows=2), Item("d", 4)]
    found = runner._batches(items, batch_tokens=batch_tokens, pads=pads)
    assert ["".join(item.id for item in batch) for batch in found] == wanted


@pytest.mark.parametrize("change", ["setting", "weights", "tokenizer"])
def test_what_differs_is_kept_apart(change, model, tmp_path, monkeypatch):
    before = run(model, tmp_path)
    if change == "weights":
        object.__setattr__(model.identity, "fingerprint", "0" * 64)
    elif change == "tokenizer":
        monkeypatch.setattr(model, "tokenizer_hash", lambda: "another")
    after = run(model, tmp_path, *(["passkey.seed=1"] if change == "setting" else []))
    assert after.folder != before.folder
    assert run(model, tmp_path, *(["passkey.seed=1"] if change == "setting" else [])).folder == after.folder


def test_a_batch_that_does_not_fit_is_measured_in_halves(model, tmp_path, monkeypatch):
    expected, sizes, measure = run(model, tmp_path / "whole"), [], Passkey.measure

    def small(self, items, tick):
        sizes.append(len(items))
        if len(items) > most:
            raise torch.OutOfMemoryError
        return measure(self, items, tick)

    monkeypatch.setattr(Passkey, "measure", small)
    most = 1
    assert without_times(run(model, tmp_path / "halves", batch_tokens=1200)) == without_times(expected)
    assert set(sizes) == {1, 2, 3, 4}
    most = 0
    with pytest.raises(EvaluationError, match="passkey: an item of 300 tokens does not fit the device's memory"):
        run(model, tmp_path / "none")


def test_two_processes_do_not_write_the_same_records(model, tmp_path):
    folder = run(model, tmp_path).folder
    with (
        Records(folder, ranks=Alone()).opened(),
        pytest.raises(EvaluationError, match=f"another process evaluates into {folder}; wait for it or give another"),
    ):
        run(model, tmp_path)


class Threads:
    """Processes that meet to tell each other something, as threads of this one."""

    def __init__(self, rank: int, told: list, meeting: threading.Barrier) -> None:
        self.rank, self.size, self.is_main, self._told, self._meeting = rank, len(told), rank == 0, told, meeting

    def all_gather_object(self, value):
        self._told[self.rank] = value
        self._meeting.wait()
        found = list(self._told)
        self._meeting.wait()
        return found


def on_three(call) -> list[Future]:
    told, meeting = [None] * 3, threading.Barrier(3, timeout=20)
    with ThreadPoolExecutor(3) as pool:
        return [pool.submit(call, Threads(rank, told, meeting)) for rank in range(3)]


def test_the_main_process_goes_first():
    """The others find what it has left behind; where it fails they do not begin."""
    begun = []

    def act(rank: int, *, fails: int | None = None) -> int:
        begun.append(rank)
        if rank == fails:
            raise EvaluationError(f"no room on {rank}")
        return 10 * rank

    for _ in range(5):
        begun.clear()
        assert [one.result() for one in on_three(lambda r: main_first(r, lambda: act(r.rank)))] == [0, 10, 20]
        assert begun[0] == 0
    for fails, began in ((0, [0]), (2, [0, 1, 2])):
        begun.clear()
        found = on_three(lambda r, fails=fails: main_first(r, lambda: act(r.rank, fails=fails)))
        assert {str(one.exception()) for one in found} == {f"no room on {fails}"}
        assert sorted(begun) == began
    assert [one.result() for one in on_three(lambda r: on_each(r, lambda: act(r.rank)))] == [[0, 10, 20]] * 3
    found = on_three(lambda r: on_each(r, lambda: act(r.rank, fails=1)))
    assert {str(one.exception()) for one in found} == {"no room on 1"}


def test_an_output_that_cannot_be_written_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        EvaluationError, match=r"file/passkey-.* cannot be written \(Not a directory\); make room or give"
    ):
        run(model, tmp_path / "file")


def test_records_of_a_full_disk_are_refused(tmp_path):
    with Path("/dev/full").open("w") as full, Records(tmp_path, ranks=Alone()).opened() as records:
        kept, records._descriptor = records._descriptor, full.fileno()
        with pytest.raises(EvaluationError, match=r"items.jsonl cannot be written \(No space left on device\)"):
            records.add({"a": {"score": 1}})
        records._descriptor = kept
    assert (tmp_path / FILE_NAME).read_text() == ""


def test_a_model_of_learned_positions_is_told_before_the_first_item(model, tmp_path):
    model.max_tokens = 350
    with pytest.raises(
        EvaluationError, match="passkey reads 400 tokens at once, but oracle has learned positions for 350"
    ):
        run(model, tmp_path)
    assert model.texts == []
    model.max_tokens = 400
    assert run(model, tmp_path).tokens == 4200


def test_a_table_shows_four_digits_that_tell_something(model, tmp_path):
    result = run(model, tmp_path)
    scores = [
        Score("accuracy", {"length": 1024}, 0.0, None, 0.1, 1200),
        Score("speed", {"length": 2**20}, 12_345.6, math.inf, None, 3),
        Score("rest", {}, 0.123456, 1.0, None, 3),
    ]
    shown = table(replace(result, outcome=replace(result.outcome, scores=scores)))
    assert {column.header: list(column.cells) for column in shown.columns} == {
        "score": ["accuracy", "speed", "rest"],
        "length": ["1K", "1M", ""],
        "value": ["0", "12,346", "0.1235"],
        "standard error": ["-", "inf", "1.000"],
        "chance": ["0.1000", "-", "-"],
        "items": ["1,200", "3", "3"],
    }
