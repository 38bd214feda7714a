"""Evaluations go on after a kill, measure nothing twice, and keep what differs apart."""

import itertools
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.evaluation import command, runner
from sambalm.evaluation import ranks as ranks_module
from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.ranks import Alone, main_first, on_each, started
from sambalm.evaluation.records import FILE_NAME, Records
from sambalm.evaluation.results import table
from sambalm.evaluation.runner import Plan, evaluate
from sambalm.evaluation.task import Item, Outcome, Score, Surroundings
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


def test_tokens_that_a_record_names_stand_for_those_of_its_item(model, tmp_path, monkeypatch):
    measure = Passkey.measure
    monkeypatch.setattr(Passkey, "measure", lambda *given: [record | {"tokens": 7} for record in measure(*given)])
    assert run(model, tmp_path).tokens == 12 * 7


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


@pytest.mark.parametrize("change", ["setting", "weights", "tokenizer", "version"])
def test_what_differs_is_kept_apart(change, model, tmp_path, monkeypatch):
    before = run(model, tmp_path)
    if change == "weights":
        object.__setattr__(model.identity, "fingerprint", "0" * 64)
    elif change == "tokenizer":
        monkeypatch.setattr(model, "tokenizer_hash", lambda: "another")
    elif change == "version":
        monkeypatch.setattr(Passkey, "version", 2)
    after = run(model, tmp_path, *(["passkey.seed=1"] if change == "setting" else []))
    assert after.folder != before.folder
    assert run(model, tmp_path, *(["passkey.seed=1"] if change == "setting" else [])).folder == after.folder


def test_a_batch_that_does_not_fit_is_measured_in_halves(model, tmp_path, monkeypatch):
    expected, sizes, measure = run(model, tmp_path / "whole"), [], Passkey.measure

    def small(self, items, tick):
        sizes.append(len(items))
        if len(items) > most:
            tick(items[0].tokens)  # which are read again
            raise torch.OutOfMemoryError
        return measure(self, items, tick)

    told = []

    @contextmanager
    def bar(_):
        yield lambda done, total: told.append((done, total))

    monkeypatch.setattr(Passkey, "measure", small)
    most = 1
    assert without_times(run(model, tmp_path / "halves", bar=bar, batch_tokens=1200)) == without_times(expected)
    assert set(sizes) == {1, 2, 3, 4}
    assert (max(told), told[-1], sorted(told)) == ((4200, 4200), (4200, 4200), told)
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


@pytest.mark.parametrize("rest", ['{"item": "b", "score": 2}', '{"item": "b", "sc', "[1]\n", '{"item": 2}\n', "{}\n"])
def test_records_end_where_a_line_is_damaged(rest, tmp_path, monkeypatch):
    """What follows is cut off, and lines go on from there, however little of one the system writes at once."""
    whole = '{"item": "a", "score": 1}\n'
    (tmp_path / FILE_NAME).write_text(whole + rest + ('{"item": "c", "score": 3}\n' if rest.endswith("\n") else ""))
    write = os.write
    with Records(tmp_path, ranks=Alone()).opened() as records:
        assert records.known == {"a": {"score": 1}}
        with monkeypatch.context() as patched:
            patched.setattr("os.write", lambda file, content: write(file, content[:7]))
            records.add({"d": {"score": 4}, "e": {"score": 5}})
        assert records.of(["d", "a"]) == [{"score": 4}, {"score": 1}]
    assert (tmp_path / FILE_NAME).read_text() == f'{whole}{{"item": "d", "score": 4}}\n{{"item": "e", "score": 5}}\n'


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

    def of_main(self, action):
        done = Future()
        if self.is_main:
            try:
                done.set_result(action())
            except EvaluationError as error:
                done.set_exception(error)
        return self.all_gather_object(done)[0].result()


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
            raise DataError(f"no room on {rank}")
        return 10 * rank

    for _ in range(5):
        begun.clear()
        assert [one.result() for one in on_three(lambda r: main_first(r, lambda: act(r.rank)))] == [0, 10, 20]
        assert begun[0] == 0
    for fails, began in ((0, [0]), (2, [0, 1, 2])):
        begun.clear()
        found = on_three(lambda r, fails=fails: main_first(r, lambda: act(r.rank, fails=fails)))
        assert {str(one.exception()) for one in found} == {f"no room on {fails}"}
        kinds = [DataError if rank == fails else EvaluationError for rank in range(3)]
        assert [type(one.exception()) for one in found] == kinds
        assert sorted(begun) == began
    assert [one.result() for one in on_three(lambda r: on_each(r, lambda: act(r.rank)))] == [[0, 10, 20]] * 3
    found = on_three(lambda r: on_each(r, lambda: act(r.rank, fails=1)))
    assert {str(one.exception()) for one in found} == {"no room on 1"}


def test_processes_share_the_items_and_the_main_one_writes(model, tmp_path, monkeypatch):
    """Of five batches and three processes, of which the main one is slow to make the items."""
    expected = run(model, tmp_path / "alone", batch_tokens=900)
    made, measured, drawn = [], [], []
    items, measure, draw = Passkey.items, Passkey.measure, runner.draw

    def made_late(self):
        time.sleep(0.05 if self.cache_dir.name == "0" else 0)
        made.append(self.cache_dir.name)
        return items(self)

    def told(self, batch, tick):
        measured.append((self.cache_dir.name, [item.id for item in batch]))
        return measure(self, batch, tick)

    def once(plot, path):
        drawn.append(path)
        draw(plot, path)

    monkeypatch.setattr(Passkey, "items", made_late)
    monkeypatch.setattr(Passkey, "measure", told)
    monkeypatch.setattr(runner, "draw", once)
    plan = Plan(["passkey"], OVERRIDES, [], tmp_path / "three", 900)

    def evaluated(ranks):
        surroundings = Surroundings(model, None, tmp_path / str(ranks.rank))
        return list(evaluate(plan, surroundings, bar=quiet, ranks=ranks))

    found = [one.result() for one in on_three(evaluated)]
    assert made[0] == "0"
    assert sorted(rank for rank, _ in measured) == ["0", "0", "1", "1", "2"]
    assert len({item for _, batch in measured for item in batch}) == sum(len(batch) for _, batch in measured) == 12
    assert [result.scores for (result,) in found] == [expected.scores] * 3
    assert without_times(found[0][0]) == without_times(expected)
    assert drawn == [found[0][0].folder / "plot.png"]


def test_one_process_of_several_opens_the_model_first_and_shows_what_is_done(hf_folders, tmp_path, monkeypatch, capsys):
    own, opened, bars, one_at_a_time = threading.local(), [], [], threading.Lock()
    open_model = command.open_model

    def opens_late(path, **options):
        time.sleep(0.05 if own.ranks.is_main else 0)
        opened.append(own.ranks.rank)
        with one_at_a_time:  # transformers replaces functions of its own while it loads a model
            return open_model(path, **options)

    @contextmanager
    def bar(name):
        bars.append((name, own.ranks.rank))
        yield lambda done, total: None

    monkeypatch.setattr(command, "started", lambda device: nullcontext((own.ranks, device)))
    monkeypatch.setattr(command, "open_model", opens_late)
    options = {"data": [], "output": tmp_path, "batch_tokens": 600, "device": "cpu", "dtype": None, "tokenizer": None}

    def call(ranks):
        own.ranks = ranks
        words = {"tasks": ["passkey"], "overrides": OVERRIDES, "step": None, "as_json": False, "bar": bar}
        command.evaluate_model(hf_folders["llama"], **words, **options)

    assert [one.result() for one in on_three(call)] == [None] * 3
    assert (opened[0], sorted(opened), bars) == (0, [0, 1, 2], [("passkey", 0)])
    assert capsys.readouterr().out.count("standard error") == 1


@pytest.mark.parametrize(("named", "own"), [(None, "cuda:3"), ("cuda", "cuda:3"), ("cpu", "cpu")])
def test_each_process_of_several_has_a_gpu_of_its_own(named, own, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    world = SimpleNamespace(device=torch.device("cuda:3"))
    monkeypatch.setattr(ranks_module, "start_world", lambda config: nullcontext(world))
    with started(named) as (_, place):
        assert place == own


def test_an_output_that_cannot_be_written_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        EvaluationError, match=r"file/passkey-.* cannot be written \(Not a directory\); make room or give"
    ):
        run(model, tmp_path / "file")
    folder = run(model, tmp_path / "whole").folder
    for name in ("plot.png", "results.json"):
        (folder / name).unlink()
    (folder / "plot.png").mkdir()
    with pytest.raises(EvaluationError, match=r"results.json cannot be written \(Is a directory\); make room or give"):
        run(model, tmp_path / "whole")
    assert not (folder / "results.json").exists(), "which tells that all is there"


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
    rows = SimpleNamespace(name="short")
    runner._refuse_long_items(rows, [Item("a", 800, rows=2)], Surroundings(model, None, tmp_path))
    with pytest.raises(EvaluationError, match="short reads 401 tokens at once"):
        runner._refuse_long_items(rows, [Item("a", 802, rows=2)], Surroundings(model, None, tmp_path))


@pytest.fixture
def scored(model, tmp_path):
    """A result with values of all kinds."""
    scores = [
        Score("accuracy", {"length": 1024}, 0.0, None, 0.1, 1200),
        Score("speed", {"length": 2**20}, 12_345.6, math.inf, None, 3),
        Score("rest", {}, 0.123456, 1.0, None, 3),
        Score("round", {}, 9_999.7, 1_234.0, None, 3),
    ]
    result = run(model, tmp_path)
    outcome = Outcome(scores, result.outcome.plot, {"nats": [1.0, {"a": (math.nan, -math.inf)}]})
    return replace(result, outcome=outcome, tokens=12_345, seconds=100.25, folder=Path("out"))


def test_a_table_shows_four_digits_that_tell_something(scored):
    shown = table(scored)
    assert {column.header: list(column.cells) for column in shown.columns} == {
        "score": ["accuracy", "speed", "rest", "round"],
        "length": ["1K", "1M", "", ""],
        "value": ["0", "12,346", "0.1235", "10,000"],
        "standard error": ["-", "inf", "1.000", "1234"],
        "chance": ["0.1000", "-", "-", "-"],
        "items": ["1,200", "3", "3", "3"],
    }
    assert (shown.title, shown.caption) == ("passkey: oracle", "12,345 tokens in 100 s; out")
    assert table(replace(scored, model=replace(scored.model, step=7))).title == "passkey: oracle, step 7"


def test_numbers_that_are_not_finite_are_null_in_json(scored):
    record = scored.as_record({"settings": {"seed": 5}}, "0123")
    assert record["details"] == {"nats": [1.0, {"a": [None, None]}]}
    of_speed = {
        "score": "speed",
        "length": 2**20,
        "value": 12_345.6,
        "standard_error": None,
        "chance": None,
        "items": 3,
    }
    assert record["scores"][1] == of_speed
    assert record["model"] == asdict(scored.model)
    assert {key: record[key] for key in ("task", "protocol_hash", "seed", "tokens", "seconds")} == {
        "task": "passkey",
        "protocol_hash": "0123",
        "seed": 5,
        "tokens": 12_345,
        "seconds": 100.25,
    }
