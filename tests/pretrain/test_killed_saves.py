"""A run killed at every point where a save writes, renames or removes something goes on with the same bits."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from sambalm.pretrain.checkpointing.format import checkpoint_folders, open_checkpoint
from tests.support.whole_runs import changed, run_dir, train
from tests.support.worlds import run_world, server_context

OPERATIONS = ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir")
KILLED_AT = 12


def before_every_operation(values, act):
    """Trains and calls act(number) just before each operation on the run's checkpoints."""
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.trainer import train

    seen, acts = 0, False

    def counted(operation):
        def run(target, *args, **kwargs):
            nonlocal seen, acts
            path = os.readlink(f"/proc/self/fd/{target}") if operation is fsync else os.fsdecode(target)
            if not acts and ("checkpoints" in path or "step_" in path):
                acts = True
                act(seen)
                seen, acts = seen + 1, False
            return operation(target, *args, **kwargs)

        return run

    fsync = os.fsync
    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    train(parse_config(values, source="test"))
    return seen


def copy_before_every_operation(values, folder):
    """Leaves in folder/NUMBER what is on disk before each operation, as a kill would; returns how many there were."""
    return before_every_operation(values, lambda number: shutil.copytree(run_dir(values), folder / f"{number:03}"))


def die_before_operation(values, point):
    before_every_operation(values, lambda number: number == point and os.kill(os.getpid(), signal.SIGKILL))


def checkpoint_files(folder: Path) -> dict[Path, bytes | None]:
    paths = sorted((folder / "checkpoints").rglob("*"))
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in paths}


def goes_on(killed, expected):
    """Whole checkpoints only, and nothing that is half-written or half-removed once the run has ended."""
    folders = checkpoint_folders(run_dir(killed))
    assert [open_checkpoint(folder).step for folder in folders] == [int(f.name[-8:]) for f in folders]
    assert train(killed) == expected
    names = sorted(folder.name for folder in (run_dir(killed) / "checkpoints").iterdir())
    assert names[-1] == "step_00000003"
    assert all(name.startswith("step_") for name in names)


@pytest.fixture
def values(run_values):
    values = changed(run_values, train={"steps": 3}, checkpoint={"every_steps": 1, "keep": 1})
    return changed(values, validation={"every_steps": 100, "tokens": 64, "length_multiples": [1]})


@pytest.mark.slow
def test_a_save_killed_at_any_point_leaves_whole_checkpoints_only(values, tmp_path):
    """What is on disk at each point is a copy, but for one point where the run is killed, with the same files."""
    (operations,) = run_world(copy_before_every_operation, values, tmp_path / "at", ranks=1)
    expected = train(values)  # which has finished: its records alone
    assert operations > 15
    states = []
    for number in range(operations):
        folder = tmp_path / "at" / f"{number:03}"
        files = checkpoint_files(folder)
        if number == KILLED_AT:
            killed = changed(values, run={"dir": str(tmp_path / "killed")})
            process = server_context().Process(target=die_before_operation, args=(killed, number))
            process.start()
            process.join(120)
            assert process.exitcode == -signal.SIGKILL
            assert checkpoint_files(tmp_path / "killed").keys() == files.keys()
            goes_on(killed, expected)
        if files not in states:  # a sync changes nothing that is seen
            states.append(files)
            goes_on(changed(values, run={"dir": str(folder)}), expected)
    assert len(states) > 10
