"""Resuming exactly, on the same layout and on others, and never from something half-written or damaged."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from whole_runs import changed, train
from worlds import run_world

from sambalm.pretrain.checkpoint import checkpoint_folder, checkpoint_folders, newest_checkpoint, open_checkpoint
from sambalm.pretrain.errors import CheckpointError


def run_dir(values):
    return Path(values["run"]["dir"])


def stopped_after(values, step, folder):
    """A copy of a run as a stop right after a step's checkpoint would have left it, metrics beyond it included."""
    stopped = changed(values, run={"dir": str(folder)})
    kept = checkpoint_folder(run_dir(values), step)
    shutil.copytree(kept, folder / "checkpoints" / kept.name)
    shutil.copy(run_dir(values) / "metrics.jsonl", folder)
    return stopped


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, {}),
        (2, {"zero_stage": 1}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3}),
        (2, {"tensor": 2, "sequence": True}),
    ],
)
def test_a_run_stopped_at_any_step_logs_the_same_bits(ranks, parallel, run_values, tmp_path):
    values = changed(run_values, checkpoint={"every_steps": 1}, parallel=parallel, train={"steps": 5})
    uninterrupted = train(values, ranks=ranks)
    for step in (1, 2, 4):
        resumed = train(stopped_after(values, step, tmp_path / f"resumed{step}"), ranks=ranks)
        assert resumed == uninterrupted


def test_a_finished_run_does_nothing_more(run_values):
    records = train(run_values)
    saved = {path: path.stat().st_mtime_ns for path in run_dir(run_values).glob("checkpoints/*/*")}
    assert train(run_values) == records
    assert {path: path.stat().st_mtime_ns for path in run_dir(run_values).glob("checkpoints/*/*")} == saved


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ((4, {"tensor": 2, "sequence": True, "zero_stage": 3}), (1, {"zero_stage": 1})),
        ((2, {"zero_stage": 2}), (2, {"tensor": 2})),
        ((1, {}), (2, {"zero_stage": 3})),
    ],
)
def test_a_checkpoint_resumes_on_another_layout(saved, resumed, run_values, tmp_path):
    values = changed(run_values, parallel=saved[1])
    uninterrupted = train(values, ranks=saved[0])
    moved = stopped_after(values, 3, tmp_path / "moved") | {"parallel": resumed[1]}
    for record, expected in zip(train(moved, ranks=resumed[0]), uninterrupted, strict=True):
        assert record == pytest.approx(expected, rel=1e-5)
    before, after = (open_checkpoint(checkpoint_folder(run_dir(v), 3)) for v in (values, moved))
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.shapes())


@pytest.fixture
def finished(run_values):
    train(run_values)
    return run_values


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
@pytest.mark.parametrize("file", ["*.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(damage, file, finished):
    newest = checkpoint_folder(run_dir(finished), 6)
    (target,) = newest.glob(file)
    damage(target)
    with pytest.raises(CheckpointError, match=target.name):
        open_checkpoint(newest)
    warnings = []
    assert newest_checkpoint(run_dir(finished), warn=warnings.append).step == 3
    assert len(warnings) == 1
    assert target.name in warnings[0]
    assert [record["step"] for record in train(finished)] == [1, 2, 3, 4, 5, 6]
    assert newest_checkpoint(run_dir(finished), warn=pytest.fail).step == 6


def test_a_run_with_nothing_but_damaged_checkpoints_does_not_start_afresh(finished):
    for folder in checkpoint_folders(run_dir(finished)):
        flip_a_bit(next(folder.glob("*.safetensors")))
    with pytest.raises(AssertionError, match=r"every checkpoint in .* is damaged"):
        train(finished)


def test_another_format_version_is_refused_with_both_named(finished):
    newest = checkpoint_folder(run_dir(finished), 6)
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {"format_version": 9}))
    with pytest.raises(CheckpointError, match="version 9 and this program reads 1"):
        open_checkpoint(newest)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        newest_checkpoint(tmp_path, warn=pytest.fail)


def test_another_model_is_refused_by_its_key(finished):
    other = changed(finished, model={"mlp_size": 64}, train={"steps": 8})
    with pytest.raises(AssertionError, match=r"ConfigError: model.mlp_size is 64 and .* was saved with 48"):
        train(other)


def test_only_the_newest_checkpoints_are_kept(run_values):
    train(changed(run_values, checkpoint={"every_steps": 1, "keep": 2}))
    names = sorted(path.name for path in (run_dir(run_values) / "checkpoints").iterdir())
    assert names == ["step_00000005", "step_00000006"]


def train_with_a_full_disk(values):
    """Rank 1 cannot write a file of the size of its shard, as when its disk is full."""
    import os

    from sambalm.pretrain.config import parse_config
    from sambalm.pretrain.trainer import train

    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        train(parse_config(values, source="test"))
    except CheckpointError as error:
        return str(error)


def test_a_rank_that_cannot_write_commits_nothing_on_any(run_values):
    messages = run_world(train_with_a_full_disk, changed(run_values, parallel={"zero_stage": 1}), ranks=2)
    assert all("the checkpoint of step 3 was not saved" in message for message in messages)
    assert list((run_dir(run_values) / "checkpoints").iterdir()) == []


def test_a_line_of_metrics_that_a_kill_cut_short_is_forgotten(run_values, tmp_path):
    values = changed(run_values, checkpoint={"every_steps": 1}, train={"steps": 4})
    uninterrupted = train(values)
    stopped = stopped_after(values, 2, tmp_path / "cut")
    metrics = tmp_path / "cut" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    assert train(stopped) == uninterrupted
