"""Thousands of damaged run folders, and starts of the real program on some of them."""

import random
import shutil
from pathlib import Path

import pytest
import yaml

from sambalm.pretrain.errors import ExitCode
from tests.pretrain.test_damage import check_cases
from tests.support import damage as damages
from tests.support import program
from tests.support.made_runs import make_run
from tests.support.whole_runs import changed, run_dir, train

CASES, GROUPS = 5000, 10
STARTS = 40


@pytest.mark.long
@pytest.mark.parametrize("group", range(GROUPS))
def test_thousands_of_damaged_folders_fall_back_or_say_why(group, run_values, tmp_path):
    damages.add_a_dead_holder(make_run(run_values, steps=(2, 4, 6)))
    share = CASES // GROUPS
    found = check_cases(run_values, tmp_path, range(1000 + group * share, 1000 + (group + 1) * share))
    assert {6, 4} <= found


def take_a_silent_lease_soon() -> None:
    """In the program: a damaged lease's holder counts as gone after a moment."""
    from sambalm.pretrain.lifecycle import lease

    lease.held_lease.__wrapped__.__kwdefaults__["stale_s"] = 0.05


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_program_ends_with_the_same_bits_or_says_why(ranks, run_values, tmp_path):
    """After damage to any file of a real run, with the steps from the newest good checkpoint on taken again."""
    values = changed(run_values, run={"dir": str(tmp_path / "whole")}, checkpoint={"every_steps": 2})
    values = changed(values, parallel={"zero_stage": 1})
    expected = train(values, ranks=ranks)
    shutil.rmtree(run_dir(values) / "checkpoints" / "step_00000006")
    damages.add_a_dead_holder(run_dir(values))
    finished = 0
    for seed in range(STARTS):
        copy = changed(values, run={"dir": str(tmp_path / f"copy{seed}")})
        shutil.copytree(run_dir(values), run_dir(copy))
        done = damages.damage(run_dir(copy), random.Random(seed))
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(copy))
        main, *others = program.start_ranks("train", config, ranks=ranks, before=take_a_silent_lease_soon)
        _, said = main.communicate()
        context = f"seed {seed}: {done}: {said}"
        assert "Traceback" not in said, context
        if main.returncode:
            assert main.returncode in set(ExitCode), context
            assert sum(line.startswith("error: ") for line in said.splitlines()) == 1, context
            for other in others:  # which may wait for the process group
                other.kill()
        else:
            finished += 1
            assert [other.wait() for other in others] == [0] * (ranks - 1), context
            assert losses(Path(copy["run"]["dir"]))[6] == expected[-1]["loss"], context
    assert finished > STARTS / 2


def losses(folder: Path) -> dict[int, float]:
    from sambalm.pretrain.reporting.metrics_file import read_metrics

    return {record["step"]: record["loss"] for record in read_metrics(folder) if "loss" in record}
