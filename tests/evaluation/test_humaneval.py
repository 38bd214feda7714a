"""HumanEval: functions pass by their tests alone, and what a model writes is run locked in."""

import json

import pytest

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.runner import Plan, evaluate
from sambalm.evaluation.sandbox import run as sandbox
from sambalm.evaluation.sandbox.run import ends_well
from sambalm.evaluation.task import Surroundings
from sambalm.evaluation.tasks import humaneval
from sambalm.evaluation.tasks.humaneval import HumanEval, HumanEvalSettings
from tests.evaluation.oracle import Oracle
from tests.evaluation.test_runner import quiet
from tests.evaluation.test_short import write_task

RIGHT = "    return a + b\n"
TEXTS = [
    *(f"{RIGHT}{after}" for after in ("\n\ndef another():\n    return open('x')", "\nclass A(B):\n    pass", "\n#\n}")),
    *(f"{RIGHT}{after}" for after in ("\nif True:\n    open('x')", "\nprint(add)", "\n```\nis right")),
    "    return a - b\n",
    "    return",
    "    return sum(1 for _ in open({secret!r})) + a + b - 1\n",
    "    while True:\n        pass\n",
]  # of which the first six are cut off behind what is right


def test_a_function_passes_by_its_tests(tokenizer, tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("one line\n")
    functions = [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f"def add{number}(a, b):\n",
            "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
            "entry_point": f"add{number}",
        }
        for number in range(len(TEXTS))
    ]
    write_task(tmp_path, "codex_humaneval", "gold_bpb_0shot", [{"doc": function} for function in functions])

    def answer(text):
        return TEXTS[int(text.split("def add")[1][0])].replace("{secret!r}", repr(str(secret)))

    def noted(program, **bounds):
        bounded.append(bounds)
        return ends_well(program, **bounds)

    bounded, model = [], Oracle(tokenizer, answer)
    monkeypatch.setattr(humaneval, "ends_well", noted)
    overrides = [f"humaneval.files={tmp_path}", "humaneval.timeout_s=1"]
    plan = Plan(["humaneval"], overrides, [], tmp_path / "out", 1000)
    (result,) = evaluate(plan, Surroundings(model, None, tmp_path), bar=quiet)
    (score,) = result.scores
    assert (score.name, score.value, score.items) == ("pass@1", pytest.approx(6 / 10), 10)
    (bar,) = result.outcome.plot.bars
    assert (bar.value, bar.error, bar.chance) == (score.value, score.standard_error, 0)
    lines = [json.loads(line) for line in (result.folder / "items.jsonl").read_text().splitlines()]
    assert [line["item"] for line in lines] == [function["task_id"] for function in functions]
    assert [line["score"] for line in lines] == [1] * 6 + [0] * 4
    assert [line["text"].rstrip() for line in lines[:6]] == [RIGHT.rstrip()] * 6
    assert bounded == [{"timeout_s": 1, "memory_bytes": 2**30}] * 10
    record = json.loads((result.folder / "results.json").read_text())
    assert {"tokenizer", "questions_sha256"} < record["protocol"].keys()
    plan = Plan(["humaneval"], [*overrides, "humaneval.max_new_tokens=1", "humaneval.questions=2"], [], tmp_path, 1000)
    (few,) = evaluate(plan, Surroundings(model, None, tmp_path), bar=quiet)
    assert [(score.value, score.items) for score in few.scores] == [(0, 2)]


def test_no_text_is_made_on_a_machine_that_cannot_lock_programs_in(tokenizer, tmp_path, monkeypatch):
    write_task(tmp_path, "codex_humaneval", "gold_bpb_0shot", [{"doc": {"task_id": "a", "prompt": "def f():\n"}}])
    script = tmp_path / "inside.py"
    script.write_text(
        sandbox._INSIDE.read_text().replace("def lock_in() -> bool:", "def lock_in() -> bool:\n    return False", 1)
    )
    monkeypatch.setattr(sandbox, "_INSIDE", script)
    with pytest.raises(EvaluationError, match="this machine cannot lock them in"):
        HumanEval(HumanEvalSettings(files=str(tmp_path)), Surroundings(Oracle(tokenizer, str), None, tmp_path))
