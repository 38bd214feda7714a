"""Which checkpoints stay, that two writers share nothing, and the commands that look at checkpoints and remove them."""

import json
import os
import random
import signal
import time

import pytest
import yaml

from sambalm.pretrain.checkpointing.format import checkpoint_folder, open_checkpoint
from sambalm.pretrain.checkpointing.retention import Retention
from sambalm.pretrain.errors import DivergedError, ExitCode, RunInUseError
from sambalm.pretrain.reporting.metrics_file import read_metrics
from tests.support import damage as damages
from tests.support import program
from tests.support.made_runs import make_checkpoint, make_run
from tests.support.whole_runs import changed, run_dir
from tests.support.worlds import run_world, server_context


@pytest.fixture
def run(run_values):
    return make_run(run_values, steps=(3, 6, 9, 12))


def steps(run) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").iterdir())


def flip(run, step):
    damages.flip_a_bit(next(checkpoint_folder(run, step).glob("*.safetensors")), random.Random(0))


def test_only_what_is_older_than_the_newest_that_verify_goes(run):
    assert [folder.name for folder in Retention(run, keep=2).prune()] == ["step_00000003", "step_00000006"]
    assert steps(run) == [9, 12]


def test_a_damaged_checkpoint_is_not_kept_instead_of_a_good_one(run):
    """And what a save finds later is as good as what it found first."""
    flip(run, 12)
    retention = Retention(run, keep=1)
    retention.prune()
    assert steps(run) == [9, 12]  # the damaged one is newer
    make_checkpoint(run, 10)
    retention.prune()
    assert steps(run) == [10, 12]
    flip(run, 10)
    make_checkpoint(run, 9)
    retention.prune()
    assert steps(run) == [9, 10, 12]  # 10 was good when it was last looked at
    flip(run, 9)
    assert retention.prune() == []


def test_every_nth_stays_for_ever(run):
    Retention(run, keep=1, keep_every_steps=6).prune()
    assert steps(run) == [6, 12]
    for step in (15, 18, 21):
        make_checkpoint(run, step)
        Retention(run, keep=1, keep_every_steps=6).prune()
    assert steps(run) == [6, 12, 18, 21]


def test_either_the_name_or_the_record_keeps_an_nth(run):
    """One of the two may be wrong, and none says which: 6 is called 7, and 9 is called 12."""
    folders = run / "checkpoints"
    (folders / "step_00000006").rename(folders / "step_00000007")
    make_checkpoint(run, 15)
    retention = Retention(run, keep=1, keep_every_steps=6)
    (folders / "step_00000012").rename(folders / "step_00000013")
    (folders / "step_00000009").rename(folders / "step_00000012")
    assert [folder.name for folder in retention.prune()] == ["step_00000003"]


def test_a_checkpoint_that_a_run_does_not_go_back_to_is_not_kept_instead_of_a_good_one(run):
    make_checkpoint(run, 15, hooks={"guards": {"in_a_row": 2}})
    retention = Retention(run, keep=1)
    for _ in range(2):  # nor once it has been looked at
        retention.prune()
        assert steps(run) == [12, 15]
    make_checkpoint(run, 18, hooks={"guards": {"in_a_row": 0}})
    retention.prune()
    assert steps(run) == [18]


def test_nothing_is_removed_without_the_lease_and_what_cannot_be_removed_stays(run, capsys, monkeypatch):
    def lost():
        raise RunInUseError("taken")

    with pytest.raises(RunInUseError):
        Retention(run, keep=1, check_lease=lost).prune()
    assert steps(run) == [3, 6, 9, 12]
    monkeypatch.setattr(os, "replace", lambda *_: os.rmdir(run))
    assert Retention(run, keep=1).prune() == []
    assert capsys.readouterr().err.count("cannot be removed: ") == 3
    assert steps(run) == [3, 6, 9, 12]


def steps_logged_in_first_removal(values, last_step):
    """Trains while the first removal of old checkpoints ends only once a step is logged; steps before and after it."""
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.trainer import train

    prune, seen = Retention.prune, []

    def prune_late(self):
        if not seen:
            seen.append(len(read_metrics(self.run_dir)))
            program.wait_until(lambda: len(read_metrics(self.run_dir)) >= last_step, 60)
            seen.append(len(read_metrics(self.run_dir)))
        return prune(self)

    Retention.prune = prune_late
    train(parse_config(values, source="test"))
    return seen


def test_a_run_trains_while_old_checkpoints_are_removed(run_values):
    values = changed(run_values, train={"steps": 8}, checkpoint={"every_steps": 2, "keep": 1})
    values = changed(values, checkpoint={"when_busy": "skip"}, validation={"every_steps": 100, "tokens": 64})
    ((before, after),) = run_world(steps_logged_in_first_removal, values, 6, ranks=1)
    assert before < 6 <= after
    assert steps(run_dir(values)) == [8]


def beat_often() -> None:
    from sambalm.pretrain.lifecycle import lease

    lease.Lease.__init__.__kwdefaults__["beat_s"] = 0.05


def test_a_run_whose_lease_another_took_ends_before_its_next_save(run_values, tmp_path):
    values = changed(run_values, train={"steps": 4000}, checkpoint={"every_steps": 4000})
    values = changed(values, validation={"every_steps": 4000, "tokens": 64})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    lease = run_dir(values) / "lease.json"
    ranks = program.start_ranks("train", tmp_path / "run.yaml", ranks=2, before=beat_often)
    program.wait_until(lambda: len(read_metrics(run_dir(values))) > 2, 60)
    taken = json.dumps(json.loads(lease.read_text()) | {"token": "another"})
    (tmp_path / "lease.json").write_text(taken)
    os.replace(tmp_path / "lease.json", lease)
    assert [rank.wait() for rank in ranks] == [ExitCode.RUN_IN_USE] * 2
    assert all("Traceback" not in rank.communicate()[1] for rank in ranks)
    assert lease.read_text() == taken
    assert not (run_dir(values) / "checkpoints").exists()


def save_after_a_pause(values, stopped):
    """Holds the lease, stops itself in the middle of a save, and tells how the save ended."""
    from sambalm.pretrain.checkpointing import format as files
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.trainer import train

    checksums = files.checksums

    def pause(*args):
        if not stopped.exists():
            stopped.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return checksums(*args)

    files.checksums = pause
    try:
        train(parse_config(values, source="test"))
    except Exception as error:
        os._exit(getattr(error, "exit_code", 1))
    os._exit(0)


@pytest.mark.slow
def test_a_writer_that_was_suspended_does_not_touch_its_successors_checkpoints(run_values, tmp_path):
    """A stops in a save, B takes the lease and saves the same step, A wakes: what B has saved stays, and A ends."""
    values = changed(run_values, train={"steps": 3}, validation={"every_steps": 100, "tokens": 64})
    stopped, checkpoint = tmp_path / "stopped", checkpoint_folder(run_dir(values), 3)
    first = server_context().Process(target=save_after_a_pause, args=(values, stopped))
    first.start()
    program.wait_until(stopped.exists, 60)
    (partial,) = checkpoint.parent.iterdir()
    time.sleep(0.1)
    token = json.loads((run_dir(values) / "lease.json").read_text())["token"]
    assert partial.name == f".step_00000003.{token}.partial"
    (run_dir(values) / "lease.json").unlink()  # as after 60 s without a beat
    second = server_context().Process(target=save_after_a_pause, args=(values, stopped))
    second.start()
    second.join(60)
    assert second.exitcode == 0
    saved = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    assert first.exitcode in (ExitCode.RUN_IN_USE, ExitCode.NOT_SAVED)
    assert open_checkpoint(checkpoint).step == 3
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == saved
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def train_with_a_weight_set_to_infinity(values, before_step):
    """The error that this rank ends with."""
    import torch

    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.trainer import Trainer, train

    launch = Trainer._launch_step

    def spoil(self):
        if self.step == before_step - 1:
            with torch.no_grad():
                next(p for n, p in self.training.chunks[0].named_parameters() if "norm" in n).fill_(torch.inf)
        return launch(self)

    Trainer._launch_step = spoil
    with pytest.raises(DivergedError) as ended:
        train(parse_config(values, source="test"))
    return str(ended.value)


@pytest.mark.parametrize(
    ("skips", "says"), [(2, "steps 4 to 6 were skipped"), (10, "is not finite, so the state was not saved")]
)
def test_weights_that_are_not_finite_replace_no_good_checkpoint(skips, says, run_values):
    """Neither while steps are skipped, nor at the end, when a save waits no longer."""
    values = changed(run_values, train={"steps": 8, "max_skipped_steps": skips, "max_rollbacks": 0})
    values = changed(values, checkpoint={"every_steps": 2, "keep": 1})
    values = changed(values, validation={"every_steps": 100, "tokens": 64, "length_multiples": [1]})
    (message,) = run_world(train_with_a_weight_set_to_infinity, values, 4, ranks=1)
    assert says in message
    assert steps(run_dir(values)) == [2]


def test_checkpoints_are_listed_verified_and_removed(run):
    flip(run, 9)
    listed = program.run("checkpoint", "list", run, "--json")
    rows = json.loads(listed.stdout)
    assert [(row["step"], row["tokens"], row["verified"]) for row in rows] == [
        (3, 768, True),
        (6, 1536, True),
        (9, None, False),
        (12, 3072, True),
    ]
    assert "shard-00001.safetensors has changed" in rows[2]["problem"]
    assert rows[0]["bytes"] == sum(path.stat().st_size for path in checkpoint_folder(run, 3).iterdir())
    table = program.run("checkpoint", "list", run, variables={"COLUMNS": "300"}).stdout.splitlines()
    assert table[1].split()[:4] == ["3", "768", f"{rows[0]['bytes'] / 1e6:,.1f}", "MB"]
    assert table[1].split()[-1] == "yes"
    assert program.run("checkpoint", "verify", run, "--step", "6").returncode == 0
    damaged = program.run("checkpoint", "verify", run)
    assert damaged.returncode == ExitCode.BAD_INPUT
    assert damaged.stderr.startswith("error: 1 of 4 checkpoints do not verify: ")
    assert "step_00000009/shard-00001.safetensors has changed" in damaged.stderr
    pruned = program.run("checkpoint", "prune", run, "--keep", "2", "--dry-run", "--json")
    assert json.loads(pruned.stdout) == {"removed": [str(checkpoint_folder(run, 3))], "dry_run": True}
    assert steps(run) == [3, 6, 9, 12]
    assert program.run("checkpoint", "prune", run, "--keep", "2").stdout == f"{checkpoint_folder(run, 3)}: removed\n"
    assert steps(run) == [6, 9, 12]


def test_a_run_is_rolled_back_to_an_earlier_checkpoint(run):
    moved = program.run("checkpoint", "rollback", run, "--step", "6")
    assert moved.returncode == 0, moved.stderr
    assert [path.name for path in sorted((run / "checkpoints").glob("step_*"))] == ["step_00000003", "step_00000006"]
    set_aside = sorted((run / "checkpoints").glob("abandoned_*"))
    assert [path.name for path in set_aside] == ["abandoned_step_00000009", "abandoned_step_00000012"]
    assert moved.stdout == f"{set_aside[1]}: set aside\n{set_aside[0]}: set aside\n{run}: goes on from step 6\n"
    refused = program.run("checkpoint", "rollback", run, "--step", "7")
    assert (refused.returncode, "no checkpoint of step 7" in refused.stderr) == (ExitCode.BAD_INPUT, True)
    nothing = program.run("checkpoint", "prune", run / "none", "--keep", "1")
    assert (nothing.returncode, "is not a run with checkpoints" in nothing.stderr) == (ExitCode.BAD_INPUT, True)
    assert not (run / "none").exists()
