"""GSM8K: what counts as a text's answer, and where a text ends."""

import json

import pytest

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.runner import Plan, evaluate
from sambalm.evaluation.task import Surroundings
from sambalm.evaluation.tasks.gsm8k import answer_of
from tests.evaluation.oracle import Oracle
from tests.evaluation.test_runner import quiet
from tests.evaluation.test_short import write_task


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 3 + 4 = 7. So the answer is 7.", 7),
        (" So the answer is $1,200.50 a day", 1200.5),
        (" The answer is 3. No, the answer is -4.", -4),
        (" It is 12 and 13", 13),
        (" 5 apples. So the answer is unknown", 5),
        (" none", None),
    ],
)
def test_the_answer_is_the_last_number_after_the_words(text, number):
    assert answer_of(text) == number


def run(model, files, folder, *overrides):
    plan = Plan(["gsm8k"], [f"gsm8k.files={files}", *overrides], [], folder, 1000)
    (result,) = evaluate(plan, Surroundings(model, None, folder), bar=quiet)
    return result


def test_texts_end_before_the_next_question(tokenizer, tmp_path):
    """A model that goes on to questions of its own is judged by the first answer; a third of them is wrong."""
    asked = [{"doc_id": n, "label": f"1,00{n}", "request": {"context": f"Question: {n}?\nAnswer:"}} for n in range(6)]
    write_task(tmp_path, "gsm8k", "gold_bpb_5shot", asked)

    def answer(text):
        number = int(text.split("Question: ")[1].split("?")[0])
        goes_on = "\n\nThe answer is 99." if number % 2 else "\nQuestion: another? The answer is 99."
        return f" So the answer is 100{number + (number % 3 == 0)}.{goes_on}"

    model = Oracle(tokenizer, answer)
    result = run(model, tmp_path, tmp_path / "out")
    (score,) = result.scores
    assert (score.value, score.items, score.chance) == (pytest.approx(4 / 6), 6, 0)
    (bar,) = result.outcome.plot.bars
    assert (bar.value, bar.error, bar.chance) == (score.value, score.standard_error, 0)
    record = json.loads((result.folder / "results.json").read_text())
    assert {"tokenizer", "questions_sha256"} < record["protocol"].keys()
    assert record["tokens"] == sum(len(tokenizer.encode(each["request"]["context"])) for each in asked)
    (few,) = run(model, tmp_path, tmp_path / "out", "gsm8k.questions=1").scores
    assert (few.value, few.items) == (0, 1)
    (cut,) = run(model, tmp_path, tmp_path / "out", "gsm8k.max_new_tokens=2").scores
    assert cut.value == 0
    with pytest.raises(EvaluationError, match=r"gsm8k has no variant 'gold_bpb_5shot'; it has none"):
        run(model, tmp_path / "out", tmp_path)
