"""The program as users meet it: help, what each command tells the functions that it is for, and the whole chain."""

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from typer.main import get_command
from typer.testing import CliRunner

from sambalm.data_pipeline.config import DataConfig, WeightedSource
from sambalm.data_pipeline.parts import Part
from sambalm.pretrain.checkpointing.format import checkpoint_folders
from sambalm.pretrain.cli import app as cli
from sambalm.pretrain.cli import generate as generate_file
from sambalm.pretrain.cli.progress import ProgressBar
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.generation.command import Request
from sambalm.pretrain.generation.sampling import Sampling
from sambalm.pretrain.planner.hardware import DEVICES
from sambalm.pretrain.planner.run_estimate import Cluster
from tests.support import program
from tests.support.whole_runs import changed

PROGRAM = [sys.executable, "-m", "sambalm.pretrain.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sambalm.pretrain.cli"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def leaf_commands(command=None, path=()):
    """Every command with its words, groups left out."""
    command = command or get_command(cli.app)
    if not hasattr(command, "commands"):
        return {path: command}
    return {
        words: leaf
        for name, child in command.commands.items()
        for words, leaf in leaf_commands(child, (*path, name)).items()
    }


HELP_OF_ALL = """
import json, sys
from typer.testing import CliRunner
from sambalm.pretrain.cli.app import app
helps = [CliRunner().invoke(app, [*words, "--help"]).output for words in json.loads(sys.argv[1])]
print(json.dumps({"helps": helps, "modules": sorted(sys.modules)}))
"""


def test_help_has_an_example_and_appears_without_the_slow_packages():
    words = [(), ("data",), ("config",), ("checkpoint",), ("convert",), ("slurm",), *leaf_commands()]
    script = [sys.executable, "-c", HELP_OF_ALL, json.dumps(words)]
    shown = json.loads(subprocess.run(script, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout)
    assert len(words) == 6 + 28
    for name, text in zip(words, shown["helps"], strict=True):
        assert "Usage:" in text
        if name in leaf_commands():
            assert f"sambalm {' '.join(name)} " in text.split("Example:")[1], name
    slow = {"torch", "numpy", "deepspeed", "megatron", "transformers", "matplotlib", "sentencepiece"}
    assert not slow & set(shown["modules"])


def test_every_example_of_the_help_parses():
    parsed = 0
    for words, command in leaf_commands().items():
        for line in command.epilog.split("\n\n")[1:]:
            arguments = shlex.split(line.replace("-m sambalm.pretrain.cli", "sambalm").partition("sambalm")[2])
            assert tuple(arguments[: len(words)]) == words
            command.make_context(line, arguments[len(words) :])  # raises for an unknown option or a missing argument
            parsed += 1
    assert parsed == 42


def test_version(sambalm):
    assert sambalm("--version") == (0, "sambalm 0.1.0\n", "")


def test_parameters_are_plain_digits(sambalm):
    code, out, err = sambalm("params", Path(__file__).parents[2] / "configs" / "samba_421m.yaml")
    counts = {name: int(count) for name, count in (line.split() for line in out.splitlines())}
    assert (code, err) == (0, "")
    assert counts["total"] == 421_793_280
    assert counts["total"] == sum(counts[part] for part in ("embedding", "mamba", "attention", "mlp", "norms", "head"))


def test_data_is_verified_inspected_and_blended(sambalm, tokens):
    prefix = tokens.with_name("tokens")
    assert "sound" in sambalm("data", "verify", prefix)[1]
    assert "most frequent" in sambalm("data", "inspect", prefix)[1]
    code, out, _ = sambalm("data", "inspect", prefix, "--document", 1, "--sample", 0, "--sequence-length", 64)
    assert code == 0
    assert "--- document 1" in out
    assert "in 64 tokens" in out
    assert "epochs" in sambalm("data", "blend", f"{prefix}=1", "--tokens", "1e6")[1]


def test_damaged_data_ends_verification_with_its_places(sambalm, tokens, tmp_path):
    for path in tokens.parent.glob("t*"):
        shutil.copy(path, tmp_path)
    shard = tmp_path / "tokens_00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    code, out, err = sambalm("data", "verify", tmp_path / "tokens")
    assert (code, err) == (1, "")
    assert f"{shard} has changed since it was written, in bytes 0 to " in out


def test_the_chain_from_text_to_a_model_that_speaks(sambalm, tokens, run_values, tmp_path):
    """Each command reads what the one before it wrote; training runs in a process alone, without torchrun."""
    text, model, prefix = tokens.with_name("text.jsonl"), tmp_path / "tokenizer.model", tmp_path / "data" / "text"
    run_dir, hf = tmp_path / "run", tmp_path / "hf"

    def succeed(*arguments):
        code, out, err = sambalm(*arguments)
        assert (code, err) == (0, "")
        return out

    arguments = ("--input", text, "--vocab-size", 384, "--output", model)
    assert "384 pieces" in succeed("data", "tokenizer", *arguments)
    assert "tokens" in succeed("data", "preprocess", "--input", text, "--tokenizer", model, "--output", prefix)

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changed(run_values, data={"train": str(prefix)})))
    train = [*PROGRAM, "train", tmp_path / "run.yaml"]
    ended = subprocess.run(train, capture_output=True, text=True, env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr
    assert "step 6/6" in ended.stderr
    assert (run_dir / "config.yaml").is_file()
    assert [folder.name for folder in checkpoint_folders(run_dir)] == ["step_00000003", "step_00000006"]

    assert "step 6, verified" in succeed("convert", "to-hf", run_dir, hf)
    other = tmp_path / "other.model"
    succeed("data", "tokenizer", "--input", text, "--vocab-size", 380, "--output", other)
    code, out, err = sambalm("convert", "to-hf", run_dir, tmp_path / "no", "--tokenizer", other)
    assert (code, out) == (2, "")
    assert f"the tokenizer {other} is not the one that made the tokens of {prefix}" in err
    assert sambalm("generate", run_dir, "--tokenizer", other, "--prompt", "x") == (2, "", err)
    again = tmp_path / "again"
    assert f"{again / 'model.yaml'} is the section model" in succeed("convert", "from-hf", hf, again)
    texts = ("--tokenizer", model, "--documents", text)
    assert "step 0, verified" in succeed("convert", "to-hf", again, tmp_path / "hf-again", *texts)
    assert (tmp_path / "hf-again" / SHARD).read_bytes() == (hf / SHARD).read_bytes()
    for wrong, sentence in (((), "no tokenizer"), (texts[:2], "--documents")):
        code, out, err = sambalm("convert", "to-hf", again, tmp_path / "no", *wrong)
        assert (code, out) == (2, "")
        assert sentence in err
    ended = program.run("train", tmp_path / "run.yaml", f"run.dir={again}", "train.steps=1", "checkpoint.every_steps=1")
    assert ended.returncode == 0, ended.stderr
    assert "step 1/1" in ended.stderr
    code, out, err = sambalm("convert", "from-hf", hf, again)
    assert (code, err) == (2, f"error: the output {again} exists: choose another run folder\n")
    out = succeed("generate", hf, "--prompt", "def main(", "--max-new-tokens", 8)
    assert out.startswith("def main(")
    assert len(out) > len("def main(\n")
    assert out == succeed("generate", hf, "--prompt", "def main(", "--max-new-tokens", 8)
    states = []
    for number, source in enumerate((hf, run_dir, checkpoint_folders(run_dir)[-1])):
        state = tmp_path / f"state{number}"
        succeed("generate", source, "--prompt", "def main(", "--max-new-tokens", 8, "--state-out", state)
        states.append(load_file(state)["extra.tail"].tolist())  # texts differ where bytes are no UTF-8
    assert states[0] == states[1] == states[2]
    first = succeed("generate", run_dir, "--step", 3, "--prompt", "def main(", "--max-new-tokens", 8)
    assert first == succeed("generate", checkpoint_folders(run_dir)[0], "--prompt", "def main(", "--max-new-tokens", 8)
    for source, says in (
        (run_dir, "no checkpoint of step 4: the steps of the run's checkpoints are 3, 6"),
        (hf, "--step is for a run, and"),
    ):
        code, out, err = sambalm("generate", source, "--step", 4, "--prompt", "x")
        assert (code, out, says in err) == (2, "", True)
    succeed("generate", run_dir, "--state-in", tmp_path / "state0", "--max-new-tokens", 2)
    code, out, err = sambalm("generate", hf, "--prompt", "")
    assert (code, out, err) == (2, "", "error: the prompt is empty: give at least one character to go on from\n")
    out = succeed("report", run_dir)
    for shown in (
        "Held-out loss after step 6",
        "Samba, 32 tokens",
        "Samba, 64 tokens",
        "unigram",
        "bigram",
        "tokens/s",
    ):
        assert shown in out
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_torchruns_own_report_of_a_refusal_ends_with_the_sentence(run_values, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_values))
    ended = subprocess.run(
        [*TORCHRUN, "train", tmp_path / "run.yaml", "parallel.tensor=5"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert ended.returncode != 0
    summary = ended.stderr.split("Root Cause")[1]
    assert "parallel.tensor is 5: " in summary


def test_torchrun_trains_on_two_ranks(run_values, tmp_path):
    values = changed(run_values, parallel={"tensor": 2, "sequence": True})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    ended = subprocess.run(
        [*TORCHRUN, "train", tmp_path / "run.yaml"], capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["loss"] < records[0]["loss"]
    assert {"validation_loss_32", "validation_loss_64"} <= set(records[-1])
    assert ended.stderr.count("step 6/6") == 1  # one rank speaks


SHARD = "model-00001-of-00001.safetensors"


class Told(Exception):
    """Ends a command at the call of what it is for, with the arguments of the call."""


DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
# What does a command's work, the command line, and what the former is told by it.
CALLS = [
    (
        "sambalm.data_pipeline.corpus.write_python_corpus",
        ["data", "python-corpus", "c.jsonl", "--seed", "5"],
        (Path("c.jsonl"),),
        {"seed": 5, "overwrite": False},
    ),
    (
        "sambalm.data_pipeline.tokenizer_training.train_tokenizer",
        [*("data", "tokenizer", "--input", "a", "--vocab-size", "300", "--output", "t.model", "b"), "--text-key", "k"],
        (["a", "b"],),
        {"vocab_size": 300, "output": Path("t.model"), "text_key": "k", "overwrite": False},
    ),
    (
        "sambalm.data_pipeline.preprocess.preprocess",
        [
            *("data", "preprocess", "--input", "a", "--tokenizer", "t", "--output", "o", "--workers", "3", "b"),
            *("--shard-tokens", "7", "--part", "2/5", "--on-error", "skip", "--text-key", "k", "--no-eos"),
            *("--text-documents", "line", "--eos-token", "E", "--special-tokens", "--overwrite"),
            *("--shuffle", "5"),
        ],
        (["a", "b"],),
        {
            "tokenizer": Path("t"),
            "output_prefix": Path("o"),
            "part": Part(2, 5),
            "overwrite": True,
            "workers": 3,
            "shard_tokens": 7,
            "text_key": "k",
            "text_documents": "line",
            "append_eos": False,
            "eos_token": "E",
            "special_tokens": True,
            "on_error": "skip",
            "chat_template": None,
            "messages_key": "messages",
            "loss": "assistant",
            "shuffle_seed": 5,
        },
    ),
    (
        "sambalm.data_pipeline.verify.verify",
        ["data", "verify", "p", "--vocab-size", "300", "--workers", "3"],
        (Path("p"),),
        {"vocab_size": 300, "workers": 3},
    ),
    (
        "sambalm.data_pipeline.blend.blend_draws",
        ["data", "blend", "a=3", "--tokens", "2e9", "--validation-fraction", "0.25"],
        (DataConfig(train=[WeightedSource(prefix="a", weight=3)], sequence_length=1, validation_fraction=0.25),),
        {"tokens": 2_000_000_000},
    ),
    (
        "sambalm.pretrain.checkpointing.to_hf.checkpoint_to_hf",
        [
            *("convert", "to-hf", "run", "out", "--precision", "bf16", "--documents", "*.jsonl"),
            *("--tokenizer", "t", "--step", "3", "--shard-size", "2GB", "--chat-template", "c"),
        ],
        (Path("run"), Path("out")),
        {
            "step": 3,
            "precision": "bf16",
            "documents": "*.jsonl",
            "tokenizer": Path("t"),
            "shard_size": "2GB",
            "chat_template": Path("c"),
            "overwrite": False,
        },
    ),
    (
        "sambalm.pretrain.checkpointing.from_hf.checkpoint_from_hf",
        ["convert", "from-hf", "w.pth", "run", "--query-heads", "6", "--window", "7"],
        (Path("w.pth"), Path("run")),
        {"query_heads": 6, "window": 7},
    ),
    (
        "sambalm.pretrain.generation.command.generate_text",
        [
            *("generate", "folder", "--prompt", "a b", "--prompt", "c", "--max-new-tokens", "3", "-n", "2"),
            *("--temperature", "0.5", "--top-k", "7", "--top-p", "0.25", "--min-p", "0.125", "--seed", "9"),
            *("--repetition-penalty", "1.5", "--stop", "x", "--stop", "y", "--ignore-eos", "--no-echo", "--json"),
            *("--state-in", "i", "--state-out", "o", "--device", "cuda:1", "--dtype", "bf16", "--tokenizer", "t"),
            *("--step", "3"),
        ],
        (
            Path("folder"),
            Request(
                ["a b", "c"],
                Sampling(0.5, top_k=7, top_p=0.25, min_p=0.125, repetition_penalty=1.5, seed=9),
                max_new_tokens=3,
                samples=2,
                stops=("x", "y"),
                ignore_eos=True,
                echo=False,
                as_json=True,
                state_in=Path("i"),
                state_out=Path("o"),
            ),
        ),
        {"device": "cuda:1", "dtype": "bf16", "tokenizer": Path("t"), "step": 3},
    ),
    (
        "sambalm.pretrain.generation.command.generate_text",
        ["generate", "folder", "--interactive"],
        (Path("folder"), Request(None, Sampling(), interactive=True)),
        {"device": None, "dtype": None, "tokenizer": None, "step": None},
    ),
    (
        "sambalm.pretrain.serving.command.serve_model",
        [
            *("serve", "folder", "--host", "h", "--port", "1", "--name", "n", "--max-batch", "2", "--max-tokens", "3"),
            *("--device", "cuda:1", "--dtype", "bf16", "--tokenizer", "t", "--step", "3"),
        ],
        (Path("folder"),),
        {
            **{"host": "h", "port": 1, "name": "n", "max_batch": 2, "max_tokens": 3},
            **{"device": "cuda:1", "dtype": "bf16", "tokenizer": Path("t"), "step": 3},
        },
    ),
    (
        "sambalm.pretrain.serving.command.serve_model",
        ["serve", "folder"],
        (Path("folder"),),
        {
            **{"host": "127.0.0.1", "port": 8000, "name": None, "max_batch": 16, "max_tokens": 4096},
            **{"device": None, "dtype": None, "tokenizer": None, "step": None},
        },
    ),
    (
        "sambalm.evaluation.command.evaluate_model",
        [
            *("evaluate", "folder", "--task", "passkey", "--task", "needles", "--data", "d", "--data", "e", "--json"),
            *("--output", "o", "--batch-tokens", "5", "--device", "cuda:1", "--dtype", "bf16", "--tokenizer", "t"),
            *("--step", "3", "needles.seed=1"),
        ],
        (Path("folder"),),
        {
            **{"tasks": ["passkey", "needles"], "overrides": ["needles.seed=1"], "data": ["d", "e"], "as_json": True},
            **{"output": Path("o"), "batch_tokens": 5, "device": "cuda:1", "dtype": "bf16", "tokenizer": Path("t")},
            **{"step": 3, "bar": ProgressBar},
        },
    ),
    (
        "sambalm.pretrain.reporting.summary.write_report",
        ["report", "a", "b", "--output", "page", "--json"],
        ([Path("a"), Path("b")],),
        {"output": Path("page"), "as_json": True},
    ),
    (
        "sambalm.pretrain.planner.search.describe_run",
        ["train", DEMO, "--dry-run", "--world-size", "4", "run.seed=5"],
        (load_config(DEMO, ["run.seed=5"]),),
        {"world_size": 4},
    ),
    (
        "sambalm.pretrain.planner.run_estimate.estimate",
        [
            *("slurm", "estimate", DEMO, "--nodes", "4", "--device", "a100", "--gpu-memory-gib", "40"),
            "run.seed=5",
        ],
        (load_config(DEMO, ["run.seed=5"]),),
        {"nodes": 4, "cluster": Cluster(hardware=DEVICES["a100"], gpu_memory_gib=40.0)},
    ),
    (
        "sambalm.pretrain.planner.search.find_plans",
        ["plan", DEMO, "--gpus", "4", "--gpu-memory-gib", "40", "--device", "a100", "--top", "3", "run.seed=5"],
        (load_config(DEMO, ["run.seed=5"]),),
        {"world_size": 4, "memory_gib": 40.0, "hardware": DEVICES["a100"], "top": 3},
    ),
    (
        "sambalm.pretrain.check_layout.check_layout",
        [
            *("check-layout", DEMO, "--world-size", "2", "--no-shrink", "--steps", "3", "--tolerance", "0.5"),
            *("--seed", "4", "--timeout-s", "60", "run.seed=5"),
        ],
        (load_config(DEMO, ["run.seed=5"]),),
        {"world_size": 2, "steps": 3, "seed": 4, "shrink": False, "tolerance": 0.5, "timeout_s": 60.0},
    ),
    (
        "sambalm.slurm.submit.training_job",
        [
            *("slurm", "submit", DEMO, "--nodes", "4", "--spares", "2", "--gpus-per-node", "6", "--script", "s"),
            "run.seed=5",
        ],
        (DEMO,),
        {"nodes": 4, "spares": 2, "gpus_per_node": 6, "script": Path("s"), "overrides": ["run.seed=5"]},
    ),
]


@pytest.mark.parametrize(("function", "words", "arguments", "named"), CALLS, ids=[call[1][0] for call in CALLS])
def test_a_command_tells_what_it_was_told(function, words, arguments, named, monkeypatch):
    def tell(*args, **kwargs):
        raise Told(args, {name: value for name, value in kwargs.items() if name not in ("progress", "write")})

    module, _, name = function.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, tell)
    error = CliRunner().invoke(cli.app, list(map(str, words))).exception
    assert isinstance(error, Told), error
    assert error.args == (arguments, named)


@pytest.mark.parametrize(
    ("words", "prompts"), [(["--lines"], ["a", "b"]), ([], ["a\nb"]), (["--state-in", "s"], None)], ids=str
)
def test_prompts_are_read_from_stdin_but_where_a_state_goes_on(words, prompts, monkeypatch):
    def tell(path, request, **named):
        raise Told(request.prompts)

    monkeypatch.setattr("sambalm.pretrain.generation.command.generate_text", tell)
    error = CliRunner().invoke(cli.app, ["generate", "folder", *words], input="a\nb\n").exception
    assert isinstance(error, Told), error
    assert error.args == (prompts,)


def test_a_bar_shows_that_a_long_prompt_is_read_and_is_gone_before_its_text(monkeypatch):
    shown = []

    class Bar(ProgressBar):
        def __enter__(self):
            shown.append("begins")
            return self

        def __exit__(self, *_):
            shown.append("ends")

        def __call__(self, done, total):
            shown.append((done, total))

    monkeypatch.setattr(generate_file, "ProgressBar", Bar)
    with generate_file._ReadingBar() as bar:
        bar(9, 9)
        assert shown == []
        bar(2, 5)
        bar(5, 5)
        assert shown == ["begins", (2, 5), (5, 5), "ends"]
        bar(2, 5)
    assert shown[4:] == ["begins", (2, 5), "ends"]


@pytest.mark.parametrize(("rank", "shown"), [(None, "error: use another\n"), ("0", "error: use another\n"), ("1", "")])
def test_an_error_is_told_once_and_to_torchrun(rank, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    cli._print_error(ValueError("use another"))
    assert capsys.readouterr().err == shown
    assert json.loads((tmp_path / "error.json").read_text())["message"] == "use another"
