"""One process at a time works in a run's folder: a lease file that its holder keeps touching."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sambalm.data_pipeline.files import flush_to_disk, remove, sync
from sambalm.pretrain.errors import RunInUseError, print_warning
from sambalm.pretrain.lifecycle.attempts import ATTEMPT_VARIABLE
from sambalm.pretrain.lifecycle.processes import pid_space, process_start

LEASE = "lease.json"
BEAT_S, STALE_S = 10.0, 60.0
_FIELDS: dict[str, type] = {
    **dict.fromkeys(("token", "host", "pids", "process_start", "job", "attempt"), str),
    "pid": int,
}


class Lease:
    """The right to write into a run's folder.

    A lease whose holder is gone is taken over: at once when its process is known to be dead or is an earlier attempt of
    the same Slurm job, else after stale_s without a beat, and so is a damaged one, which does not tell its holder. A
    holder that was suspended meanwhile finds out in `check`: each lease has a token of its own.
    """

    def __init__(self, run_dir: Path, *, beat_s: float = BEAT_S, stale_s: float = STALE_S) -> None:
        self._path = run_dir / LEASE
        self._beat_s, self._stale_s = beat_s, stale_s
        self._mine = _identity()
        self._ended = threading.Event()
        self.is_lost = False  # whether the last beat found another's lease or none

    @property
    def token(self) -> str:
        """Names this lease and no other, also in what its holder has not finished writing."""
        return self._mine["token"]

    def acquire(self) -> None:
        """Raises RunInUseError while another process holds the folder; waits up to stale_s to find out."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            holder = _read(self._path)
            if holder is None:
                continue  # released between the two looks
            if holder["token"] is None:
                wait = f"waiting {self._stale_s:g} s for a sign of its holder"
                print_warning(f"{self._path} is damaged: {wait}")
            if not _is_gone(holder, self._mine) and self._beats(holder):
                raise RunInUseError(
                    f"{self._path.parent} is in use by {_named(holder)}"
                    + (f" (Slurm job {holder['job']})" if holder["job"] else "")
                    + ": let it end, or give this run another run.dir"
                )
            self._displace(holder)
        threading.Thread(target=self._keep_beating, name="lease", daemon=True).start()

    def check(self) -> None:
        """Raises RunInUseError when another process has taken the folder over."""
        holder = _read(self._path)
        if not self._is_mine(holder):
            taken = f"{_named(holder)} took it" if holder else "its lease was removed"
            raise RunInUseError(
                f"{self._path.parent} is no longer this process's: {taken} while this one did not answer"
            )

    def release(self) -> None:
        self._ended.set()
        if self._is_mine(_read(self._path)):
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Whether the file could be made; it appears with its content."""
        draft = self._path.with_name(f".{LEASE}.{self._mine['token']}")
        try:
            with draft.open("wb") as file:
                file.write(json.dumps(self._mine).encode())
                flush_to_disk(file)
            os.link(draft, self._path)
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        sync(self._path.parent)
        return True

    def _is_mine(self, holder: dict[str, Any] | None) -> bool:
        return holder is not None and holder["token"] == self.token

    def _beats(self, holder: dict[str, Any]) -> bool:
        """Whether the holder shows itself within stale_s, by this process's clock."""
        seen, end_s = _touched(self._path), time.monotonic() + self._stale_s
        while time.monotonic() < end_s:
            time.sleep(min(1.0, self._stale_s / 20))
            now = _touched(self._path)
            if now != seen:
                return now is not None and _token(self._path) == holder["token"]
        return False

    def _displace(self, holder: dict[str, Any]) -> None:
        """Takes a stale lease away. Only one of several processes gets it; a lease made since is put back."""
        taken = self._path.with_name(f".{LEASE}.{self._mine['token']}.stale")
        try:
            os.rename(self._path, taken)
        except FileNotFoundError:
            return
        if _token(taken) != holder["token"]:
            with contextlib.suppress(OSError):
                os.link(taken, self._path)
        remove(taken)

    def _keep_beating(self) -> None:
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(OSError):
                self.is_lost = not self._is_mine(_read(self._path))
                if not self.is_lost:
                    os.utime(self._path)


@contextlib.contextmanager
def held_lease(run_dir: Path, *, stale_s: float = STALE_S) -> Iterator[Lease]:
    """Holds the lease of a run's folder.

    Args:
        stale_s: without a sign of life after which another holder counts as gone.

    Raises:
        RunInUseError: another process works in it.
    """
    lease = Lease(run_dir, stale_s=stale_s)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def _identity() -> dict[str, Any]:
    """This process's identity, on whatever host."""
    pid = os.getpid()
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": pid,
        "pids": pid_space(),
        "process_start": process_start(pid),
        "job": os.environ.get("SLURM_JOB_ID"),
        "attempt": os.environ.get(ATTEMPT_VARIABLE),
    }


def _is_gone(holder: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether the holder certainly does not run any more."""
    if holder["attempt"] and mine["attempt"] and holder["job"] == mine["job"]:
        return True  # the launcher of a job starts an attempt when the one before has ended
    if holder["pid"] is None or holder["process_start"] is None:
        return False  # the lease is damaged
    return holder["pids"] == mine["pids"] and process_start(holder["pid"]) != holder["process_start"]


def holder_lives(run_dir: Path) -> bool | None:
    """Whether the process that a run's lease names runs on this machine; None where that cannot be known from here."""
    try:
        holder = _read(run_dir / LEASE)
    except OSError:
        return None
    if holder is None:
        return False
    if holder["pid"] is None or holder["process_start"] is None or holder["pids"] != pid_space():
        return None
    return process_start(holder["pid"]) == holder["process_start"]


def _named(holder: dict[str, Any]) -> str:
    if holder["pid"] is None or holder["host"] is None:
        return f"an unknown process, as {LEASE} is damaged,"
    return f"process {holder['pid']} on {holder['host']}"


def _read(path: Path) -> dict[str, Any] | None:
    """The holder of a lease, None without a lease; what a damaged lease does not say is None."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        if not path.is_symlink():  # to nowhere
            return None
        found = None
    except (OSError, ValueError):
        found = None
    values = found if isinstance(found, dict) else {}
    return {name: value if isinstance(value := values.get(name), kind) else None for name, kind in _FIELDS.items()}


def _token(path: Path) -> str | None:
    holder = _read(path)
    return holder["token"] if holder else None


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
