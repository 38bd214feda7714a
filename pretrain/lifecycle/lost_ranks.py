"""Which rank is gone when the others lose their connection to it, whoever started them.

Ranks tell each other at a run's start which process each of them is. A rank can look at the processes of its own host
alone, so the ranks beside the one that is gone name it, in the attempt's outcome; those on other hosts wait for that.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch.distributed as dist

from sambalm.parallel.groups import World
from sambalm.pretrain.errors import ExitCode, RankLostError, SaveBrokenError, one_sentence
from sambalm.pretrain.lifecycle.attempts import read_outcome, write_outcome
from sambalm.pretrain.lifecycle.hang import rank_names
from sambalm.pretrain.lifecycle.processes import pid_space, process_start

EVIDENCE_S = 5.0  # in which a process that has closed its connections ends, or ranks on other hosts name one of theirs
_LOOK_S = 0.02
# In what gloo, NCCL and the ranks' store raise where the other end of a connection is gone.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")


@dataclass(frozen=True)
class RankProcess:
    """A rank's process, as the others know it."""

    host: str
    pids: str  # what its id counts in
    pid: int
    start: str | None

    @classmethod
    def own(cls) -> "RankProcess":
        pid = os.getpid()
        return cls(socket.gethostname(), pid_space(), pid, process_start(pid))


@dataclass(frozen=True)
class RankProcesses:
    """The processes of all ranks, rank 0 first; of nobody where ranks have not met."""

    all: Sequence[RankProcess] = ()

    @classmethod
    def of(cls, world: World) -> "RankProcesses":
        """Collective, over the host group."""
        return cls(world.all_gather_object(RankProcess.own()))

    @cached_property
    def here(self) -> list[int]:
        """The ranks whose processes this one can look at: those of its host, but for other containers."""
        space = pid_space()
        return [rank for rank, process in enumerate(self.all) if process.pids == space and process.start is not None]

    def gone(self) -> list[int]:
        """Returns the ranks of this host whose processes have ended."""
        return [rank for rank in self.here if process_start(self.all[rank].pid) != self.all[rank].start]

    def sentence(self, ranks: Sequence[int]) -> str:
        """Says that ranks are gone."""
        processes = ", ".join(f"process {self.all[rank].pid} on {self.all[rank].host}" for rank in ranks)
        are = "is" if len(ranks) == 1 else "are"
        return f"{rank_names(ranks)} {are} gone ({processes}), killed or crashed: the other ranks cannot go on"

    def unknown(self, error: BaseException) -> str:
        """Says that a connection is lost, and what of the rank at its other end cannot be known from here."""
        others = sorted(set(range(len(self.all))) - set(self.here))
        live = f"{rank_names(self.here)} on {socket.gethostname()} {'lives' if len(self.here) == 1 else 'live'}"
        which = (
            f"one of {rank_names(others)} or the network to it is gone, and which cannot be known from here"
            if len(others) > 1
            else f"{rank_names(others)} on another host or the network to it is gone"
            if others
            else "it cannot be known which rank closed it"
        )
        return f"a connection between ranks is lost: {live}, so {which} ({one_sentence(error)})"


@contextlib.contextmanager
def naming_lost_ranks(processes: RankProcesses, attempt: Path) -> Iterator[None]:
    """Turns the error of a lost connection into a sentence that names the rank at its other end.

    Raises:
        RankLostError: with what the attempt's outcome says, which the first rank to find out has written.
    """
    try:
        yield
    except Exception as error:
        if len(processes.all) < 2 or not (is_lost_connection(error) or _may_follow_a_loss(error)):
            raise
        ended = _evidence(processes, attempt)
        if ended is None and not is_lost_connection(error):
            raise
        raise ended or RankLostError(processes.unknown(error)) from error


def ended_by(processes: RankProcesses, attempt: Path, *, gone: Sequence[int] = ()) -> RankLostError | None:
    """Returns how the attempt has ended by its outcome, which gets written here where ranks are gone; or None.

    Args:
        gone: ranks whose processes have ended.
    """
    if gone:  # a rank that had written the outcome may be gone as well: its word stands
        write_outcome(attempt, exit_code=ExitCode.RANK_LOST, step=None, reason=processes.sentence(gone))
    outcome = read_outcome(attempt)
    if not outcome:
        return RankLostError(processes.sentence(gone)) if gone else None  # no room for an outcome
    return RankLostError(outcome["reason"], outcome["exit_code"])


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that a rank is not connected to another any more."""
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST):  # DistError is one, too
        return True
    return error is not None and is_lost_connection(error.__cause__)


def _may_follow_a_loss(error: Exception) -> bool:
    """Whether an error is of what ranks do together, and may come of a lost rank or of something else."""
    return isinstance(error, (SaveBrokenError, dist.DistError)) or "gloo/" in str(error)


def _evidence(processes: RankProcesses, attempt: Path) -> RankLostError | None:
    end_s = time.monotonic() + EVIDENCE_S
    while time.monotonic() < end_s:
        if found := ended_by(processes, attempt, gone=processes.gone()):
            return found
        time.sleep(_LOOK_S)
    return None
