"""The forms of long texts: what is asked for, what stands around it and in which order, and answers that stay."""

import random
import re
from collections import Counter

import pytest

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.tasks import phonebook, variables
from sambalm.evaluation.tasks import words as words_module
from tests.evaluation.oracle import Oracle
from tests.evaluation.test_long_texts import NAMES, SOLVERS, of_phonebook, task_of

ANSWERS = {
    "passkey": [["90997"], ["86144"]],
    "phonebook": [["6589878890"], ["1246679339"]],
    "needles": [["7270020"], ["6685033", "8512245", "8798236", "6530659"]],
    "variables": [["MYGGA", "YWXFE", "RWWCT", "MMHPD", "UERVA"], ["UROYC", "MWNNL", "GBSAM", "TKWJC", "CKXHK"]],
    "aggregation": [["sleepy", "temple", "ribbon"], ["stormy", "light", "odd"]],
    "questions": [["Porto"], ["Boston"]],
}


def test_answers_are_the_same_in_every_process_and_version(tokenizer):
    """Of the first text of the first cell and of the last one; whoever changes them gives the task another version."""
    for name in NAMES:
        task = task_of(name, Oracle(tokenizer, SOLVERS[name]))
        found = [list(task.numbered_question(cell, 0).answers) for cell in (task.cells()[0], task.cells()[-1])]
        assert (name, task.version, found) == (name, 1, ANSWERS[name])


def texts_of(name, tokenizer, *, cell=-1, **changes) -> list[str]:
    task = task_of(name, Oracle(tokenizer, SOLVERS[name]), **changes)
    return [task.model.decode(task.numbered_question(task.cells()[cell], sample).ids) for sample in range(10)]


def test_what_is_asked_for_stands_in_another_order_each_time(tokenizer):
    firsts, orders, shops, chains = [], [], [], []
    for text in texts_of("phonebook", tokenizer):
        name = text.rpartition("\n")[2]
        firsts.append(text.index(f"\n{name}") / text.index("\n\nNumbers"))
    assert min(firsts) < 0.4 < 0.6 < max(firsts)
    for text in texts_of("needles", tokenizer, kinds=["multi_query"]):
        book, asked = text.split("\nQuestion: ")
        things = re.findall(r"the ([a-z]+ [a-z]+)(?=,| and the| in the text)", asked.split("?")[0].split(" of ", 1)[1])
        orders.append(tuple(sorted(range(4), key=lambda number: book.index(things[number]))))
    assert len(set(orders)) > 4
    for text in texts_of("questions", tokenizer, kinds=["two_facts"]):
        person = re.search(r"does (.+) work\?", text)[1]
        shop = re.search(rf"{person} works in the shop of the (\w+ \w+)\.", text)[1]
        shops.append(text.index(f"{person} works") < text.index(f"The shop of the {shop} is"))
    assert set(shops) == {False, True}
    for text in texts_of("variables", tokenizer, chains=2):
        book = text.split("The text:")[1]
        lines = re.findall(r"VAR (\w+) = (\w+)\n", book)
        first = [place for place, (_, before) in enumerate(lines) if before.isdigit()]
        chains.append(first[1] < 5)  # the second begins before the first ends
    assert True in chains
    for text in texts_of("aggregation", tokenizer):
        listed = text.rsplit("List:", 1)[1].split("\nQuestion")[0].split()
        common = [word for word, _ in Counter(listed).most_common(3)]
        assert len(set(listed[:18]) - set(common)) > 3
        assert any(word.startswith(listed[-1]) for word in words_module.ADJECTIVES + words_module.NOUNS)
        assert text.endswith("\nQuestion: Which 3 words are most frequent in the list?\nAnswer:")


@pytest.mark.parametrize("name", ["needles", "variables", "questions"])
def test_filler_stands_in_all_gaps(name, tokenizer, monkeypatch):
    task, found = task_of(name, Oracle(tokenizer, SOLVERS[name])), []

    def noted(parts, filler, *, gaps, length):
        found.append(gaps)
        assert (len(gaps), sum(gaps)) == (len(parts) - 1, pytest.approx(1))
        return [0] * length

    monkeypatch.setattr(task, "with_filler", noted)
    for cell in task.cells():
        for sample in range(5):
            task.numbered_question(cell, sample)
    assert min(min(gaps) for gaps in found) >= 0
    assert len({gaps[0] for gaps in found}) == len(found)


def test_needles_lie_in_noise_or_among_others(tokenizer):
    numbers = {"single": 1, "multi_value": 4, "multi_query": 4}
    for number, kind in enumerate(["single", "multi_key", "multi_value", "multi_query"]):
        for text in texts_of("needles", tokenizer, cell=2 * number + 1)[:3]:
            book = text.split("\nQuestion")[0]
            needles = re.findall(r" The number of the \w+ \w+ is (\d{7})\.", book)
            noise = [sentence for sentence in words_module.NOISE if sentence in book]
            assert len(set(needles)) == len(needles)
            if kind == "multi_key":
                assert (len(needles) > 10, noise) == (True, [])
            else:
                assert (len(needles), len(noise) > 4) == (numbers[kind], True)


QUESTIONS = {
    "single": r"What is the number of the (\w+ \w+) in the text above\?\nAnswer: The number of the \1 is",
    "multi_key": r"What is the number of the (\w+ \w+) in the text above\?\nAnswer: The number of the \1 is",
    "multi_value": r"What are the numbers of the (\w+ \w+) in the text above\?\nAnswer: The numbers of the \1 are",
    "multi_query": r"What are the numbers of the (\w+ \w+(?:, the \w+ \w+){2} and the \w+ \w+) in the text above\?\n"
    r"Answer: The numbers of the \1 are",
}


@pytest.mark.parametrize("kind", QUESTIONS)
def test_a_question_asks_for_one_number_or_for_several(kind, tokenizer):
    for text in texts_of("needles", tokenizer, kinds=[kind])[:3]:
        assert re.search(rf"\nQuestion: {QUESTIONS[kind]}$", text)


def test_facts_about_others_are_of_all_kinds(tokenizer):
    for text in texts_of("questions", tokenizer, cell=1):
        homes = re.findall(r", a (\w+), lives in (\w+)\.", text)
        assert min(len(set(values)) for values in zip(*homes, strict=True)) > 5
    for text in texts_of("questions", tokenizer, cell=3):
        assert min(text.count(" works in the shop of the "), text.count(" The shop of the ")) > 5


def test_variables_come_after_an_example(tokenizer, monkeypatch):
    example = r"\nVAR (\w+) = (\d+)\n\nVAR (\w+) = \1\n\nQuestion: Which variables hold the value \2\?\nAnswer: \1 \3\n"
    for text in texts_of("variables", tokenizer)[:3]:
        assert re.search(f"An example:{example}\nThe text:", text)
    monkeypatch.setattr(variables, "_LETTERS", 1)
    assert len(set(variables._names(random.Random(0), 26))) == 26


@pytest.mark.parametrize(("name", "kind"), [("needles", "single"), ("questions", "one_fact")])
def test_a_kind_that_is_named_twice_is_measured_once(name, kind, tokenizer):
    items = task_of(name, Oracle(tokenizer, SOLVERS[name]), kinds=[kind, kind]).items()
    assert len({item.id for item in items}) == len(items) == 6


def test_names_pairs_and_numbers_are_all_different():
    draw = random.Random(0)
    pairs = len(words_module.ADJECTIVES) * len(words_module.NOUNS)
    assert len(set(words_module.different_pairs(draw, pairs))) == pairs
    numbers = words_module.different_numbers(draw, 900, digits=3)
    assert sorted(numbers) == [str(number) for number in range(100, 1000)]
    names = {phonebook._entry(number, draw)[0] for number in range(phonebook._NAMES)}
    assert len(names) == phonebook._NAMES


def test_a_phonebook_longer_than_all_names_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(phonebook, "_NAMES", 20)
    with pytest.raises(
        EvaluationError, match=r"phonebook.lengths has 1000, but all 20 names and numbers take \d+ tokens"
    ):
        task_of("phonebook", Oracle(tokenizer, of_phonebook), lengths=[1000]).items()
