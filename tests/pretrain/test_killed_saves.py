"""A run killed at every point where a save writes, renames or removes something goes on with the same bits."""

import multiprocessing
import os
import shutil
import signal

import pytest

from sambalm.pretrain.checkpointing.format import checkpoint_folders, open_checkpoint
from tests.support.whole_runs import changed, run_dir, train
from tests.support.worlds import PRELOAD

OPERATIONS = ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir")


def train_until(values, point):
    """In a process of its own: ends it just before operation number `point` on the run's checkpoints."""
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.trainer import train

    seen = 0

    def counted(operation):
        def run(target, *args, **kwargs):
            nonlocal seen
            path = os.readlink(f"/proc/self/fd/{target}") if operation is fsync else os.fsdecode(target)
            if "checkpoints" in path or "step_" in path:
                if seen == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
            return operation(target, *args, **kwargs)

        return run

    fsync = os.fsync
    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    train(parse_config(values, source="test"))


def exit_code_when_killed_at(point, values):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=train_until, args=(values, point))
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.slow
def test_a_save_killed_at_any_point_leaves_whole_checkpoints_only(run_values, tmp_path):
    values = changed(run_values, train={"steps": 3}, checkpoint={"every_steps": 1, "keep": 1})
    values = changed(values, validation={"every_steps": 100, "tokens": 64, "length_multiples": [1]})
    expected = train(changed(values, run={"dir": str(tmp_path / "whole")}))
    for point in range(200):
        killed = changed(values, run={"dir": str(tmp_path / "killed")})
        exit_code = exit_code_when_killed_at(point, killed)
        folders = checkpoint_folders(run_dir(killed))
        assert [open_checkpoint(folder).step for folder in folders] == [int(f.name[-8:]) for f in folders]
        if exit_code == 0:
            break
        assert exit_code == -signal.SIGKILL
        assert train(killed) == expected
        names = sorted(folder.name for folder in (tmp_path / "killed" / "checkpoints").iterdir())
        assert names[-1] == "step_00000003"
        assert all(name.startswith("step_") for name in names)  # nothing half-written or half-removed is left
        shutil.rmtree(tmp_path / "killed")
    else:
        pytest.fail("the run never came to its end")
    assert point > 15
