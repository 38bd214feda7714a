"""Forks that become the program behave as the real one does, and end with the test whatever they do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import program


def say_and_sleep():
    print("before the sleep", flush=True)
    time.sleep(600)


def fail():
    raise LookupError("on purpose")


def in_a_session_of_its_own():
    print(os.getpgrp() == os.getsid(0) == os.getpid(), os.environ.get("RANK"), os.getcwd())


@pytest.mark.parametrize("words", [["--version"], ["train", "none.yaml"], ["train", "--wrong"], ["plan", "--help"]])
def test_it_says_and_returns_what_a_real_process_does(words):
    environment = os.environ | {"COLUMNS": "90"}
    command = [sys.executable, "-m", program.PROGRAM, *words]
    real = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    fork = program.run(*words, variables={"COLUMNS": "90"})
    assert (fork.returncode, fork.stdout, fork.stderr) == (real.returncode, real.stdout, real.stderr)


def test_one_that_hangs_is_killed_and_what_it_said_is_told():
    with (
        program.start("--version", before=say_and_sleep) as hanging,
        pytest.raises(AssertionError, match=r"did not end within 0\.5 s and said:\nbefore the sleep"),
    ):
        hanging.wait(0.5)
    assert hanging.returncode == -signal.SIGKILL
    assert not Path(f"/proc/{hanging.pid}").exists()


def test_one_that_is_left_is_killed():
    with program.start("--version", before=say_and_sleep) as left:
        assert left.poll() is None
    assert left.returncode == -signal.SIGKILL


def test_an_error_is_an_exit_code_and_a_traceback():
    ended = program.run("--version", before=fail)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.endswith("LookupError: on purpose\n")


def test_signals_the_session_and_the_variables_are_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = program.run("--version", before=in_a_session_of_its_own, new_session=True, variables={"RANK": "3"})
    assert ended.stdout.splitlines()[0] == f"True 3 {tmp_path}"
    with program.start("--version", before=say_and_sleep, new_session=True) as asleep:
        os.killpg(asleep.pid, signal.SIGINT)
        assert asleep.wait() == 1
    with pytest.raises(AssertionError, match="imports may read"):
        program.start("--version", variables={"TORCHDYNAMO_DISABLE": "0"})


FORGOTTEN = """
import os, signal
from tests.support import program
from tests.test_programs import say_and_sleep
print(program.start("--version", before=say_and_sleep).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_test_process_leaves_none_behind():
    killed = subprocess.run([sys.executable, "-c", FORGOTTEN], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL
    program.wait_until(lambda: not Path(f"/proc/{int(killed.stdout)}").exists(), 30)
