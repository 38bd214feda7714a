"""Each mistake of a user ends the program in one line, and leaves nothing behind."""

import contextlib
import json
import shutil
import subprocess

import numpy as np
import pytest
import yaml

from sambalm.data_pipeline.preprocess import preprocess as make_shards
from tests.support import program


def listing(folder):
    """Files by content. The cache of checked ids is left out: it is complete, and reused by the next start."""
    paths = (path for path in sorted(folder.rglob("*")) if ".index_cache" not in path.parts)
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def refused(sambalm, tmp_path):
    """Runs a command that must fail as the user's mistake, in one line that names things, and leave no trace."""

    def run(*arguments, names):
        before = listing(tmp_path)
        code, out, err = sambalm(*arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert err.endswith("\n")
        for name in names:
            assert str(name) in err
        assert listing(tmp_path) == before

    return run


GOOD_LINE = json.dumps({"text": "a line of text"}) + "\n"
BAD_TEXTS = {
    "malformed JSON": (GOOD_LINE + '{"text": "cut', "text.jsonl:2: malformed JSON"),
    "empty": ("", "the inputs hold no "),
    "blank lines": ("\n\n", "the inputs hold no "),
    "no text": (GOOD_LINE + '{"body": "x"}\n', "text.jsonl:2: no key 'text' (keys: body)"),
    "text of another type": ('{"text": 5}\n', "text.jsonl:1: the value of 'text' is a number, not a string"),
    "not an object": ("[1]\n", "text.jsonl:1: expected a JSON object"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_text_is_refused_by_file_and_line(name, refused, tokens, tmp_path):
    content, message = BAD_TEXTS[name]
    text = tmp_path / "text.jsonl"
    text.write_text(content)
    model = tokens.with_name("tokenizer.model")
    refused(
        "data", "tokenizer", "--input", text, "--vocab-size", 300, "--output", tmp_path / "new.model", names=[message]
    )
    for workers in (1, 2):
        refused(
            *("data", "preprocess", "--input", text, "--tokenizer", model),
            *("--output", tmp_path / "tokens", "--workers", workers),
            names=[message],
        )


@pytest.mark.slow
def test_a_bad_line_costs_no_complete_shard(sambalm, tokens, tmp_path):
    text, prefix = tmp_path / "text.jsonl", tmp_path / "tokens"
    text.write_text(GOOD_LINE * 300_000 + "{}\n")  # more than is read at once
    arguments = ("--input", text, "--tokenizer", tokens.with_name("tokenizer.model"), "--output", prefix)
    command = ("data", "preprocess", *arguments, "--shard-tokens", 500_000)
    code, out, err = sambalm(*command)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {text}:300001: no key 'text'")
    assert err.count("\n") == 1
    assert not prefix.with_suffix(".json").exists()
    code, out, err = sambalm(*command, "--on-error", "skip")
    assert (code, err) == (0, "")
    assert "shards were there already" in out
    assert "1 malformed document was skipped" in out
    assert prefix.with_suffix(".json").exists()


def test_inputs_that_do_not_exist_are_refused(refused, tmp_path):
    missing = tmp_path / "none*.jsonl"
    refused("data", "tokenizer", "--input", missing, "--vocab-size", 300, "--output", tmp_path / "m", names=[missing])


def test_a_folder_in_place_of_text_is_refused_with_its_files(refused, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("words")
    for arguments in (("tokenizer", "--vocab-size", 300), ("preprocess", "--tokenizer", tmp_path / "m")):
        refused(
            *("data", *arguments, "--input", tmp_path / "texts", "--output", tmp_path / "out"),
            names=[f"texts is a directory; name its files by a quoted glob: '{tmp_path}/texts/*.txt'"],
        )


def test_text_of_another_ending_is_refused(refused, tmp_path):
    (tmp_path / "a.md").write_text("words")
    arguments = ("--input", tmp_path / "a.md", "--vocab-size", 300, "--output", tmp_path / "m")
    refused(
        "data",
        "tokenizer",
        *arguments,
        names=["extension '.md'", "give plain text of another name the ending .txt, and extract the text of any other"],
    )


def test_a_folder_in_place_of_an_output_is_refused(refused, tmp_path):
    (tmp_path / "text.jsonl").write_text(GOOD_LINE)
    (tmp_path / "data").mkdir()
    into = ("--output", tmp_path / "data", "--overwrite")
    text = ("--input", tmp_path / "text.jsonl")
    model = ("--tokenizer", tmp_path / "m")
    refused("data", "tokenizer", *text, "--vocab-size", 300, *into, names=["data is a folder; give the name of a file"])
    for arguments in (("preprocess", *text), ("passkey", "--documents", 1), ("phonebook", "--documents", 1)):
        refused(
            "data",
            *arguments,
            *model,
            *into,
            names=["data is a folder; give a prefix in it, such as"],
        )


@pytest.mark.parametrize("command", [("status",), ("report",), ("checkpoint", "list"), ("checkpoint", "verify")])
def test_what_is_no_run_is_refused_with_the_reason(command, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    reasons = {
        "none": f"there is no such folder, seen from {tmp_path};",
        "file": "it is a file;",
        "folder": "it holds no ",
    }
    for name, reason in reasons.items():
        refused(*command, name, names=[f"{name} is not a run", reason, "give the folder that the config names"])


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(refused, tmp_path):
    (tmp_path / "text.jsonl").write_text(GOOD_LINE)
    arguments = ("--input", tmp_path / "text.jsonl", "--vocab-size", 9000, "--output", tmp_path / "m")
    refused("data", "tokenizer", *arguments, names=["vocab_size=9000 is too large"])


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_a_wrong_tokenizer_is_refused(content, refused, tmp_path):
    (tmp_path / "text.jsonl").write_text(GOOD_LINE)
    model = tmp_path / "tokenizer.model"
    if content is not None:
        model.write_bytes(content)
    refused(
        *("data", "preprocess", "--input", tmp_path / "text.jsonl", "--tokenizer", model, "--output", tmp_path / "out"),
        names=[model, "does not exist" if content is None else "`sambalm data tokenizer`"],
    )


def test_existing_shards_are_not_replaced_unasked(refused, tokens, tmp_path):
    for path in tokens.parent.glob("t*"):
        shutil.copy(path, tmp_path)
    refused(
        *("data", "preprocess", "--input", tmp_path / "text.jsonl", "--tokenizer", tmp_path / "tokenizer.model"),
        *("--output", tmp_path / "tokens"),
        names=["tokens.json exists already"],
    )


@pytest.fixture
def config(run_values, tmp_path):
    """Path of a run's YAML file whose values fit its data."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_values))
    return path


def test_a_missing_config_is_refused(refused, tmp_path):
    for command in ("train", "params"):
        refused(command, tmp_path / "none.yaml", names=[tmp_path / "none.yaml", "No such file"])


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("model.window=0", ["model.window is 0", "greater than 0"]),
        ("model.num_query_heads=5", ["model.num_query_heads is 5", "hidden_size 32"]),
        ("train.steps=abc", ["train.steps is 'abc'", "integer"]),
        ("model.windw=4", ["unknown key model.windw", "window"]),
        ("format_version=2", ["format_version is 2", "format 1"]),
        ("run.dir=2026-13-45", ["not valid YAML"]),
    ],
)
def test_a_bad_value_is_refused_by_every_command_that_reads_it(override, names, refused, config):
    refused("train", config, override, names=names)
    refused("params", config, override, names=names)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("data.train=nowhere/tokens", ["nowhere/tokens"]),
        ("model.vocab_size=383", ["model.vocab_size=383", "384 ids of the tokenizer", "at least 384"]),
        ("train.global_batch_tokens=288", ["train.global_batch_tokens is 288", "train.micro_batch_size 2"]),
        ("parallel.tensor=2", ["1 process cannot", "parallel.tensor 2", "`torchrun --nproc-per-node 2 -m"]),
    ],
)
def test_a_run_that_cannot_start_is_refused(override, names, refused, config):
    refused("train", config, override, names=names)


@pytest.fixture
def patched_shard(tokens, tmp_path):
    """A copy of the data with one id of its training part set by hand to one that no model has."""
    shutil.copytree(tokens.parent, tmp_path / "data", ignore=shutil.ignore_patterns(".index_cache"))
    ids = np.memmap(tmp_path / "data" / "tokens_00000.bin", dtype=np.uint16, mode="r+")
    ids[5000] = 60_000
    ids.flush()
    return tmp_path / "data" / "tokens"


def test_an_id_out_of_range_in_a_bare_shard_is_refused_before_the_run(refused, config, patched_shard):
    patched_shard.with_suffix(".json").unlink()
    override = f"data.train={patched_shard}_00000"
    refused(
        "train",
        config,
        override,
        names=["tokens_00000.bin", "token id 60000 at byte 10000", "384 ids of model.vocab_size"],
    )
    refused("train", config, override, names=["token id 60000 at byte 10000"])  # from the cache


def test_an_id_out_of_range_in_a_shard_with_a_manifest_is_refused_before_the_run(refused, config, patched_shard):
    names = ["tokens_00000.bin", "token id 60000 at byte 10000", "384 ids of the tokenizer"]
    refused("train", config, f"data.train={patched_shard}", names=names)
    refused("data", "index", config, f"data.train={patched_shard}", names=names)


@pytest.mark.long
def test_an_id_out_of_range_in_a_shard_that_nobody_verified_ends_the_run(config, patched_shard):
    """The batch that holds it is refused: in one epoch, one of the steps."""
    size = ["train.global_batch_tokens=8192", "train.steps=200"]
    arguments = ["train", config, f"data.train={patched_shard}", "data.verify=false", *size]
    ended = program.run(*arguments, variables={"COLUMNS": "200"})
    assert ended.returncode == 2, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if "error" in line]
    assert "tokens_00000.bin holds token id 60000 at byte 10000 (in sample " in line
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_is_something_else_is_refused(exists, refused, tmp_path):
    folder = tmp_path / "folder"
    if exists:
        folder.mkdir()
    refused("convert", "to-hf", folder, tmp_path / "hf", names=[folder, "neither a checkpoint nor a run"])
    refused("generate", folder, "--prompt", "x", names=[folder, "is no model"])
    refused("report", folder, names=[folder, "not a run"])


def test_a_command_line_that_is_none_is_refused_with_what_is_near(refused, config):
    refused("trein", config, names=["no such command 'trein'; did you mean 'train'?", "`sambalm --help`"])
    refused("data", "preproc", names=["did you mean 'preprocess'?", "`sambalm data --help`"])
    wrong = "invalid value for '--precision': 'int8' is not one of 'fp32', 'bf16', 'fp16'"
    refused("convert", "to-hf", config.parent, "new", "--precision", "int8", names=[wrong])
    refused("plan", config, "--gpu", "8", names=["no such option: --gpu", "--gpus", "`sambalm plan --help`"])
    said = (
        "no such option: --steps; keys of the config follow without dashes, as train.steps=100 (`sambalm train --help`"
    )
    refused("train", config, "--steps", "8", names=[said])
    refused("plan", config, names=["missing option '--gpus'"])
    refused("evaluate", config.parent, "--task", "perplxity", names=["did you mean perplexity?"])


@pytest.mark.parametrize("number", ["inf", "1e400", "-3", "4K", "0", "1.5"])
def test_a_number_that_is_none_is_refused_by_its_option(number, refused, tokens):
    refused("data", "blend", tokens, "--tokens", number, names=["invalid value for '--tokens'", number])


def test_a_file_that_exists_is_not_replaced_unasked(refused, sambalm, tmp_path):
    text, model = tmp_path / "text.txt", tmp_path / "t.model"
    text.write_text("one two three\n" * 100)
    model.write_text("mine")
    training = ("data", "tokenizer", "--input", text, "--vocab-size", 268, "--output")
    refused(*training, model, names=[model, "exists already", "--overwrite"])
    refused(*training, text, names=[text, "exists already"])
    refused("data", "python-corpus", text, names=[text, "--overwrite"])
    assert sambalm(*training, model, "--overwrite")[0] == 0
    assert model.read_bytes() != b"mine"


def test_a_shard_is_not_taken_for_all_of_its_data(refused, config, tokens, tmp_path):
    prefix, text, model = tmp_path / "many", tokens.with_name("text.jsonl"), tokens.with_name("tokenizer.model")
    summary = make_shards([text], tokenizer=model, output_prefix=prefix, shard_tokens=40_000)
    shard = f"{prefix}_00000"
    refused(
        "train",
        config,
        f"data.train={shard}",
        names=[f"{shard} is one of the {summary.shards} shards of {prefix}: give {prefix}"],
    )


def test_files_that_the_system_refuses_are_named(refused, config, tokens, tmp_path):
    refused("data", "python-corpus", config / "corpus.jsonl", names=[config, "choose a writable directory"])
    refused("report", tmp_path / "none", names=[tmp_path / "none", "not a run", "no such folder;"])
    output = tmp_path / "folder"
    output.mkdir()
    arguments = ("--input", tokens.with_name("text.jsonl"), "--vocab-size", 384, "--output", output, "--overwrite")
    refused("data", "tokenizer", *arguments, names=[output])


def test_a_full_disk_is_named(sambalm, tokens, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        text, model = tokens.with_name("text.jsonl"), tokens.with_name("tokenizer.model")
        inputs = ("--input", text, "--tokenizer", model, "--workers", 1)
        for command in (
            ("data", "preprocess", *inputs, "--output", disk / "p"),
            ("data", "tokenizer", "--input", text, "--vocab-size", 384, "--output", disk / "t.model"),
        ):
            code, out, err = sambalm(*command)
            assert (code, out, err.count("\n"), "make room" in err) == (2, "", 1, True), err
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_device_is_a_name_or_a_file(refused, sambalm, config, tmp_path):
    planning = ("plan", config, "--gpus", 2, "--gpu-memory-gib", 80, "--top", 1, "--json")
    refused(*planning, "--device", "h20", names=["no device 'h20' among h100, h200, a100, b200", "did you mean h200?"])
    device = tmp_path / "own.yaml"
    refused(*planning, "--device", device, names=[device, "No such file"])
    device.write_text("name: own\nmatrix_flop: 1\n")
    refused(*planning, "--device", device, names=["unknown key matrix_flop", "did you mean matrix_flops?"])
    device.write_text("name: own\nmemory_bytes_per_s: 1e9\n")
    (slow,) = json.loads(sambalm(*planning, "--device", device)[1])
    (fast,) = json.loads(sambalm(*planning)[1])
    assert slow["time"]["compute_s"] > 10 * fast["time"]["compute_s"]
    assert fast["memory_bytes"] == max(stage["total_bytes"] for stage in fast["stages"])


def test_params_are_printed_as_json(sambalm, config):
    counts = json.loads(sambalm("params", config, "--json")[1])
    assert sambalm("params", config)[1].split() == [str(word) for pair in counts.items() for word in pair]


def test_a_sample_is_shown_as_its_run_reads_it(sambalm, refused, config, tokens):
    code, out, _ = sambalm("data", "inspect", "--config", config, "--sample", 3)
    assert code == 0
    assert "from byte " in out
    values = yaml.safe_load(config.read_text())
    values["run"]["seed"] += 1
    config.write_text(yaml.safe_dump(values))
    assert sambalm("data", "inspect", "--config", config, "--sample", 3)[1] != out
    refused("data", "inspect", names=["either PREFIX or --config"])
    refused("data", "inspect", "--config", config, names=["--config goes with --sample"])


def test_a_shell_completes_commands(sambalm, monkeypatch):
    monkeypatch.setenv("_SAMBALM_COMPLETE", "complete_bash")
    for words, completed in (("sambalm che", ["checkpoint", "check-layout"]), ("sambalm data pre", ["preprocess"])):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        code, out, _ = sambalm()
        assert (code, sorted(out.split())) == (0, sorted(completed))
