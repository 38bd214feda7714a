"""Tasks in the training loop: scores are those of the step's checkpoint on any layout; training stays as it is."""

import datetime
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sambalm.data_pipeline.errors import DataError
from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.in_loop import InLoopEvaluation, check_tasks, free_bytes, metrics
from sambalm.evaluation.task import Score
from sambalm.model.hf.errors import HFError
from sambalm.model.registry import mixer
from sambalm.pretrain.checkpointing.format import checkpoint_folder, open_checkpoint
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.lifecycle.ledger import Account
from sambalm.pretrain.reporting.goodput import read_goodput
from sambalm.pretrain.reporting.metrics_file import EVALUATION, read_metrics
from tests.support import toy_mixer
from tests.support.data import write_shard
from tests.support.marks import slow_except
from tests.support.whole_runs import changed, run_dir, stopped_after, train
from tests.support.worlds import run_world

PASSKEY = {"lengths": [200], "depths": 2, "samples": 1}
PERPLEXITY = {"lengths": [32, 64], "tokens": 128}
WORDS = ["passkey.lengths=[200]", "passkey.depths=2", "passkey.samples=1"]
WORDS += ["perplexity.lengths=[32,64]", "perplexity.tokens=128"]
LAYOUTS = [
    (1, {}),
    (2, {"tensor": 2}),
    (2, {"zero_stage": 1}),
    (2, {"pipeline": 2}),
    (2, {"zero_stage": 3}),
]


def evaluated(values: dict, **keys) -> dict:
    """The values with tasks in the loop, in batches so small that several ranks share them."""
    section = {"every_steps": 3, "tasks": {"passkey": PASSKEY, "perplexity": PERPLEXITY}, "batch_tokens": 100} | keys
    return changed(values, evaluation=section)


def scores(record: dict) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith(EVALUATION)}


def written(value: object) -> str:
    return "-".join(value) or "alone" if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("ranks", "layout"), slow_except(LAYOUTS[:1], LAYOUTS, long=LAYOUTS[3:]), ids=written)
def test_scores_are_those_of_the_checkpoint_of_the_step(ranks, layout, run_values, sambalm, tmp_path):
    values = changed(evaluated(run_values), parallel=layout, train={"steps": 3})
    records = train(values, ranks=ranks)
    assert [record["step"] for record in records if scores(record)] == [3]
    words = ["--step", 3, "--batch-tokens", 100, "--output", tmp_path, "--json"]
    code, out, _ = sambalm("evaluate", run_dir(values), "--task", "passkey", "--task", "perplexity", *WORDS, *words)
    assert code == 0
    expected = {
        "/".join([f"evaluation/{result['task']}", score["score"], str(score["length"])]): score["value"]
        for result in json.loads(out)
        for score in result["scores"]
    }
    assert scores(records[2]) == expected
    assert len(expected) == 5
    # The protocol is the same, and with it the weights: `sambalm evaluate RUN` would find all items done.
    folders = {path.parent.name for path in (run_dir(values) / "evaluation").glob("*/results.json")}
    assert folders == {path.name for path in tmp_path.glob("p*-*")}
    assert len(folders) == 2


@pytest.mark.slow
def test_training_and_resuming_stay_the_same_to_the_bit(run_values, tmp_path):
    layout = {"zero_stage": 1}
    plain = changed(run_values, parallel=layout, run={"dir": str(tmp_path / "plain")})
    values = evaluated(changed(run_values, parallel=layout), every_steps=2, tasks={"passkey": PASSKEY})
    expected, records = train(plain, ranks=2), train(values, ranks=2)
    resumed = train(stopped_after(values, 3, tmp_path / "resumed"), ranks=2)
    assert resumed == records
    without = [{name: v for name, v in record.items() if not name.startswith(EVALUATION)} for record in records]
    assert without == expected
    assert [record["step"] for record in records if scores(record)] == [2, 4, 6]
    ours, theirs = (open_checkpoint(checkpoint_folder(run_dir(each), 6)) for each in (values, plain))
    assert all(bool((ours.read(name) == theirs.read(name)).all()) for name in theirs.shapes())


def test_tokens_may_say_when_and_reports_say_what(run_values, sambalm):
    section = {"every_steps": None, "every_tokens": 1024, "precision": "bf16", "tasks": {"passkey": PASSKEY}}
    values = evaluated(run_values, **section)
    assert [record["step"] for record in train(values) if scores(record)] == [4, 6]
    results = [json.loads(path.read_text()) for path in (run_dir(values) / "evaluation").glob("*/results.json")]
    measured = sorted((result["model"]["step"], result["model"]["dtype"]) for result in results)
    assert measured == [(4, "bfloat16"), (6, "bfloat16")]
    booked = read_goodput(run_dir(values), is_alive=False).seconds[Account.VALIDATION]
    assert booked > sum(result["seconds"] for result in results)
    code, out, _ = sambalm("report", run_dir(values))
    assert (code, "Evaluation after step 6" in out, "accuracy, 200" in out) == (0, True, True)
    page = (run_dir(values) / "report.html").read_text()
    assert "passkey: accuracy" in page
    assert "passkey accuracy 200" in page


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"tasks": {"pasky": {}}}, "evaluation.tasks: there is no task 'pasky'; the tasks are perplexity"),
        ({"tasks": {"passkey": {"length": [1]}}}, "evaluation.tasks: unknown key passkey.length"),
        ({"tasks": {"perplexity": {"lengths": ["1M"]}}}, "perplexity.lengths has 1048576, but the held-out part of"),
        ({"tasks": {"passkey": {"lengths": [8]}}}, "passkey.lengths has 8, but what such a text must hold"),
    ],
)
def test_what_cannot_be_measured_is_told_before_training(section, told, run_values, sambalm, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(evaluated(run_values, **section)))
    code, _, err = sambalm("train", path)
    assert (code, told in err) == (2, True), err
    assert read_metrics(run_dir(run_values)) == []


@pytest.mark.parametrize(("turns", "word"), [({}, "both"), ({"every_steps": None}, "none")])
def test_when_to_evaluate_is_said_once(turns, word, run_values):
    turns = {"every_tokens": 512} | turns if word == "both" else turns
    with pytest.raises(ConfigError, match=f"evaluation.tasks is set with {word} of"):
        parse_config(evaluated(run_values, **turns), source="test")


def refusal_on_rank(values: dict) -> str:
    """What a run says on a rank that has almost no memory left."""
    from sambalm.evaluation import in_loop
    from sambalm.pretrain.trainer import train

    config = parse_config(values, source="test")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(in_loop, "free_bytes", lambda device: 1000)
        with pytest.raises(in_loop.EvaluationError) as caught:
            train(config, evaluation=in_loop.InLoopEvaluation)
    return str(caught.value)


def test_a_model_that_does_not_fit_is_refused_before_training(run_values):
    (told,) = run_world(refusal_on_rank, evaluated(run_values), ranks=1)
    assert "evaluation.precision=fp32, and a rank has 0.0 GiB left: take bf16" in told
    assert read_metrics(run_dir(run_values)) == []


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1000), ("bf16", 2000)])
def test_the_rank_that_has_least_left_decides(precision, most, run_values):
    world: Any = SimpleNamespace(device=torch.device("cpu"), all_gather_object=lambda free: [free, 4000, free])
    hook = hook_of(evaluated(run_values, precision=precision), world)
    hook._check_memory(most)
    with pytest.raises(EvaluationError, match="needs the whole model on every rank"):
        hook._check_memory(most + 1)


def hook_of(values: dict, world: Any = None) -> InLoopEvaluation:
    return InLoopEvaluation(parse_config(values, source="test"), world)


@pytest.mark.parametrize(
    ("turns", "steps"),
    [
        ({"every_steps": 4}, [4, 6]),
        ({"every_steps": None, "every_tokens": 512}, [2, 4, 6]),
        ({"every_steps": None, "every_tokens": 600}, [3, 5, 6]),
        ({"every_steps": None, "every_tokens": 100}, [1, 2, 3, 4, 5, 6]),
        ({"every_steps": None, "every_tokens": 10_000}, [6]),
    ],
)
def test_steps_are_those_that_reach_a_multiple_and_the_last(turns, steps, run_values):
    """Of 6 steps of 256 tokens; batches are as large as the section says."""
    hook = hook_of(evaluated(run_values, **turns))
    assert [step for step in range(1, 7) if hook.acts_on(step)] == steps
    assert hook._plan.batch_tokens == 100


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize("error", [EvaluationError, DataError])
def test_what_fails_while_training_is_told_once(error, is_main, run_values, monkeypatch, capsys):
    def fails(*_):
        raise error("no room")

    hook = hook_of(evaluated(run_values), SimpleNamespace(is_main=is_main))
    monkeypatch.setattr(hook, "_with_model", fails)
    hook.after_step(SimpleNamespace(number=3, metrics={}))
    told = "warning: the run goes on, but the evaluation after step 3 is not complete: no room\n"
    assert capsys.readouterr().err == (told if is_main else "")


def test_what_no_task_can_measure_is_found_before_the_run(run_values, tmp_path, monkeypatch, request):
    bare = write_shard(tmp_path / "bare", [[5] * 300])
    with pytest.raises(EvaluationError, match=r"evaluation.tasks is set, but .*bare names no tokenizer: preprocess"):
        hook_of(evaluated(changed(run_values, data={"train": bare})))._tokenizer()
    dated = evaluated(run_values, tasks={"passkey": {"seed": datetime.date(2026, 1, 2)}})
    with pytest.raises(EvaluationError, match=r"evaluation.tasks: passkey.seed is '2026-01-02'"):
        check_tasks(parse_config(dated, source="test"))
    toy_mixer.install()
    request.addfinalizer(toy_mixer.uninstall)
    monkeypatch.setattr(mixer("T"), "hf", None)
    values = changed(run_values, model={"pattern": "T-*-", "mixers": {"token_shift": {"channels": 22}}})
    check_tasks(parse_config(values, source="test"))
    with pytest.raises(HFError, match=r"the mixer token_shift .* cannot be written in the Hugging Face format"):
        check_tasks(parse_config(evaluated(values), source="test"))


def test_metrics_are_named_by_all_that_a_score_was_measured_at():
    score = Score("accuracy", {"kind": "single", "length": 600}, 0.5, None, None, 3)
    result: Any = SimpleNamespace(task="needles", scores=[score])
    assert metrics(result) == {"evaluation/needles/accuracy/single/600": 0.5}


def test_a_host_s_ranks_share_what_it_has_left(monkeypatch):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = free_bytes(torch.device("cpu"))
    assert whole / 200 < free <= whole
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(torch.device("cpu")) == pytest.approx(free / 4, rel=0.3)


def test_a_failure_while_training_ends_no_run(run_values, sambalm, tmp_path):
    Path(run_values["run"]["dir"]).mkdir()
    (Path(run_values["run"]["dir"]) / "evaluation").write_text("no folder")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(evaluated(run_values, tasks={"passkey": PASSKEY})))
    code, _, err = sambalm("train", path)
    assert code == 0
    assert "the run goes on, but the evaluation after step 3 is not complete" in err
