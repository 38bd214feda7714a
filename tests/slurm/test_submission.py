"""What Slurm says to the shipped files on a cluster of 66 nodes of 8 GPUs, and what we say before it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sambalm.pretrain.checkpointing.format import checkpoint_folders
from sambalm.pretrain.lifecycle.attempts import read_attempts
from tests.support.slurm_client import wait_until
from tests.support.whole_runs import changed

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
PROGRAM = [sys.executable, "-m", "sambalm.pretrain.cli"]
ON_FAKE_NODES = {
    "SBATCH_PARTITION": "fake",
    "SAMBALM_CLUSTERS": str(ROOT / "configs" / "clusters"),
    "SAMBALM_CLUSTER": "generic",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_takes_a_shipped_file_as_it_is(cluster, script):
    said = cluster.run("sbatch", "--test-only", script, **ON_FAKE_NODES).stderr
    assert "to start at" in said


@pytest.mark.parametrize("name", ["infiniband", "efa"])
def test_the_largest_run_is_accepted_with_its_spares(cluster, name):
    arguments = ("configs/samba_3.8b.yaml", "--nodes", "64", "--spares", "2", "--then", "convert", "--dry-run")
    shown = cluster.run(*PROGRAM, "slurm", "submit", *arguments, **(ON_FAKE_NODES | {"SAMBALM_CLUSTER": name})).stdout
    assert "--nodes=64-66" in shown
    assert shown.count("to start at") == 2


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        (["--nodes", "64"], {"SBATCH_PARTITION": "nowhere"}, "--nodes=64 --gpus-per-node=8: invalid partition"),
        (["--nodes", "128"], {}, "--nodes=128 --gpus-per-node=8: Requested node configuration is not available"),
        (["--nodes", "32", "--gpus-per-node", "16"], {}, "--nodes=32 --gpus-per-node=16: Requested node config"),
        (["--nodes", "3"], {}, "train.global_batch_tokens is 8388608, which is not a multiple of"),
        (["--nodes", "64", "model.windw=1"], {}, "unknown key model.windw"),
        (["--nodes", "64"], {"SAMBALM_CLUSTER": "moon"}, "has no moon.env"),
        (["--nodes", "64", "--script", "none.sbatch"], {}, "none.sbatch does not exist"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(cluster, arguments, variables, says):
    command = [*PROGRAM, "slurm", "submit", "configs/samba_3.8b.yaml", *arguments]
    ended = cluster.run(*command, check=False, **(ON_FAKE_NODES | variables))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1
    assert says in ended.stderr
    assert cluster.run("squeue", "--noheader", "--partition=fake").stdout == ""


@pytest.mark.slow
def test_a_chain_of_jobs_and_a_conversion_after_it(cluster, run_values, tmp_path):
    """The first job is told to leave and ends, the second finishes the run, the third converts it."""
    values = changed(
        run_values, train={"steps": 400}, checkpoint={"every_steps": 100000}, validation={"every_steps": 200}
    )
    run_dir, config = Path(values["run"]["dir"]), tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(values))
    arguments = (config, "--nodes", "2", "--gpus-per-node", "1", "--script", ROOT / "slurm" / "samba_421m.sbatch")
    variables = {"CHECK_LINKS": "0", "SBATCH_TIMELIMIT": "60", "SBATCH_OUTPUT": f"{tmp_path}/%x-%j.log"}
    said = cluster.run(*PROGRAM, "slurm", "submit", *arguments, "--chain", "2", "--then", "convert", **variables).stdout
    first, second, convert = said.removeprefix("jobs ").partition(":")[0].split(", ")
    wait_until(lambda: (run_dir / "metrics.jsonl").exists() and "\n" in (run_dir / "metrics.jsonl").read_text(), 120)
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    assert cluster.wait_for_end(first) == "COMPLETED"
    assert cluster.wait_for_end(second) == "COMPLETED"
    assert cluster.wait_for_end(convert) == "COMPLETED", (tmp_path / f"convert-{convert}.log").read_text()
    assert cluster.field(first, "Restarts") == "0"
    assert [attempt.path.name for attempt in read_attempts(run_dir)] == [f"job{first}.0.0", f"job{second}.0.0"]
    assert checkpoint_folders(run_dir)[-1].name == "step_00000400"
    assert (run_dir / "hf" / "config.json").is_file()
    shown = cluster.run(*PROGRAM, "slurm", "status", run_dir).stdout
    lines = {line[:18].strip(): line[18:] for line in shown.partition("\n\n")[0].splitlines()}
    assert lines["state"] == "finished"
    assert (lines["attempts"], lines["step"], lines["tokens"]) == ("2", "400 of 400 (100.0%)", "102,400")
    assert lines["last error"] == "none"


@pytest.mark.slow
def test_an_array_task_that_was_killed_is_run_again_on_its_own(cluster, tokens, tmp_path):
    """Two parts; one is killed and run again; the shards equal those of parts run here."""
    text, model = tokens.with_name("text.jsonl"), tokens.with_name("tokenizer.model")
    inputs = ("--input", text, "--tokenizer", model)
    expected, prefix = tmp_path / "expected" / "text", tmp_path / "array" / "text"
    for part in ("0/2", "1/2"):
        subprocess.run(
            [*PROGRAM, "data", "preprocess", *inputs, "--output", expected, "--part", part, "--workers", "1"],
            check=True,
        )
    options = ("--parsable", "--cpus-per-task=1", "--mem=1000", f"--output={tmp_path}/%A_%a.log")
    script = ROOT / "slurm" / "preprocess.sbatch"
    array = cluster.run("sbatch", *options, "--array=0-1", script, *inputs, "--output", prefix).stdout.strip()
    wait_until(
        lambda: len(cluster.run("squeue", "--noheader", "--states=R", "--jobs", array).stdout.splitlines()) == 2, 60
    )
    cluster.run("scancel", "--signal=KILL", "--full", f"{array}_1")
    wait_until(lambda: not cluster.run("squeue", "--noheader", "--jobs", array).stdout, 120)
    assert not (tmp_path / "array" / "text_00001_00000.idx").exists()
    again = cluster.run("sbatch", *options, "--array=1", script, *inputs, "--output", prefix, PARTS="2").stdout.strip()
    wait_until(lambda: not cluster.run("squeue", "--noheader", "--jobs", again).stdout, 120)
    shards = sorted(path.name for path in expected.parent.glob("text_*"))
    assert len(shards) == 4
    assert [(prefix.parent / name).read_bytes() for name in shards] == [
        (expected.parent / name).read_bytes() for name in shards
    ]
