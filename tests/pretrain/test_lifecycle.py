"""Attempts, signals, switches and ways back by themselves, without a run."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from sambalm.pretrain.checkpointing.format import (
    Checkpoint,
    checkpoint_folder,
    checkpoint_folders,
    remove_leftovers,
)
from sambalm.pretrain.errors import (
    CheckpointError,
    ExitCode,
    NoProgressError,
    NotSavedError,
    RestartError,
)
from sambalm.pretrain.lifecycle import attempts as attempts_module
from sambalm.pretrain.lifecycle import lease as lease_module
from sambalm.pretrain.lifecycle import rollback
from sambalm.pretrain.lifecycle.attempts import (
    AttemptRecord,
    attempt_folder,
    check_progress,
    check_restart,
    new_attempt_name,
    newest_restart,
    read_attempts,
    recorded_errors,
    write_outcome,
    write_snapshot,
)
from sambalm.pretrain.lifecycle.hooks import is_due
from sambalm.pretrain.lifecycle.lease import Lease
from sambalm.pretrain.lifecycle.ledger import Ledger
from sambalm.pretrain.lifecycle.phases import Marks
from sambalm.pretrain.lifecycle.run_folder import ENDINGS, RunFolder
from sambalm.pretrain.lifecycle.signals import Request, Signals, take_switches
from tests.support.signals import restored_signals


def attempts(*endings, step=5):
    """Attempts that began at a step, oldest first, by how they ended; a pair begins elsewhere."""
    pairs = [ending if isinstance(ending, tuple) else (ending, step) for ending in endings]
    return [
        AttemptRecord(Path(f"run/attempts/{n}"), float(n), start, None if code is None else int(code), None, None)
        for n, (code, start) in enumerate(pairs)
    ]


CRASH = None


@pytest.mark.parametrize(
    ("endings", "refused"),
    [
        ([], False),
        ([CRASH] * 2, False),
        ([CRASH] * 3, True),
        ([ExitCode.NOT_SAVED, CRASH, ExitCode.DIVERGED], True),
        ([ExitCode.REQUEUE] * 3, True),
        ([CRASH, CRASH, (CRASH, 4), CRASH, CRASH], False),  # progress from 4 to 5 in between
        ([(CRASH, 4)] * 3, False),
        ([(CRASH, 4), CRASH, CRASH, CRASH], True),
        ([CRASH, ExitCode.BAD_INPUT, CRASH, ExitCode.RUN_IN_USE, CRASH], True),  # refusals count neither way
        ([CRASH, ExitCode.BAD_INPUT, ExitCode.RUN_IN_USE, CRASH], False),
        ([CRASH, (CRASH, None), CRASH, (CRASH, None), CRASH], True),  # nor those that do not say where they began
        *(
            ([CRASH, CRASH, CRASH, deliberate, CRASH, CRASH], False)
            for deliberate in (ExitCode.FINISHED, ExitCode.NO_PROGRESS, ExitCode.STOPPED, ExitCode.INTERRUPTED)
        ),
        ([CRASH, CRASH, CRASH, ExitCode.NO_PROGRESS], False),  # a start by hand
    ],
)
def test_attempts_without_progress_are_counted(endings, refused):
    earlier = attempts(*endings)
    if not refused:
        check_progress(earlier, step=5, limit=3)
        return
    with pytest.raises(NoProgressError, match=r"the last 3 attempts in run/attempts began at step 5 and none left"):
        check_progress(earlier, step=5, limit=3)


def test_attempts_are_told_oldest_first_with_the_first_outcome(tmp_path, monkeypatch):
    seconds = count(1000)
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    for name, step in (("b", 0), ("c", 3), ("a", 6)):
        folder = tmp_path / "attempts" / name
        write_snapshot(folder, config_yaml="x: 1\n", world_size=2, start_step=step)
    write_outcome(folder.parent / "c", exit_code=ExitCode.DIVERGED, step=4, reason="the first")
    write_outcome(folder.parent / "c", exit_code=ExitCode.NOT_SAVED, step=5, reason="what followed from it")
    (tmp_path / "attempts" / "none").mkdir()  # of a job that has not come as far
    glob = Path.glob
    for backwards in (False, True):  # whatever the order in which a file system lists them
        monkeypatch.setattr(Path, "glob", lambda path, pattern, b=backwards: sorted(glob(path, pattern), reverse=b))
        records = read_attempts(tmp_path)
        assert [record.path.name for record in records] == ["b", "c", "a"]
    assert [record.start_step for record in records] == [0, 3, 6]
    assert [(record.exit_code, record.step, record.reason) for record in records] == [
        (None, None, None),
        (ExitCode.DIVERGED, 4, "the first"),
        (None, None, None),
    ]
    assert not list(tmp_path.glob("attempts/*/.*"))  # drafts
    damaged = tmp_path / "attempts" / "c" / "attempt.json"
    damaged.write_text("{")
    os.utime(damaged, (5000, 5000))  # which is all that is known of its start
    assert [(record.path.name, record.started_s) for record in read_attempts(tmp_path)][-1] == ("c", 5000)


@pytest.mark.parametrize(
    ("tracked", "difference", "revision", "is_changed"),
    [("yes", "", "abc", False), ("yes", "+ a line", "abc", True), ("", "+ a line", None, False)],
    ids=["clean", "changed", "within another project"],
)
def test_a_snapshot_tells_the_revision_and_what_it_lacks(
    tracked, difference, revision, is_changed, monkeypatch, tmp_path
):
    answers = {"ls-files": tracked, "rev-parse": "abc\n", "diff": difference and f"{difference} https://me:pw@host"}
    monkeypatch.setattr(attempts_module, "_git", lambda folder, command, *_: answers[command])
    monkeypatch.setenv("SOME_API_KEY", "hunter2")
    monkeypatch.setenv("NCCL_DEBUG", "here")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    write_snapshot(tmp_path, config_yaml="x: 1\n", world_size=2, start_step=3)
    values = json.loads((tmp_path / "attempt.json").read_text())
    assert (values["revision"], values["changed"]) == (revision, is_changed)
    assert (values["world_size"], values["start_step"], values["host"]) == (2, 3, socket.gethostname())
    assert (values["slurm_job"], values["slurm_nodes"]) == ("7", "n[1-2]")
    assert (tmp_path / "code.diff").exists() is is_changed
    assert not is_changed or "pw" not in (tmp_path / "code.diff").read_text()
    environment = (tmp_path / "environment.txt").read_text().splitlines()
    assert {"SOME_API_KEY=(hidden)", "NCCL_DEBUG=here"} <= set(environment)


def test_an_attempt_has_the_launchers_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMBALM_ATTEMPT", "job7.0.1")
    for name in "job7.0.1", "job7.0.1.restart1", "job7.0.1.restart2":
        assert new_attempt_name(tmp_path) == name
        write_snapshot(attempt_folder(tmp_path, name), config_yaml="", world_size=1, start_step=0)
        assert newest_restart(tmp_path / "attempts" / "job7.0.1").name == name
    monkeypatch.delenv("SAMBALM_ATTEMPT")
    assert new_attempt_name(tmp_path).endswith(f"-{os.getpid()}")


def test_errors_with_an_exit_code_are_recorded(tmp_path):
    for name, error, code in (
        ("own", NotSavedError("no space"), ExitCode.NOT_SAVED),
        ("keyboard", KeyboardInterrupt(), ExitCode.INTERRUPTED),
        ("other", RuntimeError("a bug"), None),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(type(error)), recorded_errors(tmp_path / name):
            raise error
        outcome = tmp_path / name / "outcome.json"
        assert (json.loads(outcome.read_text())["exit_code"] if outcome.exists() else None) == code
    assert json.loads((tmp_path / "own" / "outcome.json").read_text())["reason"] == "no space"


def test_a_full_disk_changes_no_ending(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attempts_module, "flush_to_disk", out_of_space)
    with pytest.raises(NotSavedError, match="no space"), recorded_errors(tmp_path):
        raise NotSavedError("no space")
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path / 'outcome.json'} cannot be written: ")
    monkeypatch.setattr(lease_module, "flush_to_disk", out_of_space)
    with pytest.raises(OSError, match="No space left"):
        Lease(tmp_path).acquire()
    assert not list(tmp_path.iterdir())


def out_of_space(file):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_rank_leaves_before_the_end_is_recorded(tmp_path):
    written = []

    def barrier() -> None:
        written.append((tmp_path / "outcome.json").exists())

    for is_main in (False, True):
        world = SimpleNamespace(is_main=is_main, barrier=barrier)
        RunFolder(tmp_path, check_lease=lambda: None, ledger=Ledger(Marks())).end(
            ENDINGS[Request.NOTHING], step=3, world=world
        )
    assert written == [False, True]


@pytest.fixture
def listening():
    with restored_signals():
        signals = Signals()
        signals.listen()
        yield signals


def taken_after(signals, *numbers):
    """What a run is asked for once its process has had these signals."""
    for number in numbers:
        os.kill(os.getpid(), number)
    end_s, found = time.monotonic() + 20, Request.NOTHING
    while found == Request.NOTHING and time.monotonic() < end_s:
        time.sleep(0.01)
        found = signals.take()
    return found


def test_a_signal_asks_once_to_save_and_for_ever_to_leave(listening):
    listening.training_starts()
    assert listening.take() == Request.NOTHING
    assert taken_after(listening, signal.SIGUSR1) == Request.SAVE
    assert listening.take() == Request.NOTHING
    assert taken_after(listening, signal.SIGTERM) == Request.LEAVE
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.1)
    assert [listening.take() for _ in range(3)] == [Request.LEAVE] * 3


BEFORE_TRAINING = """
import os, signal, time
from sambalm.pretrain.lifecycle.signals import Signals
signals = Signals()
signals.before_leaving = lambda code, why: print(int(code), why, flush=True)
signals.listen()
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(30)
"""


def test_a_term_before_training_ends_the_process(tmp_path):
    ended = subprocess.run([sys.executable, "-c", BEFORE_TRAINING], capture_output=True, text=True, timeout=60)
    assert ended.returncode == ExitCode.REQUEUE
    assert ended.stderr == "SIGTERM before the first step: leaving; the same command starts it again\n"
    assert ended.stdout == f"{ExitCode.REQUEUE:d} {ended.stderr}"  # what others are told


WITHOUT_PARENT = """
import sys, time
from sambalm.pretrain.lifecycle import signals as module
module.LOOK_S = 0.05
signals = module.Signals()
signals.listen()
if "trains" in sys.argv:
    signals.training_starts()
print(signals.take().name, flush=True)
sys.stdin.readline()
time.sleep(0.5)
print(signals.take().name, flush=True)
"""


@pytest.mark.parametrize(
    ("variables", "trains", "request_", "sentence"),
    [
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, True, "ORPHANED", ": saving after the step at hand, then leaving\n"),
        (
            {"TORCHELASTIC_RESTART_COUNT": "0"},
            False,
            None,
            " before the first step: leaving; the same command starts it again\n",
        ),
        ({}, True, "NOTHING", None),  # as under nohup
    ],
)
def test_a_process_asks_to_leave_once_its_torchrun_is_killed(variables, trains, request_, sentence):
    command = f"'{sys.executable}' -c '{WITHOUT_PARENT}' {'trains' if trains else ''} <&0 & wait"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(["sh", "-c", command], **pipes, text=True, env=environment | variables) as parent:
        assert parent.stdout.readline() == "NOTHING\n"
        parent.kill()
        parent.wait()
        said, told = parent.communicate("\n")
    assert said == (f"{request_}\n" if request_ else "")
    assert told == (f"the torchrun that started the ranks is gone{sentence}" if sentence else "")


def test_switches_ask_for_what_they_say(tmp_path):
    assert take_switches(tmp_path) == Request.NOTHING
    (tmp_path / "save").touch()
    assert [take_switches(tmp_path) for _ in range(2)] == [Request.SAVE, Request.NOTHING]
    (tmp_path / "save").mkdir()  # of somebody who keeps something there
    assert [take_switches(tmp_path) for _ in range(2)] == [Request.NOTHING, Request.NOTHING]
    (tmp_path / "save").rmdir()
    (tmp_path / "save").touch()
    (tmp_path / "stop").touch()
    assert [take_switches(tmp_path) for _ in range(2)] == [Request.STOP, Request.STOP]
    assert (tmp_path / "stop").exists()  # until somebody removes it
    leaving = [Request.LEAVE, Request.ORPHANED, Request.INTERRUPT, Request.STOP]
    assert sorted(Request) == [Request.NOTHING, Request.SAVE, *leaving]


def test_what_is_due_every_so_many_steps_is_due_at_the_end_too():
    assert [step for step in range(1, 9) if is_due(step, every_steps=3, last_step=8)] == [3, 6, 8]
    assert [step for step in range(1, 7) if is_due(step, every_steps=3, last_step=6)] == [3, 6]


def test_committed_checkpoints_are_listed_by_their_steps(tmp_path):
    """And nothing else: neither what is unfinished nor what somebody has put beside them."""
    assert checkpoint_folders(tmp_path) == []
    (tmp_path / "checkpoints" / "step_00000012.bak").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes.txt").touch()
    for name in ("step_00000900", "step_00001000", "step_00000020", ".step_00001100.partial", ".step_00000010.removed"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == [
        "step_00000020",
        "step_00000900",
        "step_00001000",
    ]
    (tmp_path / "checkpoints" / "step_00001000" / "state.json").write_text('{"step": 5}')  # a copy under another name
    assert checkpoint_folders(tmp_path)[0].name == "step_00001000"
    remove_leftovers(tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 5


@pytest.mark.parametrize(
    ("variables", "exit_code", "ago_s", "refused"),
    [
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, ExitCode.REQUEUE, 0, True),
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, ExitCode.DIVERGED, 0, True),  # agents of other nodes count differently
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, ExitCode.HANGING, 0, False),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, None, 0, False),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, ExitCode.REQUEUE, 1e6, False),  # before this torchrun
        ({}, ExitCode.REQUEUE, 0, False),
    ],
)
def test_torchrun_restarts_what_did_not_end_on_purpose(variables, exit_code, ago_s, refused, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    folder = attempt_folder(tmp_path, "one")
    write_snapshot(folder, config_yaml="", world_size=1, start_step=0)
    if exit_code is not None:
        with monkeypatch.context() as patch:
            now_s = time.time()
            patch.setattr(time, "time", lambda: now_s - ago_s)
            write_outcome(folder, exit_code=exit_code, step=3, reason="so it is")
    if not refused:
        check_restart(tmp_path)
        return
    with pytest.raises(RestartError, match="does not start this run again: so it is") as ended:
        check_restart(tmp_path)
    assert ended.value.exit_code == exit_code


@pytest.mark.parametrize(
    ("newest_step", "found", "left", "aside"),
    [
        (9, True, [2, 4, 6], [8]),  # the newest is damaged
        (5, True, [2, 4], [6, 8]),
        (4, True, [2, 4], [6, 8]),
        (3, True, [2], [4, 6, 8]),
        (1, False, [2, 4, 6, 8], []),
    ],
)
def test_a_run_goes_back_to_a_checkpoint_and_keeps_the_newer_ones(
    newest_step, found, left, aside, tmp_path, monkeypatch
):
    def opened(folder: Path) -> Checkpoint:
        if folder.name == "step_00000008":
            raise CheckpointError("damaged")
        return Checkpoint(folder, {"step": int(folder.name[-8:])})

    monkeypatch.setattr(rollback, "open_checkpoint", opened)
    (tmp_path / "checkpoints" / "abandoned_step_00000006" / "of an earlier time").mkdir(parents=True)
    for step in (2, 4, 6, 8):
        folder = checkpoint_folder(tmp_path, step)
        folder.mkdir()
        (folder / "content").write_text(str(step))
    assert rollback._set_aside(tmp_path, newest_step) is found
    assert [int(folder.name[-8:]) for folder in checkpoint_folders(tmp_path)] == left
    for step in aside:
        assert (tmp_path / "checkpoints" / f"abandoned_step_{step:08d}" / "content").read_text() == str(step)


def test_a_run_goes_back_to_no_state_that_was_saved_while_steps_were_skipped(tmp_path, monkeypatch):
    for step in (2, 4):
        checkpoint_folder(tmp_path, step).mkdir(parents=True)
    states = {
        2: {"step": 2, "hooks": {"guards": {"in_a_row": 0}}},
        4: {"step": 4, "hooks": {"guards": {"in_a_row": 1}}},
    }
    monkeypatch.setattr(rollback, "open_checkpoint", lambda folder: Checkpoint(folder, states[int(folder.name[-8:])]))
    assert rollback._set_aside(tmp_path, 9)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step_00000002"]
