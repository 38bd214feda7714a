"""How a run is doing, from its folder alone: what `sambalm status` and `sambalm slurm status` show. Needs no torch."""

import json
import re
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from sambalm.pretrain.errors import ExitCode, NoRunError, RunFolderError, not_a_run
from sambalm.pretrain.lifecycle.attempts import ATTEMPT, AttemptRecord, read_attempts
from sambalm.pretrain.lifecycle.lease import LEASE, holder_lives
from sambalm.pretrain.lifecycle.ledger import Account
from sambalm.pretrain.lifecycle.phases import Phase
from sambalm.pretrain.reporting.durations import date, duration
from sambalm.pretrain.reporting.goodput import Goodput, read_goodput
from sambalm.pretrain.reporting.metrics_file import LOSS_AT, plain, read_steps

RECENT_STEPS = 100
ALIVE_S = 60.0  # a lease whose holder lives is younger
PATIENCE_S, PATIENCE_STEPS = 60.0, 10.0  # a step that takes longer than both, in seconds and median steps, hangs
_SHOWN_ATTEMPTS = 10
_ERROR_LINE = re.compile(r"error|exception|killed|SIG[A-Z]+|fault", re.IGNORECASE)
_LOG_TAIL_BYTES = 1 << 16


class State(StrEnum):
    """What a run is at."""

    SUBMITTED = "submitted"  # to Slurm; no attempt has begun
    STARTING = "starting"
    TRAINING = "training"
    HANGING = "hanging"
    FINISHED = "finished"
    LEFT = "left"  # as it was asked to
    FAILED = "failed"
    KILLED = "killed"  # gone without a word


_BESIDE_STEPS: dict[str, str] = {Phase.VALIDATION: "validating", Phase.SAVE: "saving", Phase.LEAVE: "leaving"}

_LEFT = (ExitCode.REQUEUE, ExitCode.STOPPED, ExitCode.INTERRUPTED)


@dataclass(frozen=True)
class AttemptEnd:
    """An attempt as a line of the status."""

    name: str
    host: str | None
    world_size: int | None
    started_s: float  # since the epoch
    ended_s: float | None  # the last sign of it; None while it goes on
    start_step: int | None  # None where it is not known
    step: int | None
    state: State
    reason: str | None


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run."""

    run_dir: str
    state: State
    reason: str | None  # that the last attempt ended for, since when it hangs, or what it does besides steps
    step: int
    steps: int
    tokens: int
    tokens_per_s: float | None
    left_s: float | None  # to train, at the speed of the recent steps and with what came between them so far
    loss: float | None
    grad_norm: float | None
    lr: float | None
    held_out_losses: dict[int, float]  # by length in tokens, the last ones
    training_share: float | None  # of the run's time, spent in steps that count
    wall_s: float | None  # from the first attempt to the last sign of life
    seconds: dict[str, float] | None  # where it went; None without a ledger
    attempts: list[AttemptEnd]
    last_error: str | None

    def shown_state(self) -> str:
        return f"{self.state} ({self.reason})" if self.reason else str(self.state)

    def as_json(self) -> str:
        return json.dumps(plain(asdict(self)), indent=2)


def read_status(run_dir: Path) -> RunStatus:
    """Tells how a run is doing; records that are damaged are left out.

    Raises:
        NoRunError: a folder without an attempt.
        RunFolderError: the last attempt's config is damaged.
    """
    attempts = read_attempts(run_dir)
    if not attempts:
        raise NoRunError(not_a_run(run_dir, kind="a run that has started", lacks=f"attempts/*/{ATTEMPT}"))
    records = read_steps(run_dir)
    last: dict[str, Any] = records[-1] if records else {"step": 0, "tokens": 0}
    steps, recent = _steps(attempts[-1]), records[-RECENT_STEPS:]
    step_s = median(record["step_time_s"] for record in recent) if recent else None
    is_alive = attempts[-1].exit_code is None and _is_alive(run_dir)
    goodput = read_goodput(run_dir, is_alive=is_alive)
    state, reason = _state(attempts[-1], is_alive=is_alive, goodput=goodput, step_s=step_s)
    if state is State.TRAINING and _lease_age_s(run_dir) >= ALIVE_S:
        state, reason = State.HANGING, f"its process has not answered for {duration(_lease_age_s(run_dir))}"
    return RunStatus(
        run_dir=str(run_dir),
        state=state,
        reason=reason,
        step=last["step"],
        steps=steps,
        tokens=last["tokens"],
        tokens_per_s=median(record["tokens_per_second"] for record in recent) if recent else None,
        left_s=(steps - last["step"]) * step_s * _stretch(goodput) if step_s is not None else None,
        loss=last.get("loss"),
        grad_norm=last.get("grad_norm"),
        lr=last.get("lr"),
        held_out_losses=_held_out(records),
        training_share=goodput.productive_share if goodput else _training_share(records, attempts),
        wall_s=goodput.wall_s if goodput else None,
        seconds=goodput.seconds if goodput else None,
        attempts=_ends(attempts, goodput, state=state, reason=reason),
        last_error=next(filter(None, map(_error, reversed(attempts))), None),
    )


def _steps(attempt: AttemptRecord) -> int:
    path = attempt.path / "config.yaml"
    try:
        steps = yaml.safe_load(path.read_text())["train"]["steps"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        steps = None
    if not isinstance(steps, int) or steps <= 0:
        raise RunFolderError(f"{path} does not say how many steps the run takes: it is damaged")
    return steps


def show_status(status: RunStatus) -> str:
    """A run's state, a line for each thing that is known, its time and its attempts."""
    none = "no step yet"
    losses = [f"{status.loss:.4f}"] if status.loss is not None else [none]
    losses += [f"{loss:.4f} held out at {length:,} tokens" for length, loss in sorted(status.held_out_losses.items())]
    left = none if status.left_s is None else duration(status.left_s)
    if status.left_s and status.state is State.TRAINING:
        left += f", until {date(time.time() + status.left_s)}"
    share = none if status.training_share is None else f"{status.training_share:.1%}"
    lines = {
        "state": status.shown_state(),
        "attempts": f"{len(status.attempts):,}",
        "step": f"{status.step:,} of {status.steps:,} ({status.step / status.steps:.1%})",
        "tokens": f"{status.tokens:,}",
        "loss": ", ".join(losses),
        "speed": f"{status.tokens_per_s:,.0f} tokens/s" if status.tokens_per_s else none,
        "left": left,
        "time in training": share,
        "last error": status.last_error or "none",
    }
    shown = [f"{name:<18}{value}" for name, value in lines.items()]
    if status.seconds and status.wall_s:
        shown += ["", f"where {duration(status.wall_s)} went"]
        shown += [
            f"  {account.replace('_', ' '):<16}{seconds / status.wall_s:6.1%}  {duration(seconds)}"
            for account, seconds in status.seconds.items()
            if seconds >= 0.0005 * status.wall_s
        ]
    if not status.attempts:
        return "\n".join(shown)
    shown += ["", "attempts" if len(status.attempts) <= _SHOWN_ATTEMPTS else f"the last {_SHOWN_ATTEMPTS} attempts"]
    return "\n".join([*shown, *map(_attempt_line, status.attempts[-_SHOWN_ATTEMPTS:])])


def _attempt_line(attempt: AttemptEnd) -> str:
    to = f" to {attempt.step}" if attempt.step is not None else ""
    took = duration((attempt.ended_s or time.time()) - attempt.started_s)
    why = f" ({attempt.reason})" if attempt.reason else ""
    steps = f"from {'an unknown step' if attempt.start_step is None else f'step {attempt.start_step}'}{to}"
    return f"  {attempt.name}  {date(attempt.started_s)}, {took}, {steps}: {attempt.state}{why}"


def _state(
    attempt: AttemptRecord, *, is_alive: bool, goodput: Goodput | None, step_s: float | None
) -> tuple[State, str | None]:
    if not is_alive:
        return _end(attempt)
    if goodput is None or goodput.attempts[-1].name != attempt.path.name:
        return State.TRAINING, None
    if goodput.phase == Phase.START_UP:
        return State.STARTING, None
    since_s = goodput.last_progress_s
    is_late = time.time() - since_s > max(PATIENCE_S, PATIENCE_STEPS * (step_s or 0.0))
    if is_late and goodput.phase in (Phase.FETCH, Phase.STEP):
        return State.HANGING, f"since {date(since_s)}, in phase {goodput.phase}"
    return State.TRAINING, _BESIDE_STEPS.get(goodput.phase)


def _end(attempt: AttemptRecord) -> tuple[State, str | None]:
    if attempt.exit_code is None:
        return State.KILLED, None
    if attempt.exit_code == ExitCode.FINISHED:
        return State.FINISHED, None
    return (State.LEFT if attempt.exit_code in _LEFT else State.FAILED), attempt.reason


def _ends(
    attempts: list[AttemptRecord], goodput: Goodput | None, *, state: State, reason: str | None
) -> list[AttemptEnd]:
    times = {attempt.name: attempt for attempt in goodput.attempts} if goodput else {}
    ends = []
    for attempt in attempts:
        is_last, known = attempt is attempts[-1], times.get(attempt.path.name)
        facts = _facts(attempt.path)
        its_state, its_reason = (state, reason) if is_last else _end(attempt)
        goes_on = its_state in (State.STARTING, State.TRAINING, State.HANGING)
        ended_s = attempt.ended_s or (known.end_s if known else attempt.started_s)
        ends.append(
            AttemptEnd(
                name=attempt.path.name,
                host=facts.get("host"),
                world_size=facts.get("world_size"),
                started_s=min(attempt.started_s, known.start_s) if known else attempt.started_s,
                ended_s=None if goes_on else ended_s,
                start_step=attempt.start_step,
                step=attempt.step if attempt.step is not None or known is None else known.last_step,
                state=its_state,
                reason=its_reason,
            )
        )
    return ends


def _facts(attempt: Path) -> dict[str, Any]:
    try:
        facts = json.loads((attempt / ATTEMPT).read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _held_out(records: list[dict[str, Any]]) -> dict[int, float]:
    for record in reversed(records):
        if losses := {int(k.removeprefix(LOSS_AT)): v for k, v in record.items() if k.startswith(LOSS_AT)}:
            return losses
    return {}


def _stretch(goodput: Goodput | None) -> float:
    """How much longer a step takes with its share of validations and saves."""
    if goodput is None:
        return 1.0
    step_s = goodput.seconds[Account.PRODUCTIVE] + goodput.seconds[Account.DATA_WAIT]
    between_s = goodput.seconds[Account.VALIDATION] + goodput.seconds[Account.SAVE]
    return 1.0 + between_s / step_s if step_s > 0 else 1.0


def _training_share(records: list[dict[str, Any]], attempts: list[AttemptRecord]) -> float | None:
    """For a run without a ledger; the time of one that is to go on goes on."""
    if not records:
        return None
    last = attempts[-1]
    end_s = time.time() if last.ended_s is None or last.exit_code == ExitCode.REQUEUE else last.ended_s
    return sum(record["step_time_s"] for record in records) / (end_s - attempts[0].started_s)


def _is_alive(run_dir: Path) -> bool:
    lives = holder_lives(run_dir)
    return _lease_age_s(run_dir) < ALIVE_S if lives is None else lives


def _lease_age_s(run_dir: Path) -> float:
    try:
        return time.time() - (run_dir / LEASE).stat().st_mtime
    except OSError:
        return float("inf")


def _error(attempt: AttemptRecord) -> str | None:
    """What went wrong in an attempt, by its outcome or the last telling line of its logs."""
    if attempt.exit_code in (ExitCode.FINISHED, *_LEFT):
        return None
    if attempt.exit_code is not None:
        return f"{attempt.path.name}: {attempt.reason}"
    for log in sorted(attempt.path.glob("*.log"), key=lambda path: path.stat().st_mtime, reverse=True):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        telling = [line for line in lines if _ERROR_LINE.search(line)]
        if telling:
            return f"{attempt.path.name}, {log.name}: {telling[-1].strip()}"
    return None
