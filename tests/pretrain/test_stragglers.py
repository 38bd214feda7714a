"""Ranks that are slower than the others are named, and nobody is on a clean run."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sambalm.pretrain.config import StragglerSection
from sambalm.pretrain.lifecycle.stragglers import MEASURED_STEPS, Pace, Stragglers, slowness
from sambalm.pretrain.reporting.metrics_file import read_metrics
from tests.support.hangs import is_rank
from tests.support.marks import slow_except
from tests.support.runs import Run
from tests.support.whole_runs import changed
from tests.support.worlds import run_world

SLOW_S = 0.3  # in each micro-batch: several times what it takes on a busy machine


def slow_down_rank_1() -> None:
    """Its forward also sleeps."""
    from sambalm.model.samba import Samba

    forward = Samba.forward

    def slower(*args, **named):
        time.sleep(SLOW_S if is_rank(1) else 0)
        return forward(*args, **named)

    Samba.forward = slower


@pytest.mark.parametrize(
    "parallel",
    slow_except([], [{"zero_stage": 1}, {"tensor": 2}, {"zero_stage": 3}]),
    ids=str,
)
def test_a_slow_rank_is_named(parallel, run_values, tmp_path):
    """Every step takes all ranks equally long, since the others wait: in forward passes, backward passes or steps."""
    values = changed(
        run_values, parallel=parallel, stragglers={"every_steps": 3, "factor": 1.5}, train={"global_batch_tokens": 128}
    )
    run = Run(values, tmp_path)
    with run.started(before=slow_down_rank_1):
        assert run.exit_codes() == [0, 0]
    lines = [line for line in run.text().splitlines() if "is slow" in line]
    assert [line.split(":")[:2] for line in lines] == [["step 6", " rank 1 is slow"]]  # for the second time
    records = read_metrics(run.dir)
    assert [record.get("stragglers") for record in records] == [None, None, 0, None, None, 1]
    assert records[5]["straggler/rank_1"] == records[5]["slowest_rank_ratio"] > 1.5


def test_nobody_is_named_on_a_clean_run(run_values, tmp_path):
    values = changed(run_values, parallel={"zero_stage": 1}, stragglers={"every_steps": 3, "factor": 3.0})
    run = Run(values, tmp_path)
    with run.started():
        assert run.exit_codes() == [0, 0]
    assert "is slow" not in run.text()
    last = read_metrics(run.dir)[-1]
    assert last["stragglers"] == 0
    assert 1 <= last["slowest_rank_ratio"] < 3


@pytest.mark.parametrize(
    ("every_steps", "ranks", "measured"), [(100, 2, MEASURED_STEPS), (3, 2, 100), (100, 1, 0), (0, 2, 0)]
)
def test_some_steps_before_each_comparison_are_measured(every_steps, ranks, measured):
    world: Any = SimpleNamespace(size=ranks, device=torch.device("cpu"))
    stragglers = Stragglers(StragglerSection(every_steps=every_steps), world=world)
    for step in range(1, 101):
        with stragglers.watching(step):
            pass
    assert len(stragglers.own_time.take(101)) == measured


def own_times(rounds: int) -> list[float]:
    """Returns the own times of a rank that sleeps a tenth of a second, or 20 ms, before it waits for the other."""
    from sambalm.parallel.own_time import MESSAGES, OwnTime

    methods = [vars(owner).get(name) for owner, names in MESSAGES.items() for name in names]
    own, value = OwnTime(torch.device("cpu")), torch.ones(8)
    for number in range(rounds):
        with own.measured(number):
            time.sleep(0.02 if is_rank(0) else 0.1)
            dist.all_reduce(value)
            work = dist.all_reduce(value, async_op=True)
            time.sleep(0.02)
            work.wait()
    assert [vars(owner).get(name) for owner, names in MESSAGES.items() for name in names] == methods  # as they were
    first = own.take(0)
    assert len(first) == 1
    return first + own.take(rounds)


def test_own_time_leaves_out_what_a_rank_waits_for_others():
    quick, slow = (sorted(times)[1] for times in run_world(own_times, 5, ranks=2))
    assert 0.04 <= quick < 0.09  # with the other's 0.1 s it would be over
    assert slow >= 0.12


def test_ranks_are_compared_within_their_stage():
    paces = [Pace(0, 1.0), Pace(0, 1.2), Pace(1, 5.0), Pace(1, 15.0), Pace(0, 0.8), Pace(2, 9.0), Pace(3, 0.0)]
    assert slowness(paces) == pytest.approx([1.0, 1.2, 1.0, 3.0, 0.8, 1.0, 1.0])
