"""Tasks on long texts: exact lengths, one text a seed, answers that are in the text and nowhere else, and scores."""

import pickle
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest

from sambalm.data_pipeline import made_documents
from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.models.loading import open_model
from sambalm.evaluation.runner import Plan, evaluate
from sambalm.evaluation.task import Item, Surroundings
from sambalm.evaluation.tasks import words as words_module
from sambalm.evaluation.tasks.long_texts import Filler, LongTextTask, Question, TooShortError
from sambalm.evaluation.tasks.registry import TASKS
from tests.evaluation.oracle import Oracle
from tests.evaluation.test_runner import quiet

NAMES = [name for name, task in TASKS.items() if issubclass(task, LongTextTask)]
OTHERS = {"passkey": {"depths": 3, "samples": 2}, "aggregation": {"common": 3, "common_times": 6, "other_times": 1}}


def task_of(name, model, *, lengths=(600, 1000), **changes):
    schema = TASKS[name].schema
    settings = schema(lengths=list(lengths), **{"samples": 3} | OTHERS.get(name, {}) | changes)
    return TASKS[name](settings, Surroundings(model, None, Path("none")))


def of_passkey(text):
    (key,) = {*re.findall(r"The pass key is (\d+)", text)}
    return f" {key}."


def of_phonebook(text):
    book, asked = text.split("\n\nNumbers from the phonebook above:")
    shots = re.findall(r"(.+): (\d{10})\n", asked)
    assert len(shots) == 2
    assert all(f"\n{name}: {number}\n" in f"{book}\n" for name, number in shots)
    name = asked.rpartition("\n")[2].removesuffix(":")
    assert name not in dict(shots)
    (number,) = re.findall(rf"\n{re.escape(name)}: (\d{{10}})(?=\n|$)", book)
    return f" {number}"


def of_needles(text):
    book, asked = text.split("\nQuestion: ")
    things = re.findall(r"the ([a-z]+ [a-z]+)(?=,| and the| in the text)", asked.split("?")[0].split(" of ", 1)[1])
    found = [number for thing in things for number in re.findall(rf"number of the {thing} is (\d{{7}})\.", book)]
    return f" {', '.join(found)}."


def of_variables(text):
    book = text.split("The text:")[1]
    value = re.search(r"hold the value (\d+)", book)[1]
    names = []
    for name, before in re.findall(r"VAR (\w+) = (\w+)\n", book):
        if before == value or before in names:
            names.append(name)
    return f" {' '.join(names)}"


def of_aggregation(text):
    listed, asked = text.rsplit("List:", 1)[1].split("\nQuestion: Which ")
    common = Counter(listed.split()).most_common(int(asked.split()[0]))
    return f" {' '.join(word for word, _ in common)}"


def of_questions(text):
    book, asked = text.split("\nQuestion: ")
    person = re.search(r"does (.+) (?:live|work)\?", asked)[1]
    if "live?" in asked:
        (city,) = re.findall(rf"{person}, a \w+, lives in (\w+)\.", book)
    else:
        (shop,) = re.findall(rf"{person} works in the shop of the (\w+ \w+)\.", book)
        (city,) = re.findall(rf"The shop of the {shop} is in (\w+)\.", book)
    return f" {city}."


SOLVERS = dict(
    zip(
        ["passkey", "phonebook", "needles", "variables", "aggregation", "questions"],
        [of_passkey, of_phonebook, of_needles, of_variables, of_aggregation, of_questions],
        strict=True,
    )
)


def scores_of(task, model, folder, **options):
    settings = [f"{task}.{key}={value}" for key, value in options.items()]
    plan = Plan([task], settings, [], folder, batch_tokens=4000)
    (result,) = evaluate(plan, Surroundings(model, None, folder), bar=quiet)
    return result


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_reads_finds_everything_and_one_that_does_not_finds_nothing(name, tokenizer, tmp_path):
    options = {"lengths": "[600,1000]", "samples": 3} | OTHERS.get(name, {})
    reader = Oracle(tokenizer, SOLVERS[name])
    result = scores_of(name, reader, tmp_path, **options)
    assert {score.value for score in result.scores} == {1.0}
    assert {score.at["length"] for score in result.scores} == {600, 1000}
    assert len(set(reader.texts)) == len(reader.texts) == sum(score.items for score in result.scores)
    assert {len(reader.encode(text)) for text in reader.texts} <= {*range(598, 603), *range(998, 1003)}
    silent = scores_of(name, Oracle(tokenizer, lambda text: " nothing"), tmp_path / "silent", **options)
    assert {score.value for score in silent.scores} == {0.0}
    assert all(0 < score.chance < 0.1 for score in silent.scores)


@pytest.mark.parametrize("name", NAMES)
def test_a_record_counts_for_its_own_part_of_the_task(name, tokenizer):
    task = task_of(name, Oracle(tokenizer, SOLVERS[name]), lengths=(1000, 600))
    items = task.items()
    graded = [(item.content[0].at, number / len(items)) for number, item in enumerate(items)]

    def mean_at(at) -> float:
        return pytest.approx(fmean(grade for of_item, grade in graded if at.items() <= of_item.items()))

    outcome = task.outcome([{"score": grade} for _, grade in graded])
    assert [score.value for score in outcome.scores] == [mean_at(score.at) for score in outcome.scores]
    assert sum(score.items for score in outcome.scores) == len(items)
    if name == "passkey":
        cells = [{"length": length, "depth": depth} for length in (1000, 600) for depth in (0.0, 0.5, 1.0)]
        assert outcome.details["cells"] == [cell | {"accuracy": mean_at(cell), "items": 2} for cell in cells]
        assert outcome.plot.values == [[mean_at(cell) for cell in cells[row::3]] for row in range(3)]
        assert (outcome.plot.rows, outcome.plot.columns) == (["0%", "50%", "100%"], ["1000", "600"])
        assert (outcome.plot.row_name, outcome.plot.column_name) == ("depth of the key", "tokens of the text")
    else:
        kinds = list(dict.fromkeys(score.at.get("kind", name) for score in outcome.scores))
        assert [line.name for line in outcome.plot.lines] == kinds
        for line in outcome.plot.lines:
            own = [score for score in outcome.scores if score.at.get("kind", name) == line.name]
            assert line.points == [(score.at["length"], score.value) for score in own]
            assert line.errors == [score.standard_error for score in own] != [None, None]
        assert outcome.plot.limits == (-0.03, 1.03)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["samba", "llama"])
def test_texts_are_of_exact_lengths_and_depend_on_the_seed_alone(name, kind, hf_folders):
    model = open_model(hf_folders[kind], device="cpu", dtype=None, tokenizer=None).model
    lengths = (600, 601, 602, 603, 1000)
    task, again, other = (task_of(name, model, lengths=lengths, seed=seed) for seed in (0, 0, 1))
    for cell in task.cells():
        questions = [task.numbered_question(cell, sample) for sample in range(2)]
        assert {len(question.ids) for question in questions} == {cell.at["length"]}
        assert questions[0].ids != questions[1].ids
        assert questions[0] == again.numbered_question(cell, 0)
        assert questions[0].ids != other.numbered_question(cell, 0).ids


@pytest.mark.parametrize("name", NAMES)
def test_what_begins_a_text_stands_there_once_and_an_answer_has_its_tokens(name, tokenizer):
    model = Oracle(tokenizer, SOLVERS[name])
    model.begin_ids = [1]
    task = task_of(name, model)
    for cell in task.cells():
        question = task.numbered_question(cell, 0)
        assert (question.ids[0], question.ids.count(1), len(question.ids)) == (1, 1, cell.at["length"])
        answer = (", " if name == "needles" else " ").join(question.answers)
        assert question.max_new_tokens == len(model.encode(f"a {answer}")) - len(model.encode("a")) + 8


class Told(random.Random):
    """Draws a key and a depth that are told."""

    def __init__(self, key: int, depth: int) -> None:
        super().__init__(0)
        self.key, self.depth = key, depth

    def randrange(self, *_):
        return self.key

    def randint(self, *_):
        return self.depth


def test_a_passkey_s_text_is_that_of_the_documents_to_train_on(tokenizer):
    """A small model finds no key in lines that it was not trained on."""
    task = task_of("passkey", Oracle(tokenizer, of_passkey), lengths=[700], depths=4, samples=2)
    for cell in task.cells():
        question = task.numbered_question(cell, 0)
        text = task.model.decode(question.ids)
        (key,) = question.answers
        depth = text.split("The pass key is")[0].count(". ") - 2 + 1 if cell.at["depth"] else 0
        ((made, _), (answer, _)) = made_documents.Passkey().document(Told(int(key), depth), 200)
        filled, asked = text[: text.rindex("\n")], text[text.rindex("\n") :]
        assert made.startswith(filled)
        assert made.endswith(asked)
        assert answer == f" {key}."
        assert question.ids == tokenizer.encode(text)


def test_a_phonebook_ends_as_the_documents_to_train_on(tokenizer):
    task = task_of("phonebook", Oracle(tokenizer, of_phonebook), lengths=[700], samples=1)
    question = task.numbered_question(task.cells()[0], 0)
    made = "".join(text for text, _ in made_documents.Phonebook().document(random.Random(0), 5))
    form = re.compile(r"\w+: \d{10}\n\nNumbers from the phonebook above:(\n[\w. ]+: \d{10}){2}\n[\w. ]+:$")
    assert form.search(task.model.decode(question.ids))
    assert form.search(made.removesuffix(made[made.rindex(":") + 1 :]))


def test_assignments_of_chains_stand_among_each_other(tokenizer):
    """Else the one that is asked for could be told by its place."""
    task = task_of("variables", Oracle(tokenizer, of_variables), lengths=[800], samples=30, chains=3, hops=2)
    (cell,) = task.cells()
    firsts, changes = [], []
    for number in range(30):
        question = task.numbered_question(cell, number)
        names = re.findall(r"VAR (\w+) = ", task.model.decode(question.ids).split("The text:")[1])
        is_asked = [name in question.answers for name in names]
        assert [name for name in names if name in question.answers] == question.answers
        firsts.append(is_asked[0])
        changes.append(sum(one != other for one, other in pairwise(is_asked)))
    assert 3 <= sum(firsts) <= 18  # of 30, a third of which is 10
    assert max(changes) >= 4


def test_a_key_stands_at_its_depth(tokenizer):
    task = task_of("passkey", Oracle(tokenizer, of_passkey), lengths=[2000], depths=5)
    for cell in task.cells():
        text = task.model.decode(task.numbered_question(cell, 0).ids)
        task_end, question = text.index("The grass") if cell.at["depth"] else 0, text.index("\nWhat is")
        place = (text.index("\nThe pass key is") - task_end) / (question - task_end)
        assert abs(place - cell.at["depth"]) < 0.1


CHANCES = {
    "passkey": 1 / 90_000,  # keys of five digits
    "phonebook": 1e-10,
    "needles": 1 / 9_000_000,  # numbers of seven digits
    "variables": 26**-5.0,
    "aggregation": 3 / len({*words_module.ADJECTIVES, *words_module.NOUNS}),  # each of three words among all
    "questions": 1 / len(words_module.CITIES),
}


@pytest.mark.parametrize("name", NAMES)
def test_chance_is_that_of_a_guess_among_what_answers_are_drawn_from(name, tokenizer):
    cells = task_of(name, Oracle(tokenizer, SOLVERS[name])).cells()
    assert [cell.chance for cell in cells] == [pytest.approx(CHANCES[name], rel=1e-9, abs=0)] * len(cells)


def test_a_phonebook_begins_in_the_middle_of_a_line(tokenizer):
    """With what is left of it, so that no name stands there without its whole number."""
    task, begun, shots = task_of("phonebook", Oracle(tokenizer, of_phonebook)), 0, set()
    for sample in range(10):
        text = task.model.decode(task.numbered_question(task.cells()[0], sample).ids)
        first, *lines = text.partition("\n\n")[0].split("\n")
        assert re.fullmatch(r"[^\d\n]*\d{0,10}", first)
        assert [line for line in lines if not re.fullmatch(r"\w+ [A-Z]\. \w+: \d{10}", line)] == []
        assert len({line.partition(":")[0] for line in lines}) == len(lines)
        shots.add(text.partition("phonebook above:\n")[2].partition(":")[0])
        begun += bool(first)
    assert (begun > 5, len(shots)) == (True, 10)


def test_parts_stand_after_all_gaps_before_them(tokenizer):
    """Up to a sentence earlier, since none is cut; ids below 0 are no text."""
    task = task_of("needles", Oracle(tokenizer, of_needles))
    sentence = task.model.encode_next(" The grass is green.")
    filler, gaps = Filler(task.model, lambda: " The grass is green."), [0.1, 0.4, 0.2, 0.3]
    ids = task.with_filler([[-1], [-2], [-3], [-4], [-5]], filler, gaps=gaps, length=2005)
    assert (len(ids), ids[0], ids[-1]) == (2005, -1, -5)
    for part, before in ((-2, 200), (-3, 1000), (-4, 1400)):
        filled = ids.index(part) + part + 1  # without the parts before it
        assert before - len(sentence) < filled <= before
    ids = task.with_filler([[-1], [-2], [-3]], filler, gaps=[0.5, 0.5], length=3 + 10 * len(sentence))
    assert ids == [-1, *sentence * 5, -2, *sentence * 5, -3]


def test_only_the_last_sentence_before_the_question_is_cut(tokenizer):
    for sample in range(10):
        task = task_of("questions", Oracle(tokenizer, of_questions))
        book = task.model.decode(task.numbered_question(task.cells()[-1], sample).ids).split("\nQuestion")[0]
        facts = book.split("\n")[1].removeprefix(" ").split(". ")
        forms = r"(\w+ \w+ works in the shop of the \w+ \w+|The shop of the \w+ \w+ is in \w+)\.?"
        assert [fact for fact in facts[:-1] if not re.fullmatch(forms, fact)] == []


@pytest.mark.parametrize("name", ["needles", "questions"])
def test_what_is_asked_for_stands_in_the_text_once(name, tokenizer, monkeypatch):
    """Also where there are so few words that others would often be the same."""
    for words, few in (("ADJECTIVES", 2), ("NOUNS", 3), ("FIRST_NAMES", 2), ("LAST_NAMES", 2)):
        for module in ("words", "questions"):
            place = f"sambalm.evaluation.tasks.{module}.{words}"
            monkeypatch.setattr(place, getattr(words_module, words)[:few], raising=module == "words")
    task = task_of(name, Oracle(tokenizer, SOLVERS[name]))
    for cell in task.cells():
        question = task.numbered_question(cell, 0)
        found = SOLVERS[name](task.model.decode(question.ids))
        assert [found.count(answer) for answer in question.answers] == [1] * len(question.answers)
        assert len(found.split(",")) == len(question.answers)


@pytest.mark.parametrize(("text", "score"), [("a 123 and 456", 1.0), ("123", 0.5), ("12 3 45 6", 0.0)])
def test_a_score_is_the_part_of_the_answers_that_was_found(text, score, tokenizer):
    assert task_of("needles", Oracle(tokenizer, of_needles)).grade(text, ["123", "456"]) == score


@pytest.mark.parametrize(("times", "other_times"), [(5, 1), (10, 2)])
def test_frequent_words_stand_out_in_lists_of_any_length(times, other_times, tokenizer):
    given = {"common": 5, "common_times": times, "other_times": other_times}
    task = task_of("aggregation", Oracle(tokenizer, of_aggregation), **given)
    words = [f"w{number}" for number in range(200)]
    for room in (300, 1000, 3000, 3777, 20_000):
        listed, _ = task._list(words[:5], words[5:], room=room)
        assert 0 <= room - sum(map(len, listed)) < 10
        counts = Counter(map(tuple, listed))
        often = {tuple(task.model.encode_next(f" {word}")) for word in words[:5]}
        assert {word for word, _ in counts.most_common(5)} == often
        assert min(counts[word] for word in often) >= times
        assert min(counts[word] for word in often) > max(n for word, n in counts.items() if word not in often) + 1


@pytest.mark.parametrize("name", NAMES)
def test_a_length_that_is_too_short_is_refused_with_what_it_takes(name, tokenizer):
    model = Oracle(tokenizer, SOLVERS[name])
    with pytest.raises(EvaluationError, match=rf"{name}.lengths has 40, but .* takes up to (\d+) tokens") as caught:
        task_of(name, model, lengths=[2000, 40]).items()
    task = task_of(name, model, lengths=[40])
    errors = []
    for cell in task.cells():
        for sample in range(cell.samples):
            with pytest.raises(TooShortError) as one:
                task.numbered_question(cell, sample)
            errors.append(one.value.needed)
    needed = int(re.search(r"takes up to (\d+) tokens", str(caught.value))[1])
    assert needed == caught.value.needed == max(errors)
    sent = pickle.loads(pickle.dumps(caught.value))
    assert (str(sent), sent.needed) == (str(caught.value), needed)
    assert task_of(name, model, lengths=[2 * needed]).items()
    for cell in task.cells():
        with pytest.raises(TooShortError) as one:
            task.question(cell, random.Random(5))
        needed = one.value.needed
        assert len(task.question(replace(cell, at={**cell.at, "length": needed}), random.Random(5)).ids) == needed
        with pytest.raises(TooShortError, match=f"takes up to {needed} tokens"):
            task.question(replace(cell, at={**cell.at, "length": needed - 1}), random.Random(5))


def test_draws_of_two_samples_are_not_those_of_two_others():
    """The generator's seed is a text, of which random makes a hash that differs for every cell and sample."""
    assert random.Random("0 length=4/depth=0 1").random() != random.Random("0 length=4/depth=0 2").random()


def test_an_answer_has_the_tokens_that_its_own_question_gives(tokenizer, monkeypatch):
    """Beside one in the same batch that gives more."""
    task = task_of("passkey", Oracle(tokenizer, lambda text: " one two three four 9"))
    ids = tokenizer.encode("a question")
    questions = [Question(ids, ["9"], 2), Question(ids, ["9"], 40)]
    monkeypatch.setattr(task, "numbered_question", lambda cell, sample: questions[sample])
    items = [Item(str(number), len(ids), content=(None, number)) for number in range(2)]
    assert [record["score"] for record in task.measure(items, lambda _: None)] == [0, 1]
