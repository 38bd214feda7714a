"""lm-evaluation-harness: our models score as its own HFLM does on the same items, and it runs our long texts."""

import json
import math

import pytest

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.harness.long_texts import documents, process_results
from sambalm.evaluation.models.loading import open_model
from sambalm.evaluation.runner import Plan, evaluate
from sambalm.evaluation.task import Score, Surroundings
from sambalm.evaluation.tasks.harness import Harness, HarnessSettings
from sambalm.evaluation.tasks.long_texts import LongTextTask
from sambalm.evaluation.tasks.registry import TASKS as ALL
from tests.evaluation.test_runner import quiet

TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "local_word": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
metric_list:
  - metric: acc
  - metric: perplexity
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "local_text": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["e"]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
""",
}


def surroundings(path):
    opened = open_model(path, device="cpu", dtype=None, tokenizer=None)
    return Surroundings(opened.model, opened.run, path)


@pytest.fixture(scope="module")
def include(tmp_path_factory):
    """A folder of tasks on a file of questions, in lm-eval's own form."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["def", "class", "return", "import", "the", "of", "value", "name", "self", "print"]
    records = [
        {
            "question": " ".join(words[number % 7 :][: 2 + number % 5]) + (" " if number % 3 == 0 else ""),
            "choices": [f" {words[(number * step) % 10]} {words[(number + step) % 10]}" for step in (1, 3, 4)],
            "right": number % 3,
        }
        for number in range(40)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    head = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/data.jsonl\ntest_split: test\n"
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{head}target_delimiter: ''{text}")
    return folder


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="an extra: pip install 'sambalm[evaluate]'")
    pytest.importorskip("accelerate", reason="which lm-eval's HFLM imports")
    import datasets
    import lm_eval

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    return lm_eval


@pytest.mark.parametrize("kind", ["samba", "llama"])
def test_scores_are_those_of_hflm_on_the_same_items(kind, lm_eval, hf_folders, include, tmp_path):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = hf_folders[kind]
    overrides = [f"harness.tasks={json.dumps(list(TASKS))}", f"harness.include={include}", "harness.batch_tokens=100"]
    plan = Plan(["harness"], overrides, [], tmp_path, 1000)
    (result,) = evaluate(plan, surroundings(path), bar=quiet)
    found = {(score.at["task"], score.name): score for score in result.scores}
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(path),
        tokenizer=AutoTokenizer.from_pretrained(path),
        device="cpu",
        batch_size=4,
    )
    expected = lm_eval.simple_evaluate(
        theirs,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(include), include_defaults=False),
        bootstrap_iters=1000,
    )["results"]
    names = [
        (task, key.partition(",")[0]) for task, values in expected.items() for key in values if key.endswith(",none")
    ]
    names = [(task, name) for task, name in names if not name.endswith("_stderr")]
    assert sorted(names) == sorted(found)
    for task, name in names:
        assert found[task, name].value == pytest.approx(expected[task][f"{name},none"], rel=1e-4), (task, name)
    accuracy = found["local_choice", "acc"]
    assert accuracy.standard_error == pytest.approx(expected["local_choice"]["acc_stderr,none"], rel=1e-4)
    assert accuracy.items == 40
    assert result.tokens > 40 * 3 * 4
    assert 0 < accuracy.value < 1
    assert math.isfinite(found["local_rolling", "bits_per_byte"].value)


def test_generated_texts_are_those_of_hflm(lm_eval, hf_folders, include):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sambalm.evaluation.harness.model import HarnessModel

    path = hf_folders["llama"]
    ours = HarnessModel(surroundings(path).model, batch_tokens=100)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)
    requests = [
        Instance("generate_until", {}, (text, {"until": until, "max_gen_toks": 15, "do_sample": False}), number)
        for number, (text, until) in enumerate([("def main", []), ("import the", ["e", "\n"]), ("class ", ["x"])])
    ]
    texts = ours.generate_until(requests)
    assert texts == theirs.generate_until(requests)
    assert len(set(texts)) == 3
    sampled = Instance("generate_until", {}, ("a", {"until": [], "do_sample": True, "temperature": 0.7}), 0)
    with pytest.raises(EvaluationError, match="asks for samples"):
        ours.generate_until([sampled])


def test_lm_eval_runs_our_long_texts(lm_eval, hf_folders, tmp_path):
    """The data of each is what our task asks, and what a model says is graded as by our task."""
    from pathlib import Path

    from lm_eval.tasks import TaskManager

    from sambalm.evaluation import harness

    path = hf_folders["llama"]
    settings = {
        "pretrained": str(path),
        "lengths": [800],
        "samples": 1,
        "depths": 2,
        "common_times": 6,
        "other_times": 1,
    }
    manager = TaskManager(include_path=str(Path(harness.__file__).parent), include_defaults=False, metadata=settings)
    names = [name for name, task in ALL.items() if issubclass(task, LongTextTask)]
    loaded = manager.load([f"sambalm_{name}" for name in names])["tasks"]
    assert len(loaded) == len(names) == 6
    model = surroundings(path).model
    for name in names:
        found = list(loaded[f"sambalm_{name}"].test_docs())
        assert all(abs(len(model.encode(document["text"])) - 800) < 4 for document in found)
        assert all(document["answers"] for document in found)
    with pytest.raises(EvaluationError, match="passkey needs a tokenizer"):
        TaskManager(include_path=str(Path(harness.__file__).parent), include_defaults=False).load(["sambalm_passkey"])


@pytest.mark.parametrize("given", ["tokenizer", "pretrained"])
def test_our_long_texts_are_those_of_our_tasks(given, hf_folders):
    """With the keys that a task knows; others are lm-eval's own."""
    model = surroundings(hf_folders["llama"]).model
    settings = {"lengths": [800, "1K"], "samples": 2, "seed": 3}
    found = documents("needles", {given: str(hf_folders["llama"]), "batch_size": 4, **settings})
    task = ALL["needles"](ALL["needles"].schema(**settings), Surroundings(model, None, hf_folders["llama"]))
    questions = [(cell, task.numbered_question(cell, sample)) for cell in task.cells() for sample in range(2)]
    assert [(each["text"], each["answers"], each["kind"], each["length"]) for each in found] == [
        (model.decode(question.ids), question.answers, cell.at["kind"], cell.at["length"])
        for cell, question in questions
    ]
    assert len(found) == 2 * 2 * 4
    with pytest.raises(EvaluationError, match="needles needs a tokenizer: give --metadata with a folder"):
        documents("needles", settings)


def test_a_text_of_lm_eval_is_graded_as_by_our_tasks():
    assert process_results({"answers": ["a", "b"]}, ["b c"]) == {"accuracy": 0.5}
    assert process_results({"answers": ["a"]}, ["b", "a"]) == {"accuracy": 0}


def test_settings_reach_lm_eval(lm_eval, hf_folders, include, monkeypatch):
    asked = {}

    def evaluated(model, **given):
        asked.update(given)
        raise EvaluationError("enough")

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluated)
    settings = HarnessSettings(tasks=["local_word"], include=str(include), shots=3, questions=5)
    task = Harness(settings, surroundings(hf_folders["samba"]))
    with pytest.raises(EvaluationError, match="enough"):
        task.measure(task.items(), lambda _: None)
    assert (asked["tasks"], asked["num_fewshot"], asked["limit"]) == (["local_word"], 3, 5)


def test_entries_of_lm_eval_become_scores(hf_folders, pretend_package):
    """An error that it does not know is a text of its; what is no number is no score."""
    pretend_package("lm_eval", object())
    task = Harness(HarnessSettings(tasks=["a", "c"]), surroundings(hf_folders["samba"]))
    of_a = {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.125, "f1,strict": 1, "f1_stderr,strict": "N/A"}
    of_c = {"perplexity,none": 12.5, "perplexity_stderr,none": "N/A", "name,none": "c"}
    outcome = task.outcome(
        [
            {"results": {"a": of_a, "b": {"acc,none": 0.25}}, "counts": {"a": 40}},
            {"results": {"c": of_c}, "counts": {"c": 3}},
        ]
    )
    assert outcome.scores == [
        Score("acc", {"task": "a"}, 0.5, 0.125, None, 40),
        Score("f1", {"task": "a", "filter": "strict"}, 1.0, None, None, 40),
        Score("acc", {"task": "b"}, 0.25, None, None, 0),
        Score("perplexity", {"task": "c"}, 12.5, None, None, 3),
    ]
    bars = [(bar.name, bar.value, bar.error, bar.chance) for bar in outcome.plot.bars]
    assert bars == [("a, acc", 0.5, 0.125, None), ("a, f1", 1.0, None, None), ("b, acc", 0.25, None, None)]


def test_mistakes_end_in_a_sentence(hf_folders, include, tmp_path, pretend_package):
    where = surroundings(hf_folders["samba"])
    with pytest.raises(EvaluationError, match=r"harness.tasks is empty: name tasks of lm-eval's"):
        Harness(HarnessSettings(), where)
    pretend_package("lm_eval", None)
    with pytest.raises(
        EvaluationError, match="harness needs lm-evaluation-harness, which is not installed: `pip install"
    ):
        Harness(HarnessSettings(tasks=["piqa"]), where)


def test_tasks_that_there_are_not_are_refused(lm_eval, hf_folders, include, tmp_path):
    where = surroundings(hf_folders["samba"])
    with pytest.raises(EvaluationError, match="lm-eval has no task 'nonsense'"):
        Harness(HarnessSettings(tasks=["nonsense"]), where).items()
    (tmp_path / "broken.yaml").write_text((include / "local_word.yaml").read_text().replace("data.jsonl", "none.jsonl"))
    task = Harness(HarnessSettings(tasks=["local_word"], include=str(tmp_path)), where)
    with pytest.raises(
        EvaluationError, match=r"lm-eval cannot run local_word \(.*see whether its data is on this machine"
    ):
        task.measure(task.items(), lambda _: None)
