"""HumanEval: functions pass by their tests alone, and what a model writes is run locked in."""

import pytest

from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.evaluation.runner import Plan, evaluate
from sambalm.evaluation.task import Surroundings
from tests.evaluation.oracle import Oracle
from tests.evaluation.test_runner import quiet
from tests.evaluation.test_short import write_task

TEXTS = [
    "    return a + b\n\n\ndef another():\n    return open('x')",  # which is cut off
    "    return a - b\n",
    "    return",
    "    return sum(1 for _ in open({secret!r})) + a + b - 1\n",
    "    while True:\n        pass\n",
]


def test_a_function_passes_by_its_tests(tokens, tmp_path):
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
        return TEXTS[int(text.split("def add")[1][0])].format(secret=str(secret))

    model = Oracle(load_tokenizer(tokens.parent / "tokenizer.model"), answer)
    overrides = [f"humaneval.files={tmp_path}", "humaneval.timeout_s=1"]
    plan = Plan(["humaneval"], overrides, [], tmp_path / "out", 1000)
    (result,) = evaluate(plan, Surroundings(model, None, tmp_path), bar=quiet)
    (score,) = result.scores
    assert (score.name, score.value, score.items) == ("pass@1", pytest.approx(1 / 5), 5)
    assert (result.folder / "plot.png").is_file()
