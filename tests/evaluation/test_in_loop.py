"""Tasks in the training loop: scores are those of the step's checkpoint on every layout, and training stays as it is."""

import json
from pathlib import Path

import pytest

from sambalm.pretrain.checkpointing.format import checkpoint_folder, open_checkpoint
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.reporting.metrics_file import EVALUATION, read_metrics
from tests.support.whole_runs import changed, run_dir, stopped_after, train

TASKS = {
    "perplexity": {"lengths": [32, 64], "tokens": 512},
    "passkey": {"lengths": [300], "depths": 2, "samples": 1},
}
WORDS = ["perplexity.lengths=[32,64]", "perplexity.tokens=512"]
WORDS += ["passkey.lengths=[300]", "passkey.depths=2", "passkey.samples=1"]
LAYOUTS = [
    (1, {}),
    (2, {"tensor": 2}),
    (2, {"pipeline": 2}),
    (2, {"zero_stage": 1}),
    (2, {"zero_stage": 3}),
]


def evaluated(values: dict, **keys) -> dict:
    """The values with tasks in the loop, whose batches are small enough for several ranks to share them."""
    section = {"every_steps": 3, "tasks": TASKS, "batch_tokens": 200} | keys
    return changed(values, evaluation=section)


def scores(record: dict) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith(EVALUATION)}


@pytest.mark.parametrize("ranks, layout", LAYOUTS, ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_scores_are_those_of_the_checkpoint_of_the_step(ranks, layout, run_values, sambalm, tmp_path):
    values = changed(evaluated(run_values), parallel=layout)
    records = train(values, ranks=ranks)
    assert [record["step"] for record in records if scores(record)] == [3, 6]
    folders = {path.parent.name for path in (run_dir(values) / "evaluation").glob("*/results.json")}
    for step in (3, 6):
        words = ["--step", step, "--batch-tokens", 200, "--output", tmp_path, "--json"]
        code, out, _ = sambalm("evaluate", run_dir(values), "--task", "perplexity", "--task", "passkey", *WORDS, *words)
        assert code == 0
        expected = {
            "/".join([f"evaluation/{result['task']}", score["score"], str(score["length"])]): score["value"]
            for result in json.loads(out)
            for score in result["scores"]
        }
        assert scores(records[step - 1]) == expected
        assert len(expected) == 5
    # The protocol, and with it the weights, is the same: `sambalm evaluate` would find all items done.
    assert folders == {path.name for path in tmp_path.glob("p*-*")}
    assert len(folders) == 4


@pytest.mark.parametrize("ranks, layout", [(1, {}), (2, {"zero_stage": 1})], ids=["alone", "zero_stage"])
def test_training_and_resuming_stay_the_same_to_the_bit(ranks, layout, run_values, tmp_path):
    plain = changed(run_values, parallel=layout, run={"dir": str(tmp_path / "plain")})
    values = evaluated(changed(run_values, parallel=layout), every_steps=2)
    expected, records = train(plain, ranks=ranks), train(values, ranks=ranks)
    resumed = train(stopped_after(values, 3, tmp_path / "resumed"), ranks=ranks)
    assert resumed == records
    without = [{name: v for name, v in record.items() if not name.startswith(EVALUATION)} for record in records]
    assert without == expected
    assert [record["step"] for record in records if scores(record)] == [2, 4, 6]
    ours, theirs = (open_checkpoint(checkpoint_folder(run_dir(each), 6)) for each in (values, plain))
    assert all(bool((ours.read(name) == theirs.read(name)).all()) for name in theirs.shapes())


def test_tokens_may_say_when(run_values):
    values = evaluated(run_values, every_steps=None, every_tokens=512, tasks={"passkey": TASKS["passkey"]})
    assert [record["step"] for record in train(values) if scores(record)] == [2, 4, 6]
    ledger = [json.loads(line) for path in run_dir(values).rglob("ledger*.jsonl") for line in path.open()]
    assert ledger


@pytest.mark.parametrize(
    "section, told",
    [
        ({"tasks": {"pasky": {}}}, "evaluation.tasks: there is no task 'pasky'; the tasks are perplexity"),
        ({"tasks": {"passkey": {"length": [1]}}}, "evaluation.tasks: unknown key passkey.length"),
        ({"tasks": {"perplexity": {"lengths": ["1M"]}}}, "perplexity.lengths has 1048576, but the held-out part of"),
        ({"tasks": {"passkey": {"lengths": [8]}}}, "passkey: a text of 8 tokens"),
    ],
)
def test_what_cannot_be_measured_is_told_before_training(section, told, run_values, sambalm, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(evaluated(run_values, **section)))
    code, _, err = sambalm("train", path)
    assert (code, told in err) == (2, True), err
    assert read_metrics(run_dir(run_values)) == []


@pytest.mark.parametrize("turns, word", [({}, "both"), ({"every_steps": None}, "none")])
def test_when_to_evaluate_is_said_once(turns, word, run_values):
    turns = {"every_tokens": 512} | turns if word == "both" else turns
    with pytest.raises(ConfigError, match=f"evaluation.tasks is set with {word} of"):
        parse_config(evaluated(run_values, **turns), source="test")


def test_a_model_that_does_not_fit_is_refused_before_training(run_values, monkeypatch, sambalm, tmp_path):
    from sambalm.evaluation import in_loop

    monkeypatch.setattr(in_loop, "free_bytes", lambda device: 1000)
    with pytest.raises(in_loop.EvaluationError, match="a rank has 0.0 GiB left: take bf16"):
        from sambalm.pretrain.trainer import train as run

        run(parse_config(evaluated(run_values), source="test"), evaluation=in_loop.InLoopEvaluation)


def test_a_failure_while_training_ends_no_run(run_values, sambalm, tmp_path):
    Path(run_values["run"]["dir"]).mkdir()
    (Path(run_values["run"]["dir"]) / "evaluation").write_text("no folder")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(evaluated(run_values, tasks={"passkey": TASKS["passkey"]})))
    code, _, err = sambalm("train", path)
    assert code == 0
    assert "the run goes on, but the evaluation after step 3 is not complete" in err
