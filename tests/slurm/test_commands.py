"""`sambalm slurm submit` and `status`, what a job asks before it starts, and the single-task files, without Slurm."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from sambalm.data_pipeline.sources import open_sources
from sambalm.pretrain.cli import app as cli
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.data_parts import data_warning
from sambalm.pretrain.errors import ConfigError, ExitCode, NoRunError
from sambalm.pretrain.lifecycle.attempts import write_outcome, write_snapshot
from sambalm.pretrain.reporting.status import show_status
from sambalm.slurm import health, prepare
from sambalm.slurm.errors import SlurmError
from sambalm.slurm.status import slurm_status
from sambalm.slurm.submission import Submission, read_submission, write_submission
from sambalm.slurm.submit import SCRIPTS, Job, convert_job, submit_all, training_job
from tests.support.whole_runs import changed

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "samba_421m.yaml"  # 128 samples of 4096 tokens a step


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program that writes its arguments and some variables to a file on the path."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()

    def put(name, body, variables=""):
        path, calls = tmp_path / "bin" / name, tmp_path / f"{name}.calls"
        path.write_text(f'#!/bin/sh\necho "{variables}$@" >>{calls}\n{body}\n')
        path.chmod(0o755)
        return lambda: calls.read_text().splitlines()

    return put


def test_status_asks_slurm_for_the_jobs_state(tmp_path, program, monkeypatch):
    calls = program("squeue", "echo 7 PENDING BeginTime")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    attempt = tmp_path / "run" / "attempts" / "first"
    write_snapshot(attempt, config_yaml="train: {steps: 10}", world_size=1, start_step=150)
    assert slurm_status(tmp_path / "run").shown_state() == "killed (Slurm job 7 PENDING, BeginTime)"
    assert calls() == ["--noheader --states=all --jobs=7 --sort=i --format=%i %T %r"]
    write_outcome(attempt, exit_code=ExitCode.REQUEUE, step=150, reason="why")
    assert slurm_status(tmp_path / "run").shown_state() == "left (why; Slurm job 7 PENDING, BeginTime)"
    (attempt / "outcome.json").unlink()
    write_outcome(attempt, exit_code=ExitCode.FINISHED, step=10, reason="why")
    asked = len(calls())
    assert slurm_status(tmp_path / "run").shown_state() == "finished"
    assert len(calls()) == asked  # of whose job Slurm has nothing to say


def test_a_run_that_was_submitted_and_has_not_started_has_a_status(tmp_path, program):
    run_dir = tmp_path / "runs" / "x"
    with pytest.raises(NoRunError, match="is not a run that has started"):
        slurm_status(run_dir)
    write_submission(run_dir, Submission(jobs=["7", "8"], steps=30))
    calls = program("squeue", "printf '7 RUNNING None\\n8 PENDING Dependency\\n'")
    status = slurm_status(run_dir)
    assert status.shown_state() == "submitted (Slurm job 7 RUNNING; Slurm job 8 PENDING, Dependency)"
    assert "step              0 of 30 (0.0%)\n" in show_status(status)
    assert json.loads(status.as_json())["attempts"] == []
    assert status.last_error is None
    attempt = run_dir / "attempts" / "job7.0.0"
    attempt.mkdir(parents=True)
    write_outcome(attempt, exit_code=ExitCode.BAD_INPUT, step=None, reason="a rank on n1 ended with exit code 2")
    assert slurm_status(run_dir).last_error == f"a rank on n1 ended with exit code 2: see {attempt}"
    earlier = run_dir / "attempts" / "job7.0.1"  # by its time, whatever its name is
    earlier.mkdir()
    write_outcome(earlier, exit_code=ExitCode.BAD_INPUT, step=None, reason="another reason")
    os.utime(earlier / "outcome.json", (1000, 1000))
    assert slurm_status(run_dir).last_error == f"a rank on n1 ended with exit code 2: see {attempt}"
    assert " --jobs=7,8 " in calls()[0]
    program("squeue", "exit 1")  # it knows them no more
    assert slurm_status(run_dir).shown_state() == "submitted"
    (run_dir / "submitted.json").write_text('{"jobs": ')
    with pytest.raises(NoRunError):
        slurm_status(run_dir)


@pytest.fixture
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("SAMBALM_CLUSTER", "SAMBALM_CLUSTERS"):
        monkeypatch.delenv(name, raising=False)


def test_a_submitted_job_is_the_shipped_file_with_its_options(in_the_repository, monkeypatch):
    monkeypatch.delenv("SAMBALM_PYTHON", raising=False)
    job, config = training_job(CONFIG, nodes=2, spares=1, overrides=["train.steps=5"])
    assert (config.run.dir, config.train.steps) == ("runs/samba_421m", 5)
    assert job.command() == [
        "sbatch",
        "--job-name=samba_421m",
        "--nodes=2-3",
        "--gpus-per-node=8",
        str(SCRIPTS / "samba_421m.sbatch"),
        "train.steps=5",
    ]
    assert job.variables == {
        "SAMBALM_SLURM": str(SCRIPTS),
        "SAMBALM_PYTHON": sys.executable,
        "SAMBALM_CONFIG": str(CONFIG),
        "SAMBALM_NODES": "2",
        "RANKS_PER_NODE": "8",
    }
    monkeypatch.setenv("SAMBALM_PYTHON", "/in/a/container")
    alone, _ = training_job(CONFIG, nodes=1, gpus_per_node=4)
    assert alone.variables["SAMBALM_PYTHON"] == "/in/a/container"
    assert alone.options[1:] == ["--nodes=1", "--gpus-per-node=4"]
    named, _ = training_job(Path("samba_3.8b"), nodes=64)  # as the package brings it
    assert (named.script, named.options[0]) == (SCRIPTS / "samba_3.8b.sbatch", "--job-name=samba_3.8b")
    assert convert_job("runs/x").command() == ["sbatch", str(SCRIPTS / "convert.sbatch"), "runs/x"]


def test_data_that_are_missing_or_unread_are_told_before_gpus_wait_for_them(run_values, tmp_path):
    config = parse_config(changed(run_values, data={"cache_dir": str(tmp_path)}), source="test")
    assert "have no index yet" in str(data_warning(config))
    open_sources(config.data)
    assert data_warning(config) is None
    missing = changed(run_values, data={"train": [*config.data.prefixes, "no/data"], "validation": None})
    assert str(data_warning(parse_config(missing, source="test"))).startswith("no data under the prefix no/data: ")


def test_a_job_that_could_not_start_is_refused(in_the_repository, monkeypatch):
    with pytest.raises(ConfigError, match="is not a multiple of"):
        training_job(CONFIG, nodes=3)  # 24 GPUs, of which 128 samples are no multiple
    with pytest.raises(ConfigError, match="is not a multiple of"):
        training_job(CONFIG, nodes=1, gpus_per_node=3)
    with pytest.raises(SlurmError, match=r"none\.sbatch does not exist.*/train\.sbatch runs any config"):
        training_job(CONFIG, nodes=1, script=Path("none.sbatch"))
    monkeypatch.setenv("SAMBALM_CLUSTER", "moon")
    with pytest.raises(SlurmError, match=r"configs/clusters here has no moon\.env.* \(efa, generic, infiniband\)$"):
        convert_job("runs/x")
    monkeypatch.setenv("SAMBALM_CLUSTERS", "elsewhere")
    with pytest.raises(SlurmError, match=r"^elsewhere has no moon\.env.* unset SAMBALM_CLUSTERS$"):
        convert_job("runs/x")


def test_clusters_are_found_from_any_folder(tmp_path, monkeypatch):
    for name in ("SAMBALM_CLUSTER", "SAMBALM_CLUSTERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    job, _ = training_job(Path("samba_421m"), nodes=1)
    assert job.variables["SAMBALM_CONFIG"] == "samba_421m"
    (tmp_path / "other.yaml").write_text(CONFIG.read_text())
    other, _ = training_job(Path("other.yaml"), nodes=1)
    assert (other.script, other.options[0]) == (SCRIPTS / "train.sbatch", "--job-name=other")
    monkeypatch.setenv("SAMBALM_CLUSTER", "mine")
    with pytest.raises(SlurmError, match=r"has no mine\.env"):
        convert_job("runs/x")
    (tmp_path / "configs" / "clusters").mkdir(parents=True)
    (tmp_path / "configs" / "clusters" / "mine.env").touch()
    convert_job("runs/x")
    monkeypatch.setenv("SAMBALM_CLUSTER", "efa")  # is not among those of this folder
    convert_job("runs/x")


SBATCH = """\
case "$*" in
    *--test-only*) echo "sbatch: Job 9 to start at noon" >&2 ;;
    *) echo "$(cat {calls} | grep -vc test-only);cluster" ;;
esac"""


def test_a_chain_starts_each_job_after_the_one_before(program, tmp_path):
    calls = program("sbatch", SBATCH.format(calls=tmp_path / "sbatch.calls"), "$SAMBALM_SUCCESSOR/$X ")
    train = Job(Path("train.sbatch"), ["--nodes=1"], ["a=b"], {"X": "x"})
    convert = Job(Path("convert.sbatch"), [], ["runs/x"])
    assert train.test() == "sbatch: Job 9 to start at noon"
    assert submit_all(train, chain=3, after=[convert]) == ["1", "2", "3", "4"]
    after = "--dependency=afterok:{} --kill-on-invalid-dep=yes".format
    assert calls()[1:] == [
        "/x --nodes=1 --test-only train.sbatch a=b",  # all are tested before any is submitted
        "/ --test-only convert.sbatch runs/x",
        "1/x --nodes=1 --parsable train.sbatch a=b",
        f"1/x --nodes=1 --parsable {after(1)} train.sbatch a=b",
        f"/x --nodes=1 --parsable {after(2)} train.sbatch a=b",  # the last of the chain has no successor
        f"/ --parsable {after(3)} convert.sbatch runs/x",
    ]


@pytest.mark.parametrize(
    ("words", "jobs", "of_run"), [(["--chain", "2", "--then", "convert"], 3, ["1", "2"]), ([], 1, ["1"])]
)
def test_the_jobs_of_a_run_are_noted_in_its_folder(words, jobs, of_run, program, tmp_path, in_the_repository):
    program("sbatch", SBATCH.format(calls=tmp_path / "sbatch.calls"))
    run_dir = tmp_path / "run"
    command = ["slurm", "submit", str(CONFIG), "--nodes", "2", *words, f"run.dir={run_dir}", "train.steps=30"]
    ended = CliRunner().invoke(cli.app, command)
    assert ended.exit_code == 0, ended.output
    numbers = ", ".join(map(str, range(1, jobs + 1)))
    assert f"{numbers}: watch with `sambalm slurm status {run_dir}`" in ended.stdout
    assert read_submission(run_dir) == Submission(jobs=of_run, steps=30)


def test_what_slurm_refuses_is_one_sentence(program, monkeypatch, tmp_path):
    program("sbatch", 'printf "sbatch: error: allocation failure: Invalid partition\\nsbatch: error: b\\n" >&2; exit 1')
    with pytest.raises(SlurmError) as refused:
        Job(Path("train.sbatch"), ["--nodes=2"]).submit()
    assert str(refused.value) == "Slurm refuses train.sbatch --nodes=2: Invalid partition; b"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="sbatch is not installed here"):
        Job(Path("train.sbatch"), []).test()


def test_a_shown_command_can_be_pasted():
    job = Job(Path("a b.sbatch"), ["--nodes=1"], ["x=[1, 2]"], {"A": "b c"})
    assert job.shown() == "A='b c' sbatch --nodes=1 'a b.sbatch' 'x=[1, 2]'"


def test_a_job_learns_its_limits_and_its_folder(monkeypatch, capsys):
    overrides = ["run.max_attempts_without_progress=4", "run.dir=runs/of mine"]
    monkeypatch.setattr(sys, "argv", ["prepare", "8", str(CONFIG), *overrides])
    prepare.main()
    assert capsys.readouterr().out == "75 76 4 runs/of mine\n"
    monkeypatch.setattr(sys, "argv", ["prepare", "24", str(CONFIG)])
    with pytest.raises(SystemExit) as ended:
        prepare.main()
    assert ended.value.code == ExitCode.BAD_INPUT
    assert capsys.readouterr().err.startswith("error: train.global_batch_tokens is ")


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "expected"),
    [
        ("preprocess.sbatch", ["--input", "a b"], {}, "data preprocess --input a b --workers 16 --part 3/8"),
        ("preprocess.sbatch", [], {"PARTS": "64"}, "data preprocess --workers 16 --part 3/64"),
        ("convert.sbatch", ["runs/x", "--precision", "fp32"], {}, "convert to-hf runs/x runs/x/hf --overwrite"),
    ],
)
def test_single_tasks_run_the_command_line(script, arguments, variables, expected, program, tmp_path):
    calls = program("srun", ":")
    environment = os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "16"} | variables
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MAX": "7"}
    subprocess.run(["bash", ROOT / "slurm" / script, *arguments], env=environment | array, check=True)
    (call,) = calls()
    assert call.startswith(f"--ntasks=1 --export=ALL {tmp_path}/.venv/bin/python -m sambalm.pretrain.cli {expected}")
    assert call.endswith("--precision fp32") == (script == "convert.sbatch")


def test_a_folder_without_a_run_is_not_converted(tmp_path):
    environment = os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    ended = subprocess.run(["bash", ROOT / "slurm" / "convert.sbatch"], env=environment, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "RUN_DIR is missing" in ended.stderr


@pytest.mark.parametrize(
    ("minimum_gib", "full", "problem"),
    [
        ("9", "", None),
        ("11", "run", "run has 10.0 GiB free, of MIN_DISK_FREE_GIB=11"),
        ("11", "tmp", "tmp has 10.0 GiB free, of MIN_DISK_FREE_GIB=11"),
    ],
)
def test_a_node_with_too_small_a_disk_is_bad(minimum_gib, full, problem, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("MIN_DISK_FREE_GIB", minimum_gib)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    free_gib = {"run": 12, "tmp": 12} | ({full: 10} if full else {})
    monkeypatch.setattr(health.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free_gib[folder.name] * 2**30))
    found = health.check_node(tmp_path / "run")
    assert found is None if problem is None else problem in found
    assert not list((tmp_path / "run").iterdir())  # no probe stays


@pytest.mark.parametrize(
    ("devices", "free_gib", "limit", "problem"),
    [
        (2, [70.0, 70.0], "70", None),
        (3, [70.0, 70.0, 1.0], "70", None),  # only those of the ranks count
        (1, [80.0], "70", "1 GPUs are visible, of RANKS_PER_NODE=2"),
        (2, [80.0, 69.0], "70", "GPU 1 has 69.0 GiB free, of MIN_GPU_FREE_GIB=70"),
        (2, [72.5, 72.5], "", None),
        (2, [80.0, 71.0], "", "GPU 1 has 71.0 GiB free, less than nine tenths of its 80.0"),
    ],
)
def test_gpus_are_counted_and_their_memory_is_free(devices, free_gib, limit, problem, monkeypatch):
    import torch

    monkeypatch.setenv("RANKS_PER_NODE", "2")
    monkeypatch.setenv("MIN_GPU_FREE_GIB", limit)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib[device] * 2**30), 80 * 2**30))
    assert health._check_gpus() == problem


@pytest.mark.parametrize(
    ("within", "between", "problem"),
    [
        (200.0, [100.0, 100.0], None),
        (200.0, [10.0, 100.0], None),  # the neighbour may be the bad one
        (200.0, [None, 100.0], None),
        (200.0, [10.0, 20.0], "an all-reduce reached 20.00 GB/s, of MIN_PAIR_GB_PER_S=80"),
        (100.0, [100.0, 100.0], "an all-reduce reached 100.00 GB/s, of MIN_NODE_GB_PER_S=150"),
        (None, [None, None], None),  # of a single rank
    ],
)
def test_a_node_is_as_good_as_its_better_link(within, between, problem, monkeypatch, tmp_path):
    import torch.distributed as dist

    found, asked = iter([within, *between]), []
    monkeypatch.setattr(health, "_bandwidths", lambda groups, *_: asked.append(groups) or {1: next(found)})
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *_, **__: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 6)
    ranks = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "SLURMD_NODENAME": "n1"}
    for name, value in (ranks | {"MIN_NODE_GB_PER_S": "150", "MIN_PAIR_GB_PER_S": "80"}).items():
        monkeypatch.setenv(name, value)
    health.check_links(tmp_path)
    answer = json.loads((tmp_path / "n1.json").read_text())
    assert answer == {"problem": problem, "node_gb_per_s": within, "pair_gb_per_s": between}
    assert asked == [[[0], [1], [2]], [[0, 1]], [[1, 2]]]


def test_bandwidth_is_what_a_ring_sends_from_each_rank(monkeypatch):
    """Four ranks send 2 x 3/4 of the tensor each."""
    import torch
    import torch.distributed as dist

    made, clock = [], iter([100.0, 110.0])
    monkeypatch.setattr(dist, "new_group", lambda ranks: made.append(ranks) or ranks)
    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: None)
    monkeypatch.setattr(health.time, "perf_counter", lambda: next(clock))
    tensor = torch.ones(1_000_000)
    found = health._bandwidths([[0, 1], [2, 3]], tensor, 2)
    assert made == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found == pytest.approx({node: 2 * 3 / 4 * 4e6 / 2.0 / 1e9 for node in (2, 3)})  # 5 rounds in 10 s
    assert health._bandwidths([[0], [2]], torch.ones(8), 1) == {}  # a node that has no part


@pytest.mark.parametrize(
    ("nodes", "rounds"),
    [
        (2, [[[0, 1]], [[1, 0]]]),
        (3, [[[0, 1]], [[1, 2]]]),
        (4, [[[0, 1], [2, 3]], [[1, 2], [3, 0]]]),
        (5, [[[0, 1], [2, 3]], [[1, 2], [3, 4]]]),
    ],
)
def test_pairs_of_two_rounds_leave_no_node_out(nodes, rounds):
    assert [health._pairs(nodes, first) for first in (0, 1)] == rounds
    assert {node for pairs in rounds for pair in pairs for node in pair} == set(range(nodes))
