"""Damage to any file of a run's folder ends in a fall-back with a warning or in one sentence, never in a traceback."""

import json
import random
import shutil
from pathlib import Path

import pytest

from sambalm.pretrain.checkpointing.format import checkpoint_folder, newest_checkpoint
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import CheckpointError, CheckpointsDamagedError, ExitCode, RunFolderError
from sambalm.pretrain.lifecycle.attempts import read_attempts
from sambalm.pretrain.lifecycle.run_folder import open_run_folder
from tests.support import damage as damages
from tests.support.made_runs import make_checkpoint, make_run
from tests.support.whole_runs import changed, run_dir

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
    """Of its keys too, which crashed every start."""
    make_run(run_values, steps=(2, 4))
    whole = damages.checkpoints_of(run_dir(run_values))
    manifest = checkpoint_folder(run_dir(run_values), 4) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"files"', '"filez"'))
    config = parse_config(run_values, source="test")
    with open_run_folder(config) as folder:
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
        open_run_folder(parse_config(run_values, source="test")).__enter__()
    assert (folder / "metrics.jsonl").read_text() == metrics
    (outcome,) = [record for record in read_attempts(folder) if record.exit_code == ExitCode.CHECKPOINTS_DAMAGED]
    assert outcome.start_step is None
    with open_run_folder(parse_config(changed(run_values, run={"start_over": True}), source="test")) as opened:
        assert opened.checkpoint is None


def test_a_run_that_was_killed_before_it_saved_starts_afresh(run_values):
    folder = make_run(run_values, steps=(2,))
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "attempts")
    (folder / "saved.json").unlink()
    with open_run_folder(parse_config(run_values, source="test")) as opened:
        assert opened.checkpoint is None


def test_progress_counts_from_the_step_that_was_resumed(run_values):
    """Attempts that left at 12, 14 and 16 under a damaged newest checkpoint of step 20."""
    folder = make_run(run_values, steps=(10, 12, 14, 16))
    damages.empty(next(make_checkpoint(folder, 20).glob("*.safetensors")), random.Random(0))
    for _ in range(2):
        with open_run_folder(parse_config(run_values, source="test")) as opened:
            assert opened.checkpoint.step == 16


def test_the_step_is_what_the_state_says(run_values):
    folder = make_run(run_values, steps=(2, 4))
    checkpoint_folder(folder, 4).rename(checkpoint_folder(folder, 90))
    with open_run_folder(parse_config(run_values, source="test")) as opened:
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
    with open_run_folder(parse_config(run_values, source="test")):
        assert not (folder / "metrics.jsonl").exists()
    assert len(capsys.readouterr().err.splitlines()) == 2
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").touch()
    with pytest.raises(CheckpointError, match="checkpoints cannot be read: Not a directory"):
        open_run_folder(parse_config(run_values, source="test")).__enter__()


def test_a_folder_that_cannot_be_used_is_a_sentence(run_values, tmp_path):
    (tmp_path / "file").touch()
    values = changed(run_values, run={"dir": str(tmp_path / "file" / "run")})
    with pytest.raises(RunFolderError, match=r"the run's folder .* cannot be used: .*Not a directory"):
        open_run_folder(parse_config(values, source="test")).__enter__()
