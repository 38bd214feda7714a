"""The lease of a run by itself: who may take it, and when."""

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from sambalm.pretrain.errors import (
    RunInUseError,
)
from sambalm.pretrain.lifecycle import lease as lease_module
from sambalm.pretrain.lifecycle.lease import Lease, held_lease
from sambalm.pretrain.lifecycle.processes import process_start


@pytest.fixture
def identity(monkeypatch):
    """Lets the next lease be of a process that is told by these keys."""
    real = lease_module._identity

    def set_identity(**keys):
        monkeypatch.setattr(lease_module, "_identity", lambda: real() | keys)

    return set_identity


def test_a_process_is_gone_before_anybody_has_waited_for_it():
    assert process_start(os.getpid()).isdigit()
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_start(process.pid) is None
    assert process_start(process.pid) is None


def test_a_lease_that_is_released_between_two_looks_is_taken(tmp_path, monkeypatch):
    first, read = Lease(tmp_path), lease_module._read
    first.acquire()

    def read_late(path):
        monkeypatch.setattr(lease_module, "_read", read)
        first.release()
        return read(path)

    monkeypatch.setattr(lease_module, "_read", read_late)
    second = Lease(tmp_path)
    second.acquire()
    second.check()
    second.release()


FAR = {"host": "far", "pids": "another boot"}  # whose processes cannot be looked up from here


@pytest.mark.parametrize(
    ("holder", "mine"),
    [
        ({"pid": 2**22 + 1}, {}),  # no such process
        ({"process_start": "1"}, {}),  # a new process with the number of the old one
        ({"job": "7", "attempt": "job7.0.0"} | FAR, {"job": "7", "attempt": "job7.0.1"}),  # an earlier attempt of ours
    ],
    ids=["dead", "number taken", "same job"],
)
def test_a_lease_of_nobody_is_taken_at_once(holder, mine, identity, tmp_path):
    identity(**holder)
    Lease(tmp_path, beat_s=0.01).acquire()  # and it goes on beating
    identity(**mine)
    taken, start_s = Lease(tmp_path, stale_s=60.0), time.monotonic()
    taken.acquire()
    assert time.monotonic() - start_s < 10
    taken.check()
    taken.release()


@pytest.mark.parametrize(
    ("holder", "mine"),
    [
        (FAR, {}),
        ({}, {}),
        ({"job": "7", "attempt": "job7.0.0"} | FAR, {"job": "8", "attempt": "job8.0.0"}),
        ({"job": "7", "attempt": None} | FAR, {"job": "7", "attempt": "job7.0.1"}),
    ],
    ids=["far", "this process", "other job", "by hand"],
)
def test_a_lease_with_a_beat_is_respected(holder, mine, identity, tmp_path):
    identity(**holder)
    held = Lease(tmp_path, beat_s=0.05)
    held.acquire()
    identity(**mine)
    before = (tmp_path / "lease.json").stat().st_mtime_ns
    with pytest.raises(RunInUseError, match=rf"{tmp_path} is in use by process \d+ on "):
        Lease(tmp_path, stale_s=20.0).acquire()
    assert (tmp_path / "lease.json").stat().st_mtime_ns > before  # it beat
    held.check()
    held.release()
    assert not (tmp_path / "lease.json").exists()
    assert not list(tmp_path.iterdir())


def test_a_silent_lease_is_taken_after_a_while(identity, tmp_path):
    identity(**FAR)
    Lease(tmp_path, beat_s=1000.0).acquire()
    identity()
    taken, start_s = Lease(tmp_path, stale_s=0.5), time.monotonic()
    taken.acquire()
    assert time.monotonic() - start_s >= 0.5
    taken.release()


def no_link(path):
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize(
    "damage", [Path.touch, Path.mkdir, no_link, lambda path: path.write_text("[]"), lambda path: path.write_text("{")]
)
def test_a_damaged_lease_is_taken_after_a_while(damage, tmp_path, capsys):
    damage(tmp_path / "lease.json")
    with held_lease(tmp_path, stale_s=0.1) as lease:
        lease.check()
    assert not list(tmp_path.iterdir())
    assert (
        capsys.readouterr().err
        == f"warning: {tmp_path}/lease.json is damaged: waiting 0.1 s for a sign of its holder\n"
    )


def test_a_lease_is_known_by_its_token(identity, tmp_path):
    """Whatever else of it is damaged: its holder goes on, and who waits sees it beat."""
    lease = Lease(tmp_path, beat_s=0.05)
    lease.acquire()
    (tmp_path / "lease.json").write_text(json.dumps({"token": lease.token, "pid": "x"}))
    lease.check()
    with pytest.raises(RunInUseError, match=r"in use by an unknown process, as lease\.json is damaged"):
        Lease(tmp_path, stale_s=20.0).acquire()
    (tmp_path / "lease.json").write_bytes(b"")
    with pytest.raises(RunInUseError, match=r"an unknown process, as lease\.json is damaged, took it"):
        lease.check()
    lease.release()


def test_who_takes_a_silent_lease_first_is_looked_at_anew(identity, tmp_path):
    """Somebody takes the lease and dies while this process waits for a beat of the holder before."""
    identity(**FAR)
    Lease(tmp_path, beat_s=1000.0).acquire()
    identity(pid=2**22 + 1)
    (tmp_path / "other").mkdir()
    Lease(tmp_path / "other", beat_s=1000.0).acquire()
    identity()
    taken = Lease(tmp_path, stale_s=20.0)
    threading.Timer(0.3, os.replace, (tmp_path / "other" / "lease.json", tmp_path / "lease.json")).start()
    taken.acquire()
    taken.check()
    taken.release()


def test_a_lease_that_was_made_while_an_old_one_is_taken_away_is_put_back(tmp_path):
    lease = Lease(tmp_path)
    newer = {"token": "newer"}
    (tmp_path / "lease.json").write_text(json.dumps(newer))
    lease._displace({"token": "older"})
    assert json.loads((tmp_path / "lease.json").read_text()) == newer
    lease._displace(newer)
    assert not list(tmp_path.iterdir())


def test_a_lease_is_only_its_holders_to_release(tmp_path):
    lease = Lease(tmp_path, beat_s=1000.0)
    lease.acquire()
    (tmp_path / "lease.json").write_text('{"token": "another", "pid": 7, "host": "far"}')
    with pytest.raises(RunInUseError, match="process 7 on far took it"):
        lease.check()
    lease.release()
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == "another"
    (tmp_path / "lease.json").unlink()
    with pytest.raises(RunInUseError, match="its lease was removed"):
        lease.check()
