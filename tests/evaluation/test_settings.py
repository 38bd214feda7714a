"""Settings of tasks: how numbers of tokens are written, and whom `--data` reaches."""

import pytest

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.settings import shown_tokens
from sambalm.evaluation.tasks.registry import TASKS, described_keys, task_settings


def test_numbers_of_tokens_may_have_a_suffix():
    found = task_settings(["passkey"], ["passkey.lengths=[4k,' 1M ',512,'3']"], data=[])["passkey"]
    assert found.lengths == [4096, 2**20, 512, 3]


@pytest.mark.parametrize(
    ("count", "shown"),
    [(1000, "1000"), (1024, "1K"), (1536, "1536"), (3072, "3K"), (2**20, "1M"), (2**20 + 1024, "1025K")],
)
def test_numbers_of_tokens_are_shown_short_where_nothing_is_lost(count, shown):
    assert shown_tokens(count) == shown


def test_data_is_for_the_tasks_that_read_some_and_name_none():
    tasks = ["sliding", "passkey", "perplexity"]
    found = task_settings(tasks, ["perplexity.data=[own.txt]", "sliding.length=1K"], data=["a", "b c"])
    assert list(found) == tasks
    assert (found["sliding"].data, found["perplexity"].data) == (["a", "b c"], ["own.txt"])
    found = task_settings(tasks, [], data=["a"])
    assert (found["sliding"].data, found["perplexity"].data) == (["a"], ["a"])


def test_names_that_are_none_are_told_with_the_nearest():
    with pytest.raises(EvaluationError, match=r"there is no task 'pasky'; .*; did you mean passkey"):
        task_settings(["pasky"], [], data=[])
    with pytest.raises(EvaluationError, match=r"unknown key passky .*; did you mean passkey"):
        task_settings(["passkey"], ["passky.samples=3"], data=[])
    with pytest.raises(EvaluationError, match="--task needles is given twice"):
        task_settings(["passkey", "needles", "needles"], [], data=[])


def test_keys_are_described_with_their_defaults():
    rows = described_keys(TASKS["variables"].schema)
    assert rows[1:3] == [
        ("samples", "20", "Texts of each length and kind."),
        ("seed", "0", "What the texts are drawn from."),
    ]
