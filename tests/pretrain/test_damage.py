"""Damage to any file of a run's folder ends in a fall-back with a warning or in one sentence, never in a traceback."""

import random
import shutil
from pathlib import Path

import pytest

from tests.support import damage as damages
from tests.support.whole_runs import changed, run_dir, train

CASES = 60


@pytest.fixture
def whole_run(run_values, tmp_path):
    """A run of two attempts and three checkpoints, whose last holder was killed."""
    values = changed(run_values, run={"dir": str(tmp_path / "whole")}, checkpoint={"every_steps": 2})
    values = changed(values, train={"steps": 4}, validation={"every_steps": 2, "tokens": 64, "length_multiples": [1]})
    train(values)
    values = changed(values, train={"steps": 6})
    train(values)
    damages.add_a_dead_holder(run_dir(values))
    return values


def check_cases(values: dict, folder: Path, seeds: range) -> set[int | None]:
    """Damages a copy of a run for each seed; returns the steps that the starts went on from, None for a refusal."""
    whole, found = damages.checkpoints_of(run_dir(values)), set()
    for seed in seeds:
        copy = changed(values, run={"dir": str(folder / "copy")})
        shutil.copytree(run_dir(values), run_dir(copy))
        done = damages.damage(run_dir(copy), random.Random(seed))
        try:
            damages.read_all(run_dir(copy))
            found.add(damages.starts_or_says_why(copy, whole))
        except BaseException as error:
            error.add_note(f"seed {seed}: {done}")
            raise
        shutil.rmtree(run_dir(copy))
    return found


def test_a_damaged_folder_falls_back_or_says_why(whole_run, tmp_path):
    found = check_cases(whole_run, tmp_path, range(CASES))
    assert {6, 4} <= found
