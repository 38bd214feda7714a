"""What commands make of what they are told and find: exit codes, tables, and what the next command reads."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from sambalm.data_pipeline.made_documents import MadeConfig
from sambalm.pretrain.checkpointing.format import checkpoint_folder
from sambalm.pretrain.cli import app as cli
from sambalm.pretrain.cli import checkpoint as checkpoint_commands
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.lifecycle.lease import Lease
from tests.support.made_runs import make_run
from tests.support.whole_runs import changed

CONFIGS = Path(__file__).parents[2] / "configs"


def told_to(function: str, words: list, monkeypatch, *, result=None) -> tuple[tuple, dict]:
    """Runs a command whose work is left undone; returns what the function that does it is told."""
    told = []

    def tell(*args, **named):
        told.append((args, named))
        return result

    monkeypatch.setattr(function, tell)
    CliRunner().invoke(cli.app, list(map(str, words)))
    return told[-1]


@pytest.mark.parametrize(
    ("of_run", "words", "removed"),
    [
        (None, [], [3, 6, 9]),
        (6, [], [3, 9]),
        (6, ["--keep-every-steps", "9"], [3, 6]),
        (None, ["--keep-every-steps", "6"], [3, 9]),
    ],
)
def test_multiples_are_kept_as_the_run_or_the_command_says(of_run, words, removed, run_values, sambalm, monkeypatch):
    run = make_run(changed(run_values, checkpoint={"keep_every_steps": of_run}), steps=(3, 6, 9, 12))
    prune = ("checkpoint", "prune", run, "--keep", 1, *words)
    expected = [str(checkpoint_folder(run, step)) for step in removed]
    assert json.loads(sambalm(*prune, "--dry-run", "--json")[1])["removed"] == expected
    checked = []
    monkeypatch.setattr(Lease, "check", lambda self: checked.append(self))
    assert json.loads(sambalm(*prune, "--json")[1]) == {"removed": expected, "dry_run": False}
    assert checked, "nothing is removed without the lease"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1.0, "0 s"), (119.0, "119 s"), (120.0, "2 min"), (7199.0, "119 min"), (7200.0, "2 h"), (172_800.0, "2 d")],
)
def test_ages_are_in_the_largest_unit_of_which_there_are_two(seconds, shown):
    assert checkpoint_commands._age(seconds) == shown


@pytest.mark.parametrize(("passed", "exit_code"), [(True, 0), (False, 1)])
def test_a_layout_that_differs_ends_in_exit_code_1(passed, exit_code, monkeypatch):
    found = SimpleNamespace(passed=passed, describe=lambda top: f"{top} tensors")
    monkeypatch.setattr("sambalm.pretrain.check_layout.check_layout", lambda *_, **__: found)
    words = ["check-layout", str(CONFIGS / "demo.yaml"), "--world-size", "2", "--top", "3"]
    ended = CliRunner().invoke(cli.app, words)
    assert (ended.exit_code, ended.stdout) == (exit_code, "3 tensors\n")


def test_each_plan_says_its_phase(monkeypatch):
    monkeypatch.setattr("sambalm.pretrain.planner.search.find_plans", lambda *_, **__: [])
    options = ["--gpus", 8, "--gpu-memory-gib", 80, "--json"]
    for name, phases in (("samba_3.8b_phases", 4), ("demo", 1)):
        words = ["plan", CONFIGS / f"{name}.yaml", *options]
        told = told_to("sambalm.pretrain.planner.table.plans_as_json", words, monkeypatch)
        assert told == (([[]] * phases,), {"are_phases": phases > 1})


@pytest.mark.parametrize("kind", ["passkey", "phonebook"])
def test_documents_are_made_as_asked_for(kind, monkeypatch):
    options = [
        "--tokenizer",
        "t",
        "--output",
        "o",
        "--documents",
        "9",
        "--tokens",
        "64",
        "--seed",
        "3",
        "--loss",
        "all",
    ]
    function = "sambalm.data_pipeline.made_documents.make_documents"
    (maker, *arguments), named = told_to(function, ["data", kind, *options, "--overwrite"], monkeypatch)
    assert maker.name == kind
    assert arguments == [MadeConfig(Path("t"), documents=9, tokens=64, seed=3, loss="all"), Path("o")]
    assert named["overwrite"] is True


def test_a_sample_is_of_the_seed_and_by_the_tokenizer_that_are_named(sambalm, tokens, monkeypatch):
    sample = ("data", "inspect", tokens, "--sample", 0, "--sequence-length", 64)
    shown = [sambalm(*sample, "--seed", seed)[1] for seed in (0, 0, 1)]
    assert shown[0] == shown[1] != shown[2]
    words = ["data", "inspect", "--config", CONFIGS / "demo.yaml", "--sample", 3, "--tokenizer", "t"]
    told = told_to("sambalm.pretrain.reporting.data_index.describe_sample", words, monkeypatch, result="")
    assert told == ((load_config(CONFIGS / "demo.yaml"), 3), {"tokenizer": Path("t")})
