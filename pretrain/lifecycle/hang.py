"""What ranks tell each other when one is past a limit, and whose fault it is.

runs/NAME/attempts/ATTEMPT/hang/       there only while a rank is past a limit, and after a hang
    rank_00003.json        what the rank is at, rewritten while it answers
    rank_00003.txt         the stacks of all its threads
    nccl_trace_rank_3      NCCL's flight recorder on a GPU, for `torchfrtrace`
    verdict.json           the sentence that the first rank to leave has come to, for all
"""

import contextlib
import json
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sambalm.pretrain.lifecycle.phases import Mark, Phase

HANG, VERDICT = "hang", "verdict.json"
_ORDER = {phase: number for number, phase in enumerate(Phase)} | {Phase.FIRST_STEP: list(Phase).index(Phase.STEP)}


@dataclass(frozen=True)
class Position:
    """Where a rank says it is."""

    phase: Phase
    step: int
    since_s: float  # since the epoch
    limit_s: float | None
    overdue: bool
    is_beside: bool  # of a thread beside the one that trains, which nothing waits for

    @classmethod
    def of(cls, mark: Mark, *, limit_s: float | None, overdue: bool, is_beside: bool) -> "Position":
        return cls(mark.phase, mark.step, mark.since_s, limit_s=limit_s, overdue=overdue, is_beside=is_beside)

    @property
    def progress(self) -> tuple[bool, int, int]:
        """Orders ranks by how far they have come."""
        return self.phase is Phase.LEAVE, self.step, _ORDER[self.phase]


def judge(positions: Mapping[int, Position], *, silent: Collection[int]) -> str | None:
    """Says which ranks hang and where, or None while nobody does.

    The ranks that have come least far are those that the others wait for, so only their limit counts: a rank that waits
    within a step for another that still fetches is no hang before the fetch is one.

    Args:
        positions: of the ranks that answer.
        silent: ranks that should have answered by now.
    """
    overdue = {rank: position for rank, position in positions.items() if position.overdue}
    if not overdue:
        return None
    beside = {rank: position for rank, position in overdue.items() if position.is_beside}
    if beside:
        return _sentence(beside)
    if silent:
        first = min(overdue.values(), key=lambda position: position.since_s)
        does = "rank does not" if len(silent) == 1 else "ranks do not"
        return (
            f"{rank_names(silent)}: the {does} answer; others have waited in phase {first.phase} of step {first.step} "
            f"since {_clock(first.since_s)}"
        )
    least = min(position.progress for position in positions.values())
    late = {rank: position for rank, position in positions.items() if position.progress == least}
    if not any(position.overdue for position in late.values()):
        return None
    return _sentence(late)


def _sentence(late: Mapping[int, Position]) -> str:
    first = min((position for position in late.values() if position.overdue), key=lambda position: position.since_s)
    of = f" of step {first.step}" if first.step else ""
    limit = "" if first.limit_s is None else f", past watchdog.{first.phase}_s {first.limit_s:g}"
    return f"{rank_names(late)}: hanging in phase {first.phase}{of} since {_clock(first.since_s)}{limit}"


def rank_names(ranks: Collection[int]) -> str:
    """Names ranks, runs of neighbours by their ends."""
    ends: list[list[int]] = []
    for rank in sorted(ranks):
        if ends and ends[-1][1] == rank - 1:
            ends[-1][1] = rank
        else:
            ends.append([rank, rank])
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _clock(since_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since_s))


class Board:
    """The folder where ranks say what they are at. A rank is silent once its file has stayed the same for a while.

    Args:
        grace_s: how long a rank may take to answer.
    """

    def __init__(self, attempt: Path, *, rank: int, ranks: int, grace_s: float) -> None:
        self.folder, self._rank, self._ranks, self._grace_s = attempt / HANG, rank, ranks, grace_s
        self._beat = 0
        self._seen: dict[int, tuple[str, float]] = {}  # text of each rank's file, and when it came

    def is_up(self) -> bool:
        """Whether a rank is past a limit."""
        return self.folder.exists()

    @property
    def has_answered(self) -> bool:
        return self._beat > 0

    def answer(self, position: Position) -> None:
        """Writes where this rank is."""
        if self._beat == 0:
            self._seen = {rank: ("", time.monotonic()) for rank in range(self._ranks)}
        self._beat += 1
        self.folder.mkdir(exist_ok=True)
        _replace(self._path(self._rank), asdict(position) | {"beat": self._beat})

    def read(self) -> tuple[dict[int, Position], list[int]]:
        """Where the ranks are that have answered lately, and those that should have by now; the others still may."""
        now_s, positions = time.monotonic(), {}
        for rank, (text, since_s) in self._seen.items():
            found = _text(self._path(rank))
            if found and found != text:
                self._seen[rank] = found, since_s = found, now_s
            if found and now_s - since_s <= self._grace_s:
                values = json.loads(found)
                del values["beat"]
                positions[rank] = Position(**values | {"phase": Phase(values["phase"])})
        silent = [rank for rank, (_, since_s) in self._seen.items() if now_s - since_s > self._grace_s]
        return positions, silent

    def withdraw(self) -> None:
        """Nobody is past a limit any more."""
        self._beat = 0
        for path in self.own_files():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # the last one does

    def own_files(self) -> list[Path]:
        return [self._path(self._rank), self.stacks, self.nccl_trace]

    @property
    def stacks(self) -> Path:
        return self._path(self._rank).with_suffix(".txt")

    @property
    def nccl_trace(self) -> Path:
        return self.folder / f"nccl_trace_rank_{self._rank}"

    def settle(self, reason: str) -> str:
        """Writes a sentence for all ranks; returns it, or the one that another rank has written before."""
        draft = self.folder / f".{VERDICT}.{self._rank}"
        draft.write_text(json.dumps({"reason": reason}))
        with contextlib.suppress(FileExistsError):
            os.link(draft, self.folder / VERDICT)
        draft.unlink()
        return self.settled() or reason

    def settled(self) -> str | None:
        text = _text(self.folder / VERDICT)
        return json.loads(text)["reason"] if text else None

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05}.json"


def _replace(path: Path, values: dict[str, Any]) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(values))
    os.replace(draft, path)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
