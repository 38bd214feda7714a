"""The recipe on a throw-away Slurm cluster, in the environment that `make test-datatrove` makes."""

import sys

import pytest

from sambalm.data_pipeline.recipes.web import main
from sambalm.data_pipeline.tokenizer_training import train_tokenizer
from tests.support.data import VOCAB_SIZE, write_jsonl
from tests.support.pages import make_pages
from tests.support.preprocess import contents
from tests.support.slurm_client import wait_until

pytest.importorskip("datatrove", reason="`make test-datatrove` makes an environment with datatrove")


def test_slurm_writes_the_bytes_of_one_machine(cluster, tmp_path):
    pages = make_pages(20, words=200, seed=0)
    (tmp_path / "in").mkdir()
    for number in range(3):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", [*pages[number::3], pages[0]])
    tokenizer = tmp_path / "tokenizer.model"
    train_tokenizer([tmp_path / "in" / "0.jsonl"], vocab_size=VOCAB_SIZE, output=tokenizer)

    def words(place: str, *options: str) -> list[str]:
        chosen = {
            "--input": "in",
            "--tokenizer": "tokenizer.model",
            "--output": f"{place}/d",
            "--work": f"{place}-work",
        }
        paths = [word for name, path in chosen.items() for word in (name, str(tmp_path / path))]
        return [*paths, "--format", "jsonl", "--tasks", "2", "--workers", "2", *options]

    submit = [sys.executable, "-m", "sambalm.data_pipeline.recipes.web"]
    cluster.run(*submit, *words("slurm", "--executor", "slurm", "--partition", "test", "--memory-gb", "1"))
    joined = tmp_path / "slurm-work" / "logs" / "join" / "completions" / "00000"
    wait_until(joined.exists, 300, lambda: cluster.run("squeue").stdout)
    assert main(words("local")) == 0
    expected, found = contents(tmp_path / "local" / "d"), contents(tmp_path / "slurm" / "d")
    assert len(expected) == 5
    assert [*found] == [*expected]
    assert [name for name in found if found[name] != expected[name]] == []
