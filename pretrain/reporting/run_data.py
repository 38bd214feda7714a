"""What a report knows of a run, read from its folder."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sambalm.pretrain.checkpointing.initial_weights import STARTED_FROM, described
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.errors import ConfigError, NoRunError
from sambalm.pretrain.lifecycle.attempts import ATTEMPT
from sambalm.pretrain.reporting.durations import duration
from sambalm.pretrain.reporting.goodput import read_goodput
from sambalm.pretrain.reporting.metrics_file import read_steps
from sambalm.pretrain.reporting.phases import phase_rows
from sambalm.pretrain.reporting.status import RunStatus, State, read_status

_SHOWN_PACKAGES = ("sambalm", "torch", "megatron-core", "deepspeed", "transformers", "numpy", "safetensors")
_RUNNING = (State.STARTING, State.TRAINING, State.HANGING)


@dataclass(frozen=True)
class HappenedEvent:
    """Something that happened to a run."""

    at_s: float  # since the epoch
    what: str
    is_bad: bool = False


@dataclass(frozen=True)
class RunData:
    """A run as its report shows it."""

    name: str  # unlike those of the runs beside it
    path: Path
    records: Sequence[dict[str, Any]]  # of metrics.jsonl
    status: RunStatus | None  # None for a folder without attempts, of an older version
    config: dict[str, Any]  # by section.key
    environment: dict[str, str]
    data: Sequence[dict[str, Any]]  # of its sources, as the newest checkpoint has them
    started_from: str | None  # the given weights that it began with, in words; None where it drew them
    events: Sequence[HappenedEvent]
    phases: Sequence[dict[str, str]] = ()  # by column; none for a run without data.phases


def read_runs(run_dirs: Sequence[Path]) -> list[RunData]:
    """Reads runs and names them apart."""
    names = [path.resolve().name for path in run_dirs]
    if len(set(names)) < len(names):
        names = [str(path) for path in run_dirs]
    return [_read_run(path, name) for path, name in zip(run_dirs, names, strict=True)]


def _read_run(path: Path, name: str) -> RunData:
    try:
        status: RunStatus | None = read_status(path)
    except NoRunError:
        status = None
    state = _newest_state(path)
    data = state.get("data")
    attempt = path / "attempts" / status.attempts[-1].name if status else path
    return RunData(
        name=name,
        path=path,
        records=read_steps(path),
        status=status,
        config=_config(path / "config.yaml"),
        environment=_environment(attempt) if status else {},
        data=list(data.get("sources", [])) if isinstance(data, dict) else [],
        started_from=_described(state.get(STARTED_FROM)),
        events=_events(path, status) if status else [],
        phases=_phases(path / "config.yaml"),
    )


def _config(path: Path) -> dict[str, Any]:
    """Empty for a file that is damaged or gone."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return _flat(values) if isinstance(values, dict) else {}


def _phases(path: Path) -> list[dict[str, str]]:
    """None for a file that is damaged, gone or of another version."""
    try:
        return phase_rows(load_config(path))
    except ConfigError:
        return []


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as section.key."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _environment(attempt: Path) -> dict[str, str]:
    """Where and with what the last attempt ran."""
    facts = _json(attempt / ATTEMPT)
    shown = {
        "host": facts.get("host"),
        "processes": facts.get("world_size"),
        "Slurm job": facts.get("slurm_job"),
        "Slurm nodes": facts.get("slurm_nodes"),
        "revision": facts.get("revision"),
        "code changed": "yes, see code.diff" if facts.get("changed") else None,
    }
    try:
        lines = (attempt / "packages.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    packages = dict(line.split("==", 1) for line in lines if "==" in line)
    shown |= {name: packages.get(name) for name in _SHOWN_PACKAGES}
    return {name: str(value) for name, value in shown.items() if value is not None}


def _newest_state(run_dir: Path) -> dict[str, Any]:
    """Empty for a run without a checkpoint that can be read."""
    paths = sorted(run_dir.glob("checkpoints/step_*/state.json"), reverse=True)
    return next(filter(None, map(_json, paths)), {})


def _described(record: Any) -> str | None:
    try:
        return described(record) if record else None
    except (KeyError, TypeError):  # of a file that is damaged
        return None


def _events(run_dir: Path, status: RunStatus) -> list[HappenedEvent]:
    """Starts and ends of attempts, and what the ledger tells of between them; neighbours of a kind are one."""
    events = []
    for attempt in status.attempts:
        since = "" if attempt.start_step is None else f" from step {attempt.start_step}"
        events.append(HappenedEvent(attempt.started_s, f"attempt {attempt.name} starts{since}"))
        if attempt.ended_s is not None:
            took = duration(attempt.ended_s - attempt.started_s)
            at = f" at step {attempt.step}" if attempt.step is not None else ""
            why = f": {attempt.reason}" if attempt.reason else ""
            what = f"attempt {attempt.name} {attempt.state}{at} after {took}{why}"
            events.append(HappenedEvent(attempt.ended_s, what, attempt.state in (State.FAILED, State.KILLED)))
    goodput = read_goodput(run_dir, is_alive=status.state in _RUNNING)
    first: int | None = None
    told = goodput.events if goodput else []
    for event, following in itertools.zip_longest(told, told[1:]):
        if event.what in ("saved", "skipped"):
            first = event.step if first is None else first
            if following and following.what == event.what:
                continue
            steps = f"step {event.step}" if first == event.step else f"steps {first} to {event.step}"
            events.append(HappenedEvent(event.at_s, f"{steps} {event.what}", event.what == "skipped"))
            first = None
        elif event.what == "rollback":
            events.append(HappenedEvent(event.at_s, f"rolled back to step {event.step}", True))
        elif event.what == "hanging":
            events.append(HappenedEvent(event.at_s, "nothing moved any more", True))
    return sorted(events, key=lambda event: event.at_s)
