"""The attempts of a run: what each started from and how it ended.

runs/NAME/attempts/ATTEMPT/
    attempt.json      when, where, from which step, by which command and code revision
    config.yaml       the whole configuration
    packages.txt      versions of every installed package
    environment.txt   environment variables; values only of those that hold no secret
    code.diff         of a git checkout: what its revision lacks
    outcome.json      exit code, step and reason; missing after a kill

What is read again (attempt.json, outcome.json) is on the disk before it appears under its name. A record that is
damaged all the same counts as missing. URLs are written without user and password (`pretrain/credentials.py`).
"""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from sambalm.data_pipeline.files import flush_to_disk, sync
from sambalm.parallel.environment import is_under_torchrun
from sambalm.pretrain.credentials import shown_environment, without_credentials
from sambalm.pretrain.errors import (
    EXIT_CODES,
    ExitCode,
    Launchers,
    NoProgressError,
    RestartError,
    one_sentence,
    print_warning,
)
from sambalm.pretrain.lifecycle.processes import process_age_s

ATTEMPT_VARIABLE = "SAMBALM_ATTEMPT"  # a launcher's name for the attempt; the same on every rank
RESTARTED = ".restart"
ATTEMPT, OUTCOME = "attempt.json", "outcome.json"
_START = {"started_s": (int, float), "start_step": (int, type(None))}
_OUTCOME = {"exit_code": (int,), "step": (int, type(None)), "reason": (str,), "ended_s": (int, float)}
_OWNER_ONLY = 0o600
# Ways to end that say that the run works or that someone means to look after it.
_DELIBERATE = {ExitCode.FINISHED, ExitCode.NO_PROGRESS, ExitCode.STOPPED, ExitCode.INTERRUPTED}
_REFUSED = {ExitCode.BAD_INPUT, ExitCode.RUN_IN_USE, ExitCode.CHECKPOINTS_DAMAGED}


@dataclass(frozen=True)
class AttemptRecord:
    """An attempt as its folder tells it."""

    path: Path
    started_s: float  # since the epoch
    start_step: int | None  # of the checkpoint that it went on from; None where it was refused before, or for a loss
    exit_code: int | None  # None while it runs and after a kill
    step: int | None  # that it ended at
    reason: str | None
    ended_s: float | None = None  # since the epoch
    slurm_job: str | None = None


def attempt_folder(run_dir: Path, name: str) -> Path:
    return run_dir / "attempts" / name


def new_attempt_name(run_dir: Path) -> str:
    """The launcher's name, or one of its own. An attempt that torchrun has restarted is another, `NAME.restart1`."""
    name = os.environ.get(ATTEMPT_VARIABLE) or time.strftime("%Y%m%dT%H%M%S") + f"-{os.getpid()}"
    names = itertools.chain([name], (f"{name}{RESTARTED}{number}" for number in itertools.count(1)))
    return next(name for name in names if not (attempt_folder(run_dir, name) / ATTEMPT).exists())


def newest_restart(attempt: Path) -> Path:
    """The folder of the latest attempt under a launcher's name: torchrun may have restarted the first."""
    restarts = (attempt.with_name(f"{attempt.name}{RESTARTED}{number}") for number in itertools.count(1))
    return [attempt, *itertools.takewhile(Path.exists, restarts)][-1]


def check_restart(run_dir: Path) -> None:
    """Refuses what torchrun starts again after an attempt that ended on purpose: it restarts whatever did not end in 0.

    Raises:
        RestartError: with the exit code of the attempt before.
    """
    if not is_under_torchrun() or not (attempts := read_attempts(run_dir)):
        return
    code, ended_s = attempts[-1].exit_code, read_outcome(attempts[-1].path).get("ended_s", 0.0)
    if code not in set(ExitCode) or EXIT_CODES[ExitCode(code)].launchers is Launchers.RETRY:
        return
    if ended_s > time.time() - process_age_s(os.getppid()):  # under this torchrun
        raise RestartError(f"torchrun does not start this run again: {attempts[-1].reason}", ExitCode(code))


def read_attempts(run_dir: Path, *, warn: Callable[[str], None] = lambda _: None) -> list[AttemptRecord]:
    """The attempts of a run, oldest first.

    Args:
        warn: called with one sentence for each record that is damaged.
    """
    records = []
    for path in run_dir.glob(f"attempts/*/{ATTEMPT}"):
        started = _read(path, _START, warn=warn)
        outcome = read_outcome(path.parent, warn=warn)
        job = started.get("slurm_job")
        records.append(
            AttemptRecord(
                path=path.parent,
                started_s=started.get("started_s", _changed_s(path)),
                start_step=started.get("start_step"),
                exit_code=outcome.get("exit_code"),
                step=outcome.get("step"),
                reason=outcome.get("reason"),
                ended_s=outcome.get("ended_s"),
                slurm_job=job if isinstance(job, str) else None,
            )
        )
    return sorted(records, key=lambda record: record.started_s)


def check_progress(earlier: Sequence[AttemptRecord], *, step: int, limit: int) -> None:
    """Refuses an attempt from a step that the last `limit` attempts began at too.

    Args:
        earlier: the attempts before, oldest first.

    Raises:
        NoProgressError: the refusal counts as an end of the series, so that a start by hand after it is let through.
    """
    without_progress = 0
    for record in reversed(earlier):
        if record.exit_code in _DELIBERATE:
            break
        if record.start_step is None:  # it says nothing
            continue
        if record.start_step != step:
            break
        without_progress += record.exit_code not in _REFUSED
    if without_progress >= limit:
        raise NoProgressError(
            f"the last {without_progress} attempts in {earlier[-1].path.parent} began at step {step} and none left a "
            "checkpoint after it: find out why, then start the run again"
        )


def write_snapshot(folder: Path, *, config_yaml: str, world_size: int, start_step: int | None) -> None:
    """Writes what an attempt starts from.

    Args:
        start_step: of the checkpoint that it goes on from, 0 for none; None when it is refused before that is known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).resolve().parents[2]
    tracked = _git(
        source, "ls-files", "--error-unmatch", "pretrain/lifecycle/attempts.py"
    )  # not installed into another project
    revision = _git(source, "rev-parse", "HEAD") if tracked else ""
    difference = _git(source, "diff", "HEAD") if revision else ""
    (folder / "config.yaml").write_text(config_yaml)
    about = (distribution.metadata for distribution in distributions())  # read and parsed each time it is asked for
    packages = {f"{fields['Name']}=={fields['Version']}" for fields in about}
    listed = "".join(f"{line}\n" for line in sorted(packages, key=str.lower))
    (folder / "packages.txt").write_text(listed)
    _write_for_owner(folder / "environment.txt", shown_environment(os.environ))
    if difference:
        _write_for_owner(folder / "code.diff", without_credentials(difference))
    values = {
        "started_s": time.time(),
        "start_step": start_step,
        "world_size": world_size,
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_nodes": os.environ.get("SLURM_JOB_NODELIST"),
        "command": without_credentials(sys.argv),
        "revision": revision.strip() or None,
        "changed": bool(difference),
    }
    _write_once(folder / ATTEMPT, values)


def write_outcome(folder: Path, *, exit_code: int, step: int | None, reason: str) -> None:
    """Says how an attempt ended; whoever comes first is right, since what follows a failure are its consequences.

    Args:
        reason: written as `one_sentence` has it.
    """
    reason = without_credentials(one_sentence(reason))
    values = {"exit_code": int(exit_code), "step": step, "reason": reason, "ended_s": time.time()}
    try:
        _write_once(folder / OUTCOME, values)
    except OSError as error:  # as on a full disk; what it would have said is said on the console too
        print_warning(f"{folder / OUTCOME} cannot be written: {one_sentence(error)}")


def read_outcome(folder: Path, *, warn: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The exit code, step, reason and time that an attempt ended with; empty while it runs and after a kill."""
    return _read(folder / OUTCOME, _OUTCOME, warn=warn)


@contextlib.contextmanager
def recorded_errors(folder: Path) -> Iterator[None]:
    """Writes an outcome for an error that has an exit code of its own."""
    try:
        yield
    except KeyboardInterrupt:
        write_outcome(folder, exit_code=ExitCode.INTERRUPTED, step=None, reason="interrupted from the keyboard")
        raise
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)
        if exit_code is not None:
            write_outcome(folder, exit_code=exit_code, step=None, reason=one_sentence(error))
        raise


def _write_once(path: Path, values: dict[str, Any]) -> None:
    """Writes a record, on the disk before it has its name; one that is there already stays."""
    draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(json.dumps(values, indent=1).encode() + b"\n")
            flush_to_disk(file)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def _write_for_owner(path: Path, text: str) -> None:
    """Writes what others on the machine need not read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY), "w") as file:
        file.write(text)


def _read(path: Path, fields: Mapping[str, tuple[type, ...]], *, warn: Callable[[str], None]) -> dict[str, Any]:
    """A record with these fields of these types; empty where there is none, or where it is damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError):
        values = None
    if isinstance(values, dict) and all(isinstance(values.get(name, ...), kinds) for name, kinds in fields.items()):
        return values
    warn(f"{path} is damaged, so what it says is not counted")
    return {}


def _changed_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _git(folder: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""
