"""What hooks hear of a run, and when: over validations, saves, requests, a stop and an error."""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest

from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.launched_step import Moment
from sambalm.pretrain.reporting.metrics import _drop_after
from sambalm.pretrain.reporting.metrics_file import metrics_line, read_metrics
from tests.support.whole_runs import OF_SAVES, changed
from tests.support.worlds import run_world


def events_on_rank(values: dict, asks: dict[int, str], late: bool) -> list[tuple]:
    """Trains with a hook after all others and one before them; returns what both heard, between launches of steps.

    Args:
        asks: after which steps the run is asked for what: by USR1 to this process, by the stop switch, or by an error.
        late: whether results of a step are read as on a device that works beside its host.
    """
    from sambalm.pretrain import trainer
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.launched_step import LaunchedStep
    from sambalm.pretrain.lifecycle.hooks import Hook
    from sambalm.pretrain.lifecycle.signals import Signals

    events: list[tuple] = []
    config, signals = parse_config(values, source="test"), Signals()
    signals.listen()
    run_dir = Path(config.run.dir)

    class First(Hook):
        def on_start(self, training):
            events.append(("first starts", len(training.chunks)))

        def after_step(self, step):
            events.append(("first", step.number, sorted(step.metrics)))

        def on_end(self, exit_code):
            events.append(("first ends", exit_code))

    class Last(Hook):
        def on_start(self, training):
            events.append(("last starts", len(training.chunks)))

        def after_step(self, step):
            metrics = [name for name in sorted(step.metrics) if not name.startswith(OF_SAVES)]
            events.append(("last", step.number, step.request.name, metrics))
            ask(asks.get(step.number), signals, run_dir)

        def before_save(self, step):
            records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            events.append(("before save", step, records[-1]["step"], "validation_loss_32" in records[-1]))

        def after_save(self, checkpoint):
            events.append(("after save", checkpoint.name, (checkpoint / "state.json").exists()))

        def on_end(self, exit_code):
            events.append(("last ends", exit_code))

    hooks_of, launch = trainer.Trainer._hooks, trainer.Trainer._launch_step

    def more_hooks(self, *args):
        hooks = hooks_of(self, *args)
        hooks.insert(0, First())
        hooks.append(Last())
        return hooks

    def launch_and_tell(self):
        events.append(("launch", self.step + 1))
        return launch(self)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainer.Trainer, "_hooks", more_hooks)
        monkeypatch.setattr(trainer.Trainer, "_launch_step", launch_and_tell)
        monkeypatch.setattr(LaunchedStep, "is_finished", not late)
        try:
            exit_code = trainer.train(config, signals=signals)
        except ZeroDivisionError:
            exit_code = None
    events.append(("exit", exit_code))
    return events


def ask(for_what: str | None, signals, run_dir: Path) -> None:
    if for_what == "save":
        os.kill(os.getpid(), signal.SIGUSR1)
        end_s = time.monotonic() + 10
        while not signals._save:  # a thread reads the signal
            assert time.monotonic() < end_s
            time.sleep(0.01)
    elif for_what == "stop":
        (run_dir / "stop").touch()
    elif for_what == "error":
        raise ZeroDivisionError


@pytest.fixture
def values(run_values):
    return changed(
        run_values,
        train={"steps": 8, "global_batch_tokens": 64},
        validation={"every_steps": 3, "tokens": 64, "length_multiples": [1]},
        checkpoint={"every_steps": 6},
    )


LOSS = ["validation_loss_32"]
STARTS = [("first starts", 1), ("last starts", 1)]


def step(number: int, request: str = "NOTHING", metrics: tuple = (), *, saves: bool = False) -> list[tuple]:
    """What the hooks hear of one step."""
    saved = [("before save", number, number, bool(metrics))] if saves else []
    return [("first", number, []), *saved, ("last", number, request, list(metrics))]


def without_saved(events: list[tuple]) -> list[tuple]:
    """What hooks hear but for the ends of saves: each comes once, complete, before the next save and the run's end."""
    under_way = None
    for event in events:
        if event[0] in ("before save", "last ends"):
            assert under_way is None
            under_way = event[1] if event[0] == "before save" else None
        elif event[0] == "after save":
            assert event == ("after save", f"step_{under_way:08}", True)
            under_way = None
    return [event for event in events if event[0] != "after save"]


def ends(exit_code: int | None) -> list[tuple]:
    return [("last ends", exit_code), ("first ends", exit_code), ("exit", exit_code)]


def test_each_step_is_validated_then_recorded_then_saved(values):
    """As on a CPU, where a step is finished when it is launched: hooks hear of it before the next launch."""
    (events,) = run_world(events_on_rank, values, {1: "save", 6: "stop"}, False, ranks=1)
    assert without_saved(events) == [
        *STARTS,
        *[("launch", 1), *step(1)],
        *[("launch", 2), *step(2, "SAVE", saves=True)],
        *[("launch", 3), *step(3, metrics=LOSS)],
        *[("launch", 4), *step(4)],
        *[("launch", 5), *step(5)],
        *[("launch", 6), *step(6, metrics=LOSS, saves=True)],
        *[("launch", 7), *step(7, "STOP", saves=True)],
        *ends(ExitCode.STOPPED),
    ]


def test_results_are_read_a_step_late_but_for_what_acts_on_the_weights(values):
    """As on a GPU, which works beside its host: a request is found a step late as well, and then acted on at once."""
    values = changed(values, validation={"every_steps": 5}, checkpoint={"every_steps": 1000})
    (events,) = run_world(events_on_rank, values, {1: "save", 5: "stop"}, True, ranks=1)
    assert without_saved(events) == [
        *STARTS,
        *[("launch", 1), ("launch", 2), *step(1)],
        *[("launch", 3), *step(2)],
        *[("launch", 4), *step(3), *step(4, "SAVE", saves=True)],
        *[("launch", 5), *step(5, metrics=LOSS)],
        *[("launch", 6), ("launch", 7), *step(6), *step(7, "STOP", saves=True)],
        *ends(ExitCode.STOPPED),
    ]


def test_the_last_step_is_validated_and_saved_whatever_is_asked_for(values):
    values = changed(values, train={"steps": 2}, checkpoint={"every_steps": 1000})
    (events,) = run_world(events_on_rank, values, {1: "stop"}, True, ranks=1)
    last = [*step(1), *step(2, "NOTHING", metrics=LOSS, saves=True)]
    assert without_saved(events) == [*STARTS, ("launch", 1), ("launch", 2), *last, *ends(ExitCode.FINISHED)]
    records = read_metrics(Path(values["run"]["dir"]))
    assert [record["tokens"] for record in records] == [64, 128]
    # Each step's own tokens over its own time.
    assert [record["tokens_per_second"] * record["step_time_s"] for record in records] == pytest.approx([64, 64])


def test_hooks_end_after_an_error_too(values):
    (events,) = run_world(events_on_rank, values, {1: "error"}, False, ranks=1)
    assert without_saved(events) == [*STARTS, ("launch", 1), *step(1), *ends(None)]


class At:
    """Stands for a CUDA event, which counts milliseconds."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "At") -> float:
        return end.ms - self.ms


def test_a_step_s_time_is_the_device_s_where_there_is_one():
    assert Moment(7.0, At(4000)).seconds_since(Moment(0.0, At(1500))) == 2.5
    assert Moment(7.0, None).seconds_since(Moment(4.5, None)) == 2.5


def test_metrics_are_read_as_they_were_written(tmp_path):
    """What is not finite is null in the file; a line that a kill cut short is none; a resume drops what came later."""
    lines = [metrics_line({"step": step, "loss": loss}) for step, loss in ((1, 2.5), (2, math.inf), (3, -math.inf))]
    assert lines[1] == '{"step": 2, "loss": null}\n'
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + lines[0][:-1])
    first, *others = read_metrics(tmp_path)
    assert first == {"step": 1, "loss": 2.5}
    assert [record["step"] for record in others] == [2, 3]
    assert all(math.isnan(record["loss"]) for record in others)
    _drop_after(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2])
    assert read_metrics(tmp_path / "none") == []
