"""Where the metrics of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

To add one, write a class with `write` and `close` that imports its package when it is made, and give it a line in
`WRITERS`. Each works in a thread of its own, so that none holds training up, and none that fails stops it.
"""

import contextlib
import functools
import importlib.util
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sambalm.pretrain.errors import ConfigError, print_warning

RETRY_S, CLOSE_S = 60.0, 30.0
_QUEUED_RECORDS = 10_000


@dataclass(frozen=True)
class WriterTarget:
    """What a writer is made for."""

    run_dir: Path
    config: Mapping[str, Any]  # of the run, as plain values
    done_steps: int  # those that the attempt goes on from


class Writer(Protocol):
    """Takes the metrics of steps somewhere. Any method may raise anything: the run goes on."""

    def write(self, record: Mapping[str, float], *, step: int) -> None:
        """Writes the metrics of a step by name; some may not be finite."""

    def close(self) -> None:
        """Sends what is left."""


class TensorBoardWriter:
    """Event files in RUN/tensorboard. What an earlier attempt wrote of later steps is not shown."""

    package = "tensorboard"

    def __init__(self, target: WriterTarget) -> None:
        from sambalm.pretrain.reporting.tensorboard import TensorBoardFile

        self._board = TensorBoardFile(target.run_dir / "tensorboard", first_step=target.done_steps + 1)

    def write(self, record: Mapping[str, float], *, step: int) -> None:
        self._board.add_scalars(record, step=step)

    def close(self) -> None:
        self._board.close()


class WandbWriter:
    """A run of Weights & Biases, which later attempts go on with.

    Its own environment variables set the rest: WANDB_PROJECT (default: sambalm), WANDB_MODE=offline, WANDB_BASE_URL.
    """

    package = "wandb"

    def __init__(self, target: WriterTarget) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "sambalm"),
            name=target.run_dir.resolve().name,
            id=_remembered(target.run_dir / "wandb_id", os.urandom(4).hex),
            resume="allow",
            dir=str(target.run_dir),
            config=dict(target.config),
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, x_disable_meta=True, x_disable_stats=True
            ),
        )
        self._run.define_metric("*", step_metric="step")  # wandb's own count cannot go back to a checkpoint

    def write(self, record: Mapping[str, float], *, step: int) -> None:
        self._run.log({**record, "step": step})

    def close(self) -> None:
        self._run.finish()


class MlflowWriter:
    """A run of MLflow, which later attempts go on with.

    Its own environment variables say where: MLFLOW_TRACKING_URI (default: RUN/mlruns) and MLFLOW_EXPERIMENT_NAME
    (default: sambalm).
    """

    package = "mlflow"
    _SEND_EVERY_S, _SENT_METRICS = 5.0, 1000  # the most that the server takes at once

    def __init__(self, target: WriterTarget) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (target.run_dir.resolve() / "mlruns").as_uri()
        self._client = MlflowClient(uri)
        self._id = _remembered(target.run_dir / "mlflow_id", lambda: self._new_run(target.run_dir.resolve().name))
        params = [Param(name, str(value)[:500]) for name, value in _flat(target.config)]
        with contextlib.suppress(Exception):  # a changed key of a resumed run, which MLflow refuses
            self._client.log_batch(self._id, params=params[:100])
        self._pending: list[Any] = []
        self._sent_s = time.monotonic()

    def _new_run(self, name: str) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "sambalm")
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        return self._client.create_run(number, run_name=name).info.run_id

    def write(self, record: Mapping[str, float], *, step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._pending += [
            Metric(re.sub(r"[^\w\-. :/]", "_", name), value, now_ms, step)
            for name, value in record.items()
            if math.isfinite(value)
        ]
        if time.monotonic() - self._sent_s > self._SEND_EVERY_S or len(self._pending) > self._SENT_METRICS // 2:
            self._send()

    def close(self) -> None:
        self._send()
        self._client.set_terminated(self._id)

    def _send(self) -> None:
        while self._pending:
            self._client.log_batch(self._id, metrics=self._pending[: self._SENT_METRICS])
            del self._pending[: self._SENT_METRICS]
        self._sent_s = time.monotonic()


WRITERS: dict[str, Any] = {"tensorboard": TensorBoardWriter, "wandb": WandbWriter, "mlflow": MlflowWriter}


def check_writers(names: Sequence[str]) -> None:
    """Raises ConfigError for a writer whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(WRITERS[name].package) is None:
            raise ConfigError(
                f"reporting.writers names {name}, which is not installed: install sambalm[{name}], or leave it out"
            )


class BackgroundWriter:
    """A writer in a thread. One that fails is told of once, and made anew after a while.

    Args:
        name: for the warning.
        make: makes the writer, in the thread.
    """

    def __init__(self, name: str, make: Callable[[], Writer], *, retry_s: float = RETRY_S) -> None:
        self._name, self._make, self._retry_s = name, make, retry_s
        self._records: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(_QUEUED_RECORDS)
        self._writer: Writer | None = None
        self._made_s, self._has_warned = float("-inf"), False
        self._thread = threading.Thread(target=self._work, name=f"writer {name}", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, float], *, step: int) -> None:
        """Hands the metrics of a step over, and never waits."""
        try:
            self._records.put_nowait((step, record))
        except queue.Full:
            self._warn("it takes longer than training")

    def close(self, *, timeout_s: float = CLOSE_S) -> None:
        """Waits for what is left, but not for ever."""
        end_s = time.monotonic() + timeout_s
        try:
            self._records.put(None, timeout=timeout_s)
        except queue.Full:
            return self._warn("it takes longer than training")
        self._thread.join(max(0.0, end_s - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"it did not end within {timeout_s:g} s")

    def _work(self) -> None:
        while item := self._records.get():
            step, record = item
            try:
                if self._writer is None and time.monotonic() - self._made_s > self._retry_s:
                    self._made_s = time.monotonic()
                    self._writer = self._make()
                if self._writer:
                    self._writer.write(record, step=step)
            except Exception as error:  # of a package that is not ours
                self._fail(error)
        try:
            if self._writer:
                self._writer.close()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._warn(" ".join(f"{type(error).__name__}: {error}".split()))
        broken, self._writer = self._writer, None
        with contextlib.suppress(Exception):
            if broken:
                broken.close()

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            print_warning(f"the run goes on, but {self._name} does not get all of its metrics: {reason}")
        self._has_warned = True


def start_writers(names: Sequence[str], target: WriterTarget) -> list[BackgroundWriter]:
    """Starts a thread for each writer, whose packages `check_writers` has found."""
    return [BackgroundWriter(name, functools.partial(WRITERS[name], target)) for name in dict.fromkeys(names)]


def _remembered(path: Path, make: Callable[[], str]) -> str:
    """A name that a run keeps over its attempts."""
    if not path.exists():
        path.write_text(make() + "\n")
    return path.read_text().strip()


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested keys as section.key."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return found
