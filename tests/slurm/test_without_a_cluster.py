"""What the launchers decide: health, torchrun's arguments, the state of a run, and a long run on paper."""

import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sambalm.parallel.config import layout_name
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.errors import EXIT_CODES, ConfigError, ExitCode
from sambalm.pretrain.lifecycle.attempts import write_outcome
from sambalm.pretrain.planner import run_estimate
from sambalm.pretrain.planner.hardware import H100
from sambalm.pretrain.planner.run_estimate import HOUR_S, Cluster, Estimate, estimate
from sambalm.pretrain.planner.search import DAY_S, find_plans
from sambalm.slurm.agent import torchrun_arguments
from sambalm.slurm.errors import SlurmError
from sambalm.slurm.health import find_problems, pick
from sambalm.slurm.outcome import describe_outcome
from sambalm.slurm.submit import check_time_limit
from tests.support import program

CONFIGS, LAUNCHERS = (Path(__file__).parents[2] / folder for folder in ("configs", "slurm"))


def test_torchrun_meets_at_the_first_node_of_the_step():
    environment = {"SLURMD_NODENAME": "n2", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3"}
    arguments = torchrun_arguments(environment, port="29500", ranks_per_node="8", head="n1", restarts="1")
    assert "--rdzv-endpoint=n1:29500" in arguments
    assert "--nnodes=2" in arguments
    assert any(argument.startswith("--rdzv-conf=is_host=0") for argument in arguments)


@pytest.mark.parametrize("size", ["421m", "1.3b", "1.7b", "3.8b"])
def test_launchers_say_how_long_their_run_takes_by_plan(size):
    script = (LAUNCHERS / f"samba_{size}.sbatch").read_text()
    nodes = int(re.search(r"^#SBATCH --nodes=(\d+)", script, re.MULTILINE)[1])
    said = re.search(r"^# Takes   ([\d.]+) (hours|days) by plan", script, re.MULTILINE)
    (planned,) = estimate(load_config(CONFIGS / f"samba_{size}.yaml"), nodes=nodes, cluster=Cluster())
    unit_s = {"hours": HOUR_S, "days": DAY_S}[said[2]]
    assert said[1] == f"{planned.training_s / planned.goodput / unit_s:.1f}"


@pytest.mark.parametrize(
    ("limit", "is_refused"),
    [
        ("10", True),
        ("10:00", True),
        ("10:01", False),
        ("11", False),
        ("0:10:00", True),
        ("0:10:01", False),
        ("1:00:00", False),
        ("0-0:10", True),
        ("0-0:9:59", True),
        ("0-1", False),
        ("1-0", False),
        ("0", False),
        ("UNLIMITED", False),
        ("soon", False),
        (None, False),
    ],
)
def test_a_job_that_would_be_told_to_leave_at_once_is_refused(limit, is_refused, tmp_path):
    script = LAUNCHERS / "train.sbatch"
    says = f"is {limit}, and train.sbatch has its job save and leave 600 s before the end: give more than 10 minutes"
    with pytest.raises(SlurmError, match=re.escape(says)) if is_refused else nullcontext():
        check_time_limit(limit, script=script)
    own = tmp_path / "own.sbatch"
    for signal in ("", "#SBATCH --signal=USR1@30\n"):
        own.write_text(f"#!/bin/bash\n{signal}true\n")
        check_time_limit(limit, script=own)


@pytest.mark.parametrize("option", ["--time=", "--time ", "-t ", "-t"])
def test_a_script_s_own_time_limit_counts_where_no_other_is_set(option, tmp_path):
    own = tmp_path / "own.sbatch"
    own.write_text(f"#!/bin/bash\n#SBATCH {option}10:00\n#SBATCH --signal=B:USR1@600\ntrue\n")
    with pytest.raises(
        SlurmError, match=r"^--time of own\.sbatch is 10:00, and own\.sbatch has its job save and leave"
    ):
        check_time_limit(None, script=own)
    check_time_limit("20", script=own)
    own.write_text(own.read_text().replace("10:00", "10:01"))
    check_time_limit(None, script=own)


def test_a_layout_is_searched_for_each_kind_of_step_alone(monkeypatch):
    """Phases of other data and lengths of a run have the same steps; other lengths, or other micro-batches, do not."""
    searched, made = [], make_dataclass("MadePlan", ["config"])

    def search(phase, schedule, **_):
        searched.append((phase.length, phase.config.train.micro_batch_size))
        return made(phase.config)

    monkeypatch.setattr(run_estimate, "_fastest", search)
    phase = {"tokens": 2_516_582_400_000, "train": "data/web"}
    phases = [phase, phase, phase | {"micro_batch_size": 1}, phase | {"sequence_length": 8192}]
    config = load_config(CONFIGS / "samba_3.8b_phases.yaml", [f"data.phases={json.dumps(phases)}"])
    found = estimate(config, nodes=64, cluster=Cluster())
    assert searched == [(4096, 2), (4096, 1), (8192, 2)]
    assert [one.plan.config.train.steps for one in found] == [300_000] * 4


@pytest.mark.slow
def test_phases_are_estimated_each_on_its_layout_and_summed():
    config = CONFIGS / "samba_3.8b_phases.yaml"
    out = program.run("slurm", "estimate", config, "--nodes", 64).stdout
    assert len(re.findall(r"^phase \d of 4: ", out, re.MULTILINE)) == 4
    assert len(set(re.findall(r"│ layout +│ +(.*?) │", out))) == 3
    days = [float(found) for found in re.findall(r"days for [\d,]+B tokens +│ +([\d.]+)", out)]
    (sums,) = re.findall(r"^64 nodes: all phases, each on its fastest layout: (.*) = (.*) days$", out, re.MULTILINE)
    assert [float(term) for term in sums[0].split(" + ")] == days
    assert float(sums[1]) == pytest.approx(sum(days), abs=0.2)
    few = Cluster(hardware=replace(H100, name="h100-pcie", node_gpus=4))
    (small,) = estimate(load_config(CONFIGS / "samba_421m.yaml"), nodes=2, cluster=few)
    assert small.plan.world_size == 8
    with pytest.raises(ConfigError, match=r"in data\.phases\.0, no layout of 24 GPUs"):
        estimate(load_config(config), nodes=3, cluster=Cluster())


def check_links(folder, nodes, **limits):
    """A rank a node, each a process."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": program.free_port(), "LOCAL_RANK": "0"} | limits
    common |= {"WORLD_SIZE": str(nodes), "LOCAL_WORLD_SIZE": "1"}
    with ExitStack() as ends:
        processes = []
        for rank in range(nodes):
            own = {"RANK": str(rank), "GROUP_RANK": str(rank), "SLURMD_NODENAME": f"n{rank}"}
            started = program.start("links", folder, module="sambalm.slurm.health", variables=common | own)
            processes.append(ends.enter_context(started))
        assert [process.wait() for process in processes] == [0] * nodes


@pytest.mark.slow
def test_every_node_is_measured_with_its_neighbours(tmp_path):
    """Three nodes: one is left out of each round of pairs, and none of both."""
    check_links(tmp_path / "links", 3)
    answers = [json.loads((tmp_path / "links" / f"n{n}.json").read_text()) for n in range(3)]
    assert all(answer["problem"] is None for answer in answers)
    assert [sum(rate is not None for rate in answer["pair_gb_per_s"]) for answer in answers] in ([1, 2, 1], [2, 1, 1])
    assert all(0.001 < rate < 1000 for answer in answers for rate in filter(None, answer["pair_gb_per_s"]))


@pytest.mark.slow
def test_a_slow_link_is_found(tmp_path):
    check_links(tmp_path / "links", 2, MIN_PAIR_GB_PER_S="100000")
    problems = find_problems(tmp_path, ["n0", "n1"])
    assert all("of MIN_PAIR_GB_PER_S=100000" in problem for problem in problems.values())
    assert problems.keys() == {"n0", "n1"}


def test_bad_and_silent_nodes_are_left_out(tmp_path, capsys):
    for folder, node, problem in (("health", "a", None), ("health", "b", "disk full"), ("health", "d", None)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{node}.json").write_text(json.dumps({"problem": problem}))
    assert pick(tmp_path, 2, ["a", "b", "c", "d"]) == ["a", "d"]
    assert capsys.readouterr().err == "node b is left out: disk full\nnode c is left out: no answer\n"
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "d.json").write_text('{"problem": "slow"}')
    with pytest.raises(SystemExit):
        pick(tmp_path, 2, ["a", "d"])
    assert (tmp_path / "bad_nodes").read_text() == "b\nc\nd\n"  # of both checks


@pytest.mark.parametrize(
    ("arguments", "problem"), [(["{dir}/run"], None), (["/proc/none"], "/proc/none cannot be written")]
)
def test_a_node_checks_itself(arguments, problem, tmp_path):
    command = [sys.executable, "-m", "sambalm.slurm.health", "node", str(tmp_path / "health")]
    environment = os.environ | {"SLURMD_NODENAME": "n1", "MIN_DISK_FREE_GIB": "0.001"}
    subprocess.run([*command, *(a.format(dir=tmp_path) for a in arguments)], check=True, env=environment)
    (found,) = find_problems(tmp_path, ["n1"]).values() or [None]
    assert found is None if problem is None else found.startswith(problem)


@pytest.mark.parametrize(
    ("exit_code", "line"),
    [
        (ExitCode.FINISHED, 'finish 0 "so" it is'),
        (ExitCode.NOT_SAVED, 'retry 74 "so" it is'),
        (ExitCode.REQUEUE, 'requeue 75 "so" it is'),
        (ExitCode.HANGING, 'retry 81 "so" it is'),
        (ExitCode.DIVERGED, 'end 80 "so" it is'),
        (5, 'end 5 "so" it is'),
    ],
)
def test_a_job_learns_what_to_do_after_an_attempt(exit_code, line, tmp_path):
    write_outcome(tmp_path, exit_code=exit_code, step=3, reason='"so"\nit is')
    assert describe_outcome(tmp_path) == line


def test_an_attempt_without_an_outcome_is_tried_again(tmp_path):
    assert describe_outcome(tmp_path) == "retry"


def test_every_exit_code_has_a_meaning():
    assert EXIT_CODES.keys() == set(ExitCode)


def test_a_job_asks_for_its_run_before_it_starts(tmp_path):
    config = str(CONFIGS / "samba_421m.yaml")
    command = [sys.executable, "-W", "ignore", "-m", "sambalm.slurm.prepare"]
    asked = subprocess.run([*command, "8", config, "run.dir=a run"], capture_output=True, text=True)
    assert asked.stdout == f"75 76 {load_config(CONFIGS / 'samba_421m.yaml').run.max_attempts_without_progress} a run\n"
    refused = subprocess.run([*command, "8", config, "parallel.tensor=3"], capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (ExitCode.BAD_INPUT, "")
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


@pytest.fixture
def large():
    """3.8B on 64 nodes, saved every 200 steps of half a second, as if by plan."""
    config = load_config(CONFIGS / "samba_3.8b.yaml", ["checkpoint.every_steps=200", "train.steps=400000"])
    plan = SimpleNamespace(config=config, time=SimpleNamespace(total_s=0.5), world_size=512)
    return Estimate(nodes=64, plan=plan, cluster=Cluster(), parameters=3_864_275_712)


# fp32 weights and two moments: a rank's share of them to the host, and all to the file system.
STALL_S, WRITE_S = 12 * 3_864_275_712 / 512 / 25e9, 12 * 3_864_275_712 / 100e9


def test_saves_and_starts_take_what_their_bytes_take(large):
    assert large.checkpoint_bytes == 46_371_308_544
    assert large.stall_s == pytest.approx(0.00362276, rel=1e-5) == pytest.approx(STALL_S)
    assert large.write_s == pytest.approx(0.463713, rel=1e-5) == pytest.approx(WRITE_S)
    # The main rank's checksums at a node's 2 GB/s, everything once at 100 GB/s, and the weights over the network.
    assert large.load_s == pytest.approx(46.371308544 / 2 + 46.371308544 / 100 + 15.457102848 / 50)
    assert large.restart_s == pytest.approx(30 + 60 + 120 + 23.958509, rel=1e-6)
    few = replace(large, nodes=4)  # 8 GB/s in all
    assert few.write_s == pytest.approx(46.371308544 / 8)
    assert few.load_s == pytest.approx(46.371308544 / 2 + 46.371308544 / 8 + 15.457102848 / 50)


def test_goodput_is_what_saves_failures_and_limits_leave(large):
    assert large.failure_interval_s / HOUR_S == pytest.approx(16_384 * 54 * 24 / 419 / 512)
    assert (large.save_interval_s, large.training_s) == (100.0, 200_000.0)
    failures = (100 / 2 + 0.463713 + 233.958509) / 356_322.673  # half an interval, what is not written, a restart
    limits = (0.003623 + 0.463713 + 180 + 233.958509) / (48 * 3600)  # a save, a requeue and a restart
    assert large.goodput == pytest.approx((1 - failures - limits) / 1.0000362276, rel=1e-6)
    assert large.failures == pytest.approx(200_000 / large.goodput / 356_322.673, rel=1e-6)
    # Young: the square root of 2 x 0.00362276 s x 356,323 s is 50.8 s.
    assert large.best_save_steps == 102
    few = replace(large, cluster=replace(Cluster(), disk_bytes_per_s=0.5e9))
    assert few.best_save_steps == 186  # writing takes 92.7 s, and no save begins before it has ended


def test_the_formula_of_goodput_agrees_with_runs_that_fail_at_random(large):
    """The second run fails often, and its saves take nearly until the next one."""
    slow = replace(large, cluster=replace(Cluster(), gpu_hours_per_failure=2_000.0, disk_bytes_per_s=0.5e9))
    for one in (large, slow):
        assert one.goodput == pytest.approx(one.simulated_goodput(), abs=0.004)
    assert slow.goodput < large.goodput - 0.005


def test_goodput_without_failures_is_what_saves_and_limits_leave(large):
    calm = replace(large, cluster=replace(Cluster(), gpu_hours_per_failure=1e12, time_limit_s=1e12))
    share = 100 / (100 + STALL_S)
    assert calm.goodput == pytest.approx(share, rel=1e-6)
    assert calm.simulated_goodput() == pytest.approx(share, rel=1e-5)  # the last save is waited for


def test_the_best_interval_is_better_than_half_and_twice_of_it(large):
    often = replace(large, cluster=replace(Cluster(), gpu_hours_per_failure=4_000.0))

    def goodput(steps):
        checkpoint = often.plan.config.checkpoint.model_copy(update={"every_steps": steps})
        config = often.plan.config.model_copy(update={"checkpoint": checkpoint})
        plan = SimpleNamespace(config=config, time=often.plan.time, world_size=512)
        return replace(often, plan=plan).goodput

    best = often.best_save_steps
    assert goodput(best) > max(goodput(best // 2), goodput(2 * best))
    assert often.failure_interval_s / HOUR_S == pytest.approx(4_000 / 512)


@pytest.mark.slow
def test_the_largest_config_has_the_layout_that_the_plan_ranks_first():
    """Of ZeRO-1's: the other stages send more, between nodes unmeasured, and are no more than 3% faster by plan."""
    config, asked = load_config(CONFIGS / "samba_3.8b.yaml"), {"world_size": 512, "memory_gib": 80.0, "hardware": H100}
    fastest, first = find_plans(config, **asked, top=1)[0], find_plans(config, **asked, zero_stage=1)[0]
    assert first.time.total_s < 1.03 * fastest.time.total_s
    best = first.config
    assert layout_name(best.parallel, world_size=512) == layout_name(config.parallel, world_size=512)
    assert best.train.micro_batch_size == config.train.micro_batch_size
    assert best.parallel.recompute == config.parallel.recompute
