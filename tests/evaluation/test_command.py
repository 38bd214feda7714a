"""`sambalm evaluate`: what it prints and leaves, every mistake in a sentence, and a kill that loses nothing."""

import contextlib
import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from sambalm.data_pipeline.tokenizer_training import train_tokenizer
from sambalm.evaluation.command import _default_output
from sambalm.evaluation.records import FILE_NAME
from sambalm.evaluation.tasks.registry import TASKS
from sambalm.pretrain.errors import ExitCode
from tests.support import program
from tests.support.data import write_jsonl

PASSKEY = ["passkey.lengths=[300,400]", "passkey.depths=2", "passkey.samples=2"]
PERPLEXITY = ["perplexity.lengths=[32,64]", "perplexity.tokens=256"]


def test_results_are_printed_and_left_on_disk(run_dir, sambalm, tmp_path):
    words = [
        "evaluate",
        run_dir,
        "--task",
        "perplexity",
        "--task",
        "passkey",
        *PERPLEXITY,
        *PASSKEY,
        "--output",
        tmp_path,
    ]
    code, out, err = sambalm(*words)
    assert (code, err) == (0, "")
    assert "perplexity:" in out
    assert out.count("standard error") == 2
    folders = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert [name.partition("-")[0] for name in folders] == ["passkey", "perplexity"]
    for name in folders:
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [FILE_NAME, "plot.png", "results.json"]
        assert (tmp_path / name / "plot.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = sambalm(*words, "--json")
    perplexity, passkey = json.loads(out)
    assert perplexity["protocol"]["method"] == "whole context in windows without overlap"
    assert perplexity["protocol"]["settings"] == {"data": [], "lengths": [32, 64], "tokens": 256}
    assert perplexity["model"]["step"] == 6
    assert (perplexity["tokens"], perplexity["seed"], passkey["seed"]) == (8 * 33 + 4 * 65, None, 0)
    assert passkey["scores"][0].keys() == {"score", "length", "value", "standard_error", "chance", "items"}
    assert [(s["length"], s["items"]) for s in passkey["scores"]] == [(300, 4), (400, 4)]
    assert len(passkey["details"]["cells"]) == 4
    assert perplexity["packages"].keys() == {"sambalm", "torch", "transformers", "tokenizers"}
    assert perplexity["protocol"].keys() == {"task", "version", "settings", "weights", "method", "data_sha256"}
    assert passkey["protocol"].keys() == {"task", "version", "settings", "weights", "method", "tokenizer"}
    assert folders == [f"{result['task']}-{result['protocol_hash']}" for result in (passkey, perplexity)]
    lines = [json.loads(line) for line in (tmp_path / folders[0] / FILE_NAME).read_text().splitlines()]
    assert lines[0].keys() == {"item", "score", "text", "answers", "seconds"}


def test_results_go_into_the_run_and_beside_a_hugging_face_folder(run_dir, hf_folders, sambalm):
    for source in (run_dir, run_dir / "checkpoints" / "step_00000003"):
        assert sambalm("evaluate", source, "--task", "passkey", *PASSKEY)[0] == 0
    results = [json.loads(path.read_text()) for path in (run_dir / "evaluation").glob("*/results.json")]
    assert sorted(result["model"]["step"] for result in results) == [3, 6]
    assert sambalm("evaluate", hf_folders["llama"], "--task", "passkey", *PASSKEY, "--dtype", "bf16")[0] == 0
    beside = hf_folders["llama"].with_name("llama-evaluation")
    (path,) = beside.glob("passkey-*/results.json")
    assert json.loads(path.read_text())["model"]["dtype"] == "bfloat16"


def test_the_folder_of_results_follows_from_the_kind_of_model(run_dir, hf_folders, tmp_path, monkeypatch):
    step = run_dir / "checkpoints" / "step_00000003"
    shutil.copytree(step, tmp_path / "kept" / step.name)
    monkeypatch.chdir(hf_folders["llama"])
    for given, expected in (
        (run_dir, run_dir / "evaluation"),
        (step, run_dir / "evaluation"),
        (tmp_path / "kept" / step.name, tmp_path / "kept" / step.name / "evaluation"),
        (hf_folders["llama"], hf_folders["llama"].with_name("llama-evaluation")),
        (Path(), hf_folders["llama"].with_name("llama-evaluation")),
        (Path("../llama"), Path("../llama-evaluation")),
    ):
        assert _default_output(given) == expected
    monkeypatch.chdir(step.parent)
    assert _default_output(Path(step.name)) == run_dir / "evaluation"


def test_tasks_are_listed_with_their_keys(sambalm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = sambalm("evaluate", "--list-tasks")
    assert code == 0
    assert re.search(r"passkey.samples +│ 5 +│ Keys at each length and depth", out)
    for name, task in TASKS.items():
        assert task.summary in out
        assert [key for key in task.schema.model_fields if f"{name}.{key} " not in out] == []
        assert all(field.description for field in task.schema.model_fields.values())


@pytest.fixture(scope="module")
def other_tokenizers(tmp_path_factory):
    """Files of tokenizers with more and with fewer ids than the run's."""
    folder = tmp_path_factory.mktemp("other")
    words = [f"{first}{second}{first}" for first in "abcdefghijklmnopqrstuvwxyz" for second in "aeiou13579"]
    text = write_jsonl(folder / "text.jsonl", [" ".join(words)] * 20)
    files = {"LARGE": folder / "large.model", "SMALL": folder / "small.model"}
    for size, file in zip((600, 300), files.values(), strict=True):
        train_tokenizer([text], vocab_size=size, output=file)
    return files


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "there is nothing to measure: give --task, once or several times, of perplexity, sliding, "),
        (["--task", "pass key"], "there is no task 'pass key'; the tasks are perplexity, sliding, "),
        (["--task", "passkey", "--task", "passkey"], "--task passkey is given twice; give it once"),
        (
            ["--task", "passkey", "needles.seed=3"],
            "'needles.seed=3' is for a task that is not to run; add --task needles",
        ),
        (["--task", "passkey", "passkey.size=3"], "unknown key passkey.size (value 3); allowed in passkey: lengths, "),
        (["--task", "passkey", "passkey.lengths=[0]"], "passkey.lengths.0 is 0: input should be greater than 0"),
        (["--task", "passkey", "passkey.samples=0"], "passkey.samples is 0: input should be greater than 0"),
        (
            ["--task", "passkey", "passkey.samples"],
            "the override 'passkey.samples' is not of the form section.key=value",
        ),
        (["--task", "passkey", "passkey.lengths=[4X]"], "passkey.lengths.0 is '4X': input should be a valid integer"),
        (["--task", "passkey", "passkey.lengths=[1K,1024]"], "passkey.lengths is ['1K', 1024]: name each of them once"),
        (["--task", "passkey", "passkey.lengths=[]"], "passkey.lengths is []: list should have at least 1 item"),
        (["--task", "passkey", "--data", "x"], "--data is given, but passkey reads none; leave it out"),
        (["--task", "needles", "needles.kinds=[one]"], "needles.kinds.0 is 'one': input should be 'single'"),
        (
            ["--task", "aggregation", "aggregation.other_times=9"],
            "aggregation.common_times is 30: give at least five times aggregation.other_times, 45",
        ),
        (["--task", "perplexity", "--data", "nothing.txt"], "no file matches the input 'nothing.txt'"),
        (["--task", "perplexity", "--data", "nothing"], "no file matches the input 'nothing'"),
        (["--task", "perplexity", "--tokenizer", "nothing.model"], "nothing.model"),
        (["--task", "passkey", *PASSKEY, "--tokenizer", "LARGE"], "is not the one that made the tokens of"),
        (
            ["--task", "perplexity", *PERPLEXITY, "--tokenizer", "SMALL"],
            "is not the one that made the tokens of",
        ),
        (["--task", "perplexity", "--device", "tpu"], "the device 'tpu' cannot be used"),
        (["--task", "perplexity", "--step", "4"], "4"),
    ],
)
def test_mistakes_end_in_a_sentence(words, sentence, run_dir, sambalm, tmp_path, other_tokenizers):
    words = [other_tokenizers.get(word, word) for word in words]
    code, out, err = sambalm("evaluate", run_dir, "--output", tmp_path / "out", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*-*"))


def test_settings_are_looked_at_before_a_model_is_loaded(sambalm, tmp_path):
    code, _, err = sambalm("evaluate", tmp_path / "nowhere", "--task", "passkey", "passkey.size=3")
    assert (code, "unknown key passkey.size" in err) == (2, True)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(run_dir, tmp_path):
    text = write_jsonl(tmp_path / "text.jsonl", ["one two three four five six\n" * 20000])
    words = ["evaluate", run_dir, "--task", "perplexity", "--data", text, "--output", tmp_path / "out"]
    with program.start(*words, "perplexity.lengths=[64]", "--batch-tokens", "64") as started:
        program.wait_until(lambda: any(path.stat().st_size for path in (tmp_path / "out").glob(f"*/{FILE_NAME}")), 60)
        started.send_signal(signal.SIGINT)
        _, errors = started.communicate()
        assert started.wait() == ExitCode.INTERRUPTED
    assert errors == f"stopped; what is done is kept in {tmp_path}/out, and the same command goes on from there\n"


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(run_dir, sambalm, tmp_path):
    """By SIGKILL, in a process of its own; what was done is not measured again."""
    text = write_jsonl(tmp_path / "text.jsonl", ["one two three four five six\n" * 1200])
    words = ["evaluate", run_dir, "--task", "perplexity", "--data", text, "--output", tmp_path / "out"]
    words += ["perplexity.lengths=[64]", "--batch-tokens", "64"]

    def done() -> list[str]:
        found = [path.read_text().splitlines() for path in (tmp_path / "out").glob(f"*/{FILE_NAME}")]
        return found[0] if found else []

    with program.start(*words) as started:
        program.wait_until(lambda: len(done()) > 3, 60)
        started.kill()
    kept = done()
    code, out, err = sambalm(*words, "--json")
    assert (code, err) == (0, "")
    (result,) = json.loads(out)
    assert done()[: len(kept) - 1] == kept[:-1]
    assert len(done()) == result["scores"][0]["items"] > len(kept)


@pytest.mark.slow
def test_several_processes_share_the_items_and_print_once(run_dir, sambalm, tmp_path):
    words = ["evaluate", run_dir, "--task", "perplexity", "--task", "passkey", *PERPLEXITY, *PASSKEY]
    words += ["--batch-tokens", 200, "--json"]  # few enough for several batches
    code, out, _ = sambalm(*words, "--output", tmp_path / "alone")
    assert code == 0
    with contextlib.ExitStack() as stack:
        two = program.start_ranks(*words, "--output", tmp_path / "two", ranks=2)
        outputs = [stack.enter_context(one).communicate(120) for one in two]
        assert [one.wait() for one in two] == [0, 0]
    assert outputs[1][0] == ""
    alone, shared = json.loads(out), json.loads(outputs[0][0])
    assert [result["scores"] for result in shared] == [result["scores"] for result in alone]
    assert [result["protocol"] for result in shared] == [result["protocol"] for result in alone]


@pytest.mark.slow
def test_a_mistake_of_several_processes_is_told_once(run_dir):
    with contextlib.ExitStack() as stack:
        two = program.start_ranks("evaluate", run_dir, "--task", "passkey", "--device", "cuda:1", ranks=2)
        errors = [stack.enter_context(one).communicate(60)[1] for one in two]
        assert [one.wait() for one in two] == [ExitCode.BAD_INPUT] * 2
    assert "2 processes cannot share it" in errors[0]
    assert errors[1] == ""
