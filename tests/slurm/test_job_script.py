"""What a job decides, by slurm/common.sh with Slurm's commands played: attempts, requeues, exit codes and nodes."""

import re

import pytest

from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.lifecycle.attempts import write_outcome
from sambalm.slurm.outcome import describe_outcome
from tests.support.fake_slurm import ROOT, run_job

REQUEUED = "scontrol requeue 1001"


def test_a_run_that_finishes_ends_its_job(tmp_path):
    job = run_job(tmp_path, ["00000005 0 done"], "train.steps=5")
    assert (job.exit_code, job.attempts, job.of("scontrol")) == (0, 1, [])
    (train,) = [call for call in job.of("python") if "pretrain.cli train" in call]
    attempt = tmp_path / "run" / "attempts" / "job1001.0.0"
    assert train.startswith(f"python -m sambalm.slurm.agent {attempt} ")
    assert train.endswith(" 8 sambalm.pretrain.cli train configs/samba_421m.yaml train.steps=5")
    (prepare,) = [call for call in job.of("python") if "sambalm.slurm.prepare" in call]
    assert prepare == "python -W ignore -m sambalm.slurm.prepare 8 configs/samba_421m.yaml train.steps=5"
    assert "training on n1; logs:" in job.log


def test_a_config_that_cannot_run_ends_the_job_with_its_exit_code(tmp_path):
    job = run_job(tmp_path, [], prepare=2)
    assert (job.exit_code, job.attempts, job.of("srun"), job.of("scontrol")) == (2, 0, [], [])


@pytest.mark.parametrize("code", [2, 76, 79])
def test_what_needs_somebody_to_look_at_it_is_not_started_again(code, tmp_path):
    job = run_job(tmp_path, [f"- {code} a reason, in words"], real_python=code == 79)
    assert (job.exit_code, job.attempts, job.of("scontrol")) == (code, 1, [])
    assert re.search(r"not started again: a reason, in words; logs: \S+/attempts/job[0-9.]+/NODE\.log\n", job.log)


@pytest.mark.parametrize("crash", ["- crash", "- 74 no space"])
@pytest.mark.parametrize("limit", [1, 3])
def test_crashes_without_a_checkpoint_end_the_job_after_one_more_than_the_limit(limit, crash, tmp_path):
    job = run_job(tmp_path, [crash] * 9, limit=limit)
    assert (job.exit_code, job.attempts, job.of("scontrol")) == (ExitCode.NO_PROGRESS, limit + 1, [])
    assert f"not started again: {limit + 1} crashes without a new checkpoint" in job.log


def test_a_new_checkpoint_starts_the_count_of_crashes_again(tmp_path):
    plan = ["- crash", "00000010 crash", "- crash", "00000020 crash", "- crash", "- crash", "- 0"]
    job = run_job(tmp_path, plan, limit=2)
    assert (job.exit_code, job.attempts) == (ExitCode.NO_PROGRESS, 6)


def test_a_checkpoint_of_an_earlier_job_is_no_progress_of_this_one(tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_00000010").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / ".step_00000011.partial").mkdir()
    job = run_job(tmp_path, ["- crash"] * 9, limit=2)
    assert (job.exit_code, job.attempts) == (ExitCode.NO_PROGRESS, 3)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (None, "retry"),
        (0, "finish 0"),
        (75, "requeue 75"),
        (74, "retry 74"),
        (81, "retry 81"),
        (83, "retry 83"),
        *((code, f"end {code}") for code in (1, 2, 76, 77, 78, 79, 80, 82, 130)),
    ],
)
def test_an_outcome_says_what_a_job_does_next(code, expected, tmp_path):
    if code is not None:
        write_outcome(tmp_path, exit_code=code, step=3, reason="of two\n lines")
        expected += " of two lines"
    assert describe_outcome(tmp_path) == expected


def test_every_attempt_has_a_folder_and_every_step_a_port_of_its_own(tmp_path):
    job = run_job(tmp_path, ["- crash", "- crash", "- 0"], CHECK_LINKS="1", SLURM_RESTART_COUNT="4")
    assert job.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "run" / "attempts").iterdir()) == [
        "job1001.4.0",
        "job1001.4.1",
        "job1001.4.2",
    ]
    ports = [int(call.split()[4]) for call in job.of("python -m sambalm.slurm.agent")]
    first = 20000 + 1001 * 16 % 20000
    assert ports == list(range(first, first + 6))  # an all-reduce and a training each


def test_ranks_are_started_with_what_ends_a_step_as_a_whole(tmp_path):
    job = run_job(tmp_path, ["- 0"], nodes="n1 mixed\nn2 mixed", SAMBALM_NODES="2", CHECK_LINKS="0")
    health, train = job.of("srun")
    for call in (health, train):
        for option in ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n1,n2", "--kill-on-bad-exit=1"):
            assert f" {option} " in call
        assert " --wait=60 " in call
        assert " --overlap " in call
        assert " --open-mode=append " in call
    folder = tmp_path / "run" / "attempts" / "job1001.0.0"
    assert f" --output={folder}/health.log " in health
    assert f" --output={folder}/%N.log " in train


@pytest.mark.parametrize(("maximum", "restarts", "requeues"), [(0, 0, 0), (1, 0, 1), (1, 1, 0), (3, 2, 1), (3, 3, 0)])
def test_a_job_that_is_told_to_leave_is_requeued_so_many_times(maximum, restarts, requeues, tmp_path):
    variables = {"MAX_RESTARTS": str(maximum), "SLURM_RESTART_COUNT": str(restarts)}
    job = run_job(tmp_path, ["00000003 told asked to leave"], **variables)
    assert job.of("scontrol requeue") == [REQUEUED] * requeues
    assert job.exit_code == (0 if requeues else ExitCode.REQUEUE)
    assert job.of("scancel") == ["scancel --quiet --signal=TERM 1001"]  # what the ranks get
    assert job.attempts == 1
    if not requeues:
        assert f"not requeued: MAX_RESTARTS={maximum} is reached" in job.log


def test_a_crash_of_a_job_that_is_to_leave_is_requeued_too(tmp_path):
    job = run_job(tmp_path, ["- told-crash", "- 0"], limit=0)
    assert (job.exit_code, job.attempts, job.of("scontrol")) == (0, 1, [REQUEUED])
    assert "told to leave; requeueing" in job.log


@pytest.mark.parametrize("links", [0, 1])
def test_a_job_that_is_told_to_leave_while_nodes_are_checked_starts_no_ranks(links, tmp_path):
    job = run_job(tmp_path, ["- 0"], is_told_early=True, links=links)
    assert (job.exit_code, job.attempts, job.of("scontrol")) == (0, 0, [REQUEUED])
    assert "told to leave; requeueing" in job.log


def test_a_job_that_slurm_is_ending_is_left_to_slurm(tmp_path):
    job = run_job(tmp_path, ["- 75 asked to leave"], state="COMPLETING")
    assert (job.exit_code, job.of("scontrol")) == (ExitCode.REQUEUE, [])
    assert "asked to leave; Slurm is ending this job (COMPLETING)" in job.log


def test_a_job_with_a_successor_leaves_the_rest_to_it(tmp_path):
    job = run_job(tmp_path, ["- 75 asked to leave"], SAMBALM_SUCCESSOR="1")
    assert (job.exit_code, job.of("scontrol")) == (0, [])
    assert "asked to leave; the next job of the chain goes on" in job.log


def test_a_cluster_without_requeues_is_told_of(tmp_path):
    job = run_job(tmp_path, ["- 75 asked to leave"], requeue=1)
    assert (job.exit_code, job.of("scontrol")) == (ExitCode.REQUEUE, [REQUEUED])
    assert "submit it again to go on" in job.log


def test_a_bad_node_is_left_out_and_a_spare_taken(tmp_path):
    nodes = "n1 mixed\nn2 mixed\nn3 mixed\nn4 mixed"
    job = run_job(tmp_path, ["- 0"], nodes=nodes, good="n1 n3 n4", real_python=True, SAMBALM_NODES="2")
    assert job.exit_code == 0
    health, links, train = job.of("srun")
    assert " --nodelist=n1,n2,n3,n4 " in health
    assert " --nodelist=n1,n3,n4 " in links  # with the spare: a link of its may be needed
    assert " --nodelist=n1,n3 " in train
    assert "training on n1,n3;" in job.log


def test_nodes_that_are_not_up_are_not_asked(tmp_path):
    states = ["down", "down*", "drained", "draining", "fail", "failing", "mixed*", "idle*", "unknown", "reboot"]
    bad = [f"bad{number} {state}" for number, state in enumerate(states)]
    job = run_job(tmp_path, ["- 0"], nodes="\n".join([*bad, "n2 mixed", "n2 mixed", "n3 allocated"]), SAMBALM_NODES="2")
    assert job.exit_code == 0
    assert all(" --nodelist=n2,n3 " in call for call in job.of("srun"))


def test_too_few_good_nodes_requeue_the_job_elsewhere(tmp_path):
    job = run_job(tmp_path, [], nodes="n1 mixed\nn2 mixed\nn3 mixed", good="n1", real_python=True, SAMBALM_NODES="2")
    assert (job.exit_code, job.attempts) == (0, 0)
    assert job.of("scontrol requeue") == [REQUEUED]
    assert job.of("scontrol update") == ["scontrol update JobId=1001 ExcNodeList=n2,n3"]
    assert "too few nodes are fit to train; requeueing" in job.log
    assert "node n2 is left out: no answer\n" in job.log
    assert len(job.of("srun")) == 1  # too few to check links between them


def test_nodes_that_the_job_is_to_do_without_already_stay_so(tmp_path):
    nodes = "n1 mixed\nn2 mixed\nn3 mixed"
    job = run_job(tmp_path, [], nodes=nodes, good="n1 n3", real_python=True, SAMBALM_NODES="3", excluded="n6,n5")
    assert job.of("scontrol update") == ["scontrol update JobId=1001 ExcNodeList=n2,n6,n5"]


@pytest.mark.parametrize(("partition", "spared"), [("n1 n2 n3 n4 n5", True), ("n1 n2 n3 n4 n4", False)])
def test_a_job_is_not_kept_from_nodes_without_which_it_could_never_start(partition, spared, tmp_path):
    """n1, which is bad, and n2, by the hand of whoever submitted the job, of which three nodes are needed."""
    nodes = "n1 mixed\nn3 mixed\nn4 mixed"
    job = run_job(
        tmp_path, [], nodes=nodes, good="n3 n4", real_python=True, partition=partition, excluded="n2", SAMBALM_NODES="3"
    )
    assert (job.exit_code, job.of("scontrol requeue")) == (0, [REQUEUED])
    assert len(job.of("scontrol update")) == spared
    assert ("n1 may be given to this job again: partition batch has too few others" in job.log) is not spared


def test_a_cluster_is_found_here_or_among_the_shipped_and_what_it_leaves_out_is_generic(tmp_path):
    where = {"SLURM_SUBMIT_DIR": str(tmp_path), "SAMBALM_CONFIG": "some.yaml"}
    job = run_job(tmp_path, ["- 0"], SAMBALM_CLUSTER="efa", **where)
    assert (job.exit_code, job.attempts) == (0, 1)
    (tmp_path / "configs" / "clusters").mkdir(parents=True)
    (tmp_path / "configs" / "clusters" / "mine.env").write_text("RANKS_PER_NODE=3\n")
    variables = {"SAMBALM_CLUSTER": "mine", "SLURM_RESTART_COUNT": "50"}
    job = run_job(tmp_path, ["- 75 asked to leave"], **where, **variables)
    assert "MAX_RESTARTS=50 is reached" in job.log
    (prepare,) = [call for call in job.of("python") if "sambalm.slurm.prepare" in call]
    assert prepare.endswith(" 3 some.yaml")
    job = run_job(tmp_path, [], SAMBALM_CLUSTER="moon", **where)
    assert (job.exit_code, job.calls) == (2, [])
    assert job.log.endswith("configs/clusters has no moon.env, which SAMBALM_CLUSTER names\n")


def test_any_config_runs_by_the_file_that_names_none(tmp_path):
    job = run_job(tmp_path, ["- 0"], script="train.sbatch", SAMBALM_CONFIG="some.yaml", SLURM_NNODES="1")
    (prepare,) = [call for call in job.of("python") if "sambalm.slurm.prepare" in call]
    assert (job.exit_code, prepare.split()[-2:]) == (0, ["8", "some.yaml"])
    job = run_job(tmp_path, [], script="train.sbatch", SLURM_NNODES="1")
    assert (job.exit_code, job.calls) == (1, [])
    assert "SAMBALM_CONFIG: names no config" in job.log


@pytest.mark.parametrize(("check", "trains"), [("1", False), ("0", True)])
def test_nodes_that_cannot_reach_each_other_requeue_the_job(check, trains, tmp_path):
    job = run_job(tmp_path, ["- 0"], links=1, CHECK_LINKS=check)
    assert job.attempts == trains
    assert job.of("scontrol") == ([] if trains else [REQUEUED])
    assert ("the nodes did not come together for an all-reduce" in job.log) is not trains


SHIPPED = [*sorted((ROOT / "slurm").glob("samba_*.sbatch")), ROOT / "slurm" / "train.sbatch"]


def options(script):
    """#SBATCH lines by option."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script.read_text(), re.MULTILINE)
    return dict(lines)


@pytest.mark.parametrize("script", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_ask_for_what_the_job_script_needs(script):
    found, name = options(script), script.stem
    nodes = found.pop("nodes")
    assert found.pop("time") in ("1-00:00:00", "2-00:00:00")
    assert (
        found
        == {  # and no ntasks-per-node, with which Slurm counts the tasks of the fewest nodes and gives no spare
            "job-name": name,
            "gpus-per-node": "8",
            "exclusive": "",
            "mem": "0",
            "signal": "B:USR1@600",  # docs/operations.md says so, and the margin that it gives
            "requeue": "",
            "no-kill": "",
            "open-mode": "append",
            "output": "%x-%j.log",
        }
    )
    if name == "train":
        return
    text = script.read_text()
    assert f'"${{SAMBALM_CONFIG:-configs/{name}.yaml}}" "${{SAMBALM_NODES:-{nodes.partition("-")[0]}}}" "$@"' in text
