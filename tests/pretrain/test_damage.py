"""Damage to any file of a run's folder ends in a fall-back with a warning or in one sentence, never in a traceback."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sambalm.pretrain.checkpointing.format import checkpoint_folder, newest_checkpoint
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import CheckpointError, CheckpointsDamagedError, ExitCode, RunFolderError
from sambalm.pretrain.lifecycle.attempts import read_attempts
from sambalm.pretrain.lifecycle.phases import Marks
from sambalm.pretrain.lifecycle.run_folder import open_run_folder
from sambalm.pretrain.reporting.metrics import _drop_after
from sambalm.pretrain.reporting.metrics_file import read_metrics
from tests.support import damage as damages
from tests.support.made_runs import make_checkpoint, make_run
from tests.support.marks import slow_except
from tests.support.whole_runs import changed, run_dir, train, without_measured
from tests.support.worlds import run_world

CASES = 25


@pytest.fixture
def whole_run(run_values):
    """A run with three checkpoints whose last holder was killed."""
    damages.add_a_dead_holder(make_run(run_values, steps=(2, 4, 6)))
    return run_values


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


def test_a_lost_byte_of_the_manifest_costs_one_warning(run_values, capsys):
    """A byte of a key of the manifest counts like any other."""
    make_run(run_values, steps=(2, 4))
    whole = damages.checkpoints_of(run_dir(run_values))
    manifest = checkpoint_folder(run_dir(run_values), 4) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"files"', '"filez"'))
    config = parse_config(run_values, source="test")
    with open_run_folder(config, Marks()) as folder:
        assert folder.checkpoint.step == 2
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {manifest} does not list the checkpoint's files")
    assert set(whole) == {2, 4}
    started = json.loads((folder.attempt / "attempt.json").read_text())
    assert started["start_step"] == 2  # which is what progress counts from


@pytest.mark.parametrize("evidence", ["saved.json", "attempts", "both"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_afresh_unasked(evidence, run_values):
    folder = make_run(run_values, steps=(2, 4))
    metrics = (folder / "metrics.jsonl").read_text()
    shutil.rmtree(folder / "checkpoints")
    if evidence == "saved.json":
        shutil.rmtree(folder / "attempts")
    elif evidence == "attempts":
        (folder / "saved.json").unlink()
    with pytest.raises(CheckpointsDamagedError, match=r"had saved step 4 and holds no .*run.start_over=true"):
        open_run_folder(parse_config(run_values, source="test"), Marks()).__enter__()
    assert (folder / "metrics.jsonl").read_text() == metrics
    (outcome,) = [record for record in read_attempts(folder) if record.exit_code == ExitCode.CHECKPOINTS_DAMAGED]
    assert outcome.start_step is None
    with open_run_folder(parse_config(changed(run_values, run={"start_over": True}), source="test"), Marks()) as opened:
        assert opened.checkpoint is None


def test_a_run_that_was_killed_before_it_saved_starts_afresh(run_values):
    folder = make_run(run_values, steps=(2,))
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "attempts")
    (folder / "saved.json").unlink()
    with open_run_folder(parse_config(run_values, source="test"), Marks()) as opened:
        assert opened.checkpoint is None


def test_progress_counts_from_the_step_that_was_resumed(run_values):
    """Attempts that left at 12, 14 and 16 under a damaged newest checkpoint of step 20."""
    folder = make_run(run_values, steps=(10, 12, 14, 16))
    damages.empty(next(make_checkpoint(folder, 20).glob("*.safetensors")), random.Random(0))
    for _ in range(2):
        with open_run_folder(parse_config(run_values, source="test"), Marks()) as opened:
            assert opened.checkpoint.step == 16


def test_the_step_is_what_the_state_says(run_values):
    folder = make_run(run_values, steps=(2, 4))
    checkpoint_folder(folder, 4).rename(checkpoint_folder(folder, 90))
    with open_run_folder(parse_config(run_values, source="test"), Marks()) as opened:
        assert opened.checkpoint.step == 4
    checkpoint_folder(folder, 2).rename(checkpoint_folder(folder, 91))  # the older one under the higher number
    assert newest_checkpoint(folder, warn=pytest.fail).step == 4
    assert newest_checkpoint(folder, warn=pytest.fail, step=2).step == 2
    with pytest.raises(CheckpointError, match="no checkpoint of step 3: the steps of the run's checkpoints are 2, 4"):
        newest_checkpoint(folder, warn=pytest.fail, step=3)


def test_what_is_a_folder_instead_of_a_file_is_set_aside(run_values, capsys):
    folder = make_run(run_values, steps=(2,))
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    shutil.rmtree(folder / "attempts")
    (folder / "attempts").touch()
    with open_run_folder(parse_config(run_values, source="test"), Marks()):
        assert not (folder / "metrics.jsonl").exists()
    assert len(capsys.readouterr().err.splitlines()) == 2
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").touch()
    with pytest.raises(CheckpointError, match="checkpoints cannot be read: Not a directory"):
        open_run_folder(parse_config(run_values, source="test"), Marks()).__enter__()


def test_a_folder_that_cannot_be_used_is_a_sentence(run_values, tmp_path):
    (tmp_path / "file").touch()
    values = changed(run_values, run={"dir": str(tmp_path / "file" / "run")})
    with pytest.raises(
        RunFolderError, match=r"the run's folder .* cannot be used: .*/file/run: Not a directory; .* run\.dir$"
    ):
        open_run_folder(parse_config(values, source="test"), Marks()).__enter__()


def test_damaged_metrics_are_left_out_with_one_warning(run_values, capsys):
    """And what is logged of steps that are taken again is cut off, whatever lies before it."""
    path = make_run(run_values, steps=(2, 4)) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "{damage}\n", *lines[2:], lines[0][:9]]))
    _drop_after(path.parent, 3)
    assert path.read_text() == "".join([lines[0], "{damage}\n", lines[2]])
    assert [record["step"] for record in read_metrics(path.parent)] == [1, 3]
    assert capsys.readouterr().err == f"warning: {path} has 1 damaged lines, which are left out\n"


def resumed_steps(values):
    """The step that this rank goes on from; trains to the end."""
    from sambalm.pretrain.trainer import Trainer, train

    found, make = [], Trainer.__init__

    def make_and_note(self, *args, **named):
        make(self, *args, **named)
        found.append(self.step)

    Trainer.__init__ = make_and_note
    train(parse_config(values, source="test"))
    return found


@pytest.mark.parametrize("parallel", slow_except([], [{"zero_stage": 1}, {"tensor": 2}]), ids=str)
def test_ranks_fall_back_to_the_same_checkpoint(parallel, run_values, tmp_path):
    """With the bits of a run that was never damaged."""
    values = changed(run_values, parallel=parallel, checkpoint={"every_steps": 2, "keep": 9})
    expected = train(values, ranks=2)
    stopped = changed(values, run={"dir": str(tmp_path / "stopped")})
    shutil.copytree(run_dir(values), run_dir(stopped))
    for step in (4, 6):
        damages.flip_a_bit(max(checkpoint_folder(run_dir(stopped), step).glob("*.safetensors")), random.Random(step))
    assert run_world(resumed_steps, stopped, ranks=2) == [[2], [2]]
    records = [without_measured(record) for record in read_metrics(run_dir(stopped))]
    assert records == expected


def read_with_damage(values, damaged_rank):
    """The error that this rank ends with when a file is damaged on a rank, after the checkpoint was verified."""
    from sambalm.pretrain import trainer
    from sambalm.pretrain.checkpointing import read

    def fail(*_, **__):
        raise SafetensorError("Error while deserializing header: HeaderTooLarge")

    if int(os.environ["RANK"]) == damaged_rank:
        read._read_region = fail
    elif damaged_rank is None:
        read.Checkpoint.stored = fail
    with pytest.raises(CheckpointError) as ended:
        trainer.train(parse_config(values, source="test"))
    return str(ended.value)


@pytest.mark.parametrize("damaged_rank", [None, 0, 1])
def test_damage_that_one_rank_finds_ends_all_in_a_sentence(damaged_rank, run_values):
    values = changed(run_values, parallel={"zero_stage": 1}, train={"steps": 3})
    train(values, ranks=2)
    values = changed(values, train={"steps": 6})
    messages = run_world(read_with_damage, values, damaged_rank, ranks=2)
    assert len(set(messages)) == 1
    assert "cannot be read: " in messages[0]
    assert messages[0].endswith("HeaderTooLarge")
    assert (f"rank {damaged_rank}: " in messages[0]) == (damaged_rank is not None)
