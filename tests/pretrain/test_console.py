"""What a run says on the console, on a terminal and off it."""

import math
import re
import signal
import sys
from contextlib import suppress

import pytest
import yaml

from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.reporting.console import RunConsole, changed_learning_rate
from tests.support import program
from tests.support.program import wait_until
from tests.support.whole_runs import changed, run_dir


def test_a_run_says_what_it_starts_how_it_goes_and_where_things_are(run_values, tmp_path):
    """From the start, and from a checkpoint with another learning rate."""
    folder, config = run_dir(run_values), tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run_values))
    said = program.run("train", config).stderr
    gib, number = r"\d+\.\d", r"[\d.e+-]+"
    assert re.search(r"^1 x cpu, no ZeRO, from step 0; scan=", said, re.M)
    assert re.search(rf"^fp32, 0\.0M parameters, {gib} of the host's {gib} GiB in each process; a new run$", said, re.M)
    assert re.search(rf"^step 6/6  loss {number}  lr {number}  grad norm {number}  [\d,]+ tokens/s$", said, re.M)
    assert re.search(rf"^step 3: held-out loss {number} at 32 tokens, {number} at 64 tokens$", said, re.M)
    assert re.search(rf"^saved {folder}/checkpoints/step_00000003 in \d+\.\d s$", said, re.M)
    last = said.strip().splitlines()[-1]
    assert last.startswith("finished at step 6 after ")
    assert f"newest checkpoint {folder}/checkpoints/step_00000006, metrics {folder}/metrics.jsonl; " in last
    assert f"`sambalm report {folder}` shows the run" in last

    config.write_text(yaml.safe_dump(changed(run_values, train={"steps": 4000}, checkpoint={"every_steps": 100_000})))
    log = tmp_path / "log"
    with program.start("train", config, log=log) as running:
        wait_until(lambda: "step 7/4000" in log.read_text(), 60, log.read_text)
        running.send_signal(signal.SIGTERM)
        assert running.wait() == ExitCode.REQUEUE
    said = log.read_text()
    assert f"; goes on from {folder}/checkpoints/step_00000006\nthe learning rate takes another curve: " in said
    assert said.strip().splitlines()[-1].startswith("left after step ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"optimizer": {"weight_decay": 0.0}}, None),
        ({"optimizer": {"peak_lr": 6e-3}}, "0.0033 at step 4, not 0.00165 (optimizer.peak_lr 0.003 -> 0.006)"),
        ({"train": {"steps": 12}}, "0.00292 at step 4, not 0.00165 (train.steps 6 -> 12)"),
        ({"optimizer": {"decay_fraction": 0.5}}, None),  # of another schedule
    ],
)
def test_a_changed_learning_rate_is_told_with_its_cause(changes, said, run_values):
    saved = parse_config(run_values, source="test").model_dump()
    config = parse_config(changed(run_values, **changes), source="test")
    found = changed_learning_rate(saved, config, done_steps=3)
    assert found == (said and f"the learning rate takes another curve: {said}")
    assert changed_learning_rate({}, config, done_steps=3) is None


def test_a_run_that_goes_on_past_its_end_is_told_where_its_learning_rate_had_ended(run_values):
    saved = parse_config(run_values, source="test").model_dump()
    longer = parse_config(changed(run_values, train={"steps": 12}), source="test")
    found = changed_learning_rate(saved, longer, done_steps=6)
    assert found == "the learning rate takes another curve: 0.00188 at step 7, not 0.0003 (train.steps 6 -> 12)"


def record(step, **more):
    return {"step": step, "loss": 2.0, "lr": 1e-3, "grad_norm": math.nan, "tokens_per_second": 1e4, **more}


@pytest.fixture
def clock(monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr("sambalm.pretrain.reporting.console.time.monotonic", lambda: now_s[0])
    return now_s


def test_lines_come_now_and_then_and_tell_the_time_left(clock, tmp_path, capfd):
    console = RunConsole(tmp_path, steps=1000, done_steps=10)
    console.start()
    for step in range(11, 40):
        console.step(record(step))
        clock[0] += 1.0
    console.end(None)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["11/1000", "22/1000", "33/1000"]
    assert lines[1] == "step 22/1000  loss 2.0000  lr 1.00e-03  grad norm nan  10,000 tokens/s  16 min left"
    assert lines[-1].startswith("stopped after step 39 of 1000: no new checkpoint, metrics ")


def test_a_log_on_a_full_disk_ends_nothing(tmp_path, monkeypatch):
    log = open("/dev/full", "w")  # noqa: SIM115  # closing it fails as well
    monkeypatch.setattr(sys, "stderr", log)
    console = RunConsole(tmp_path, steps=2, done_steps=0)
    console.start()
    console.step(record(2, validation_loss_32=2.5))
    console.end(ExitCode.FINISHED)
    with suppress(OSError):
        log.close()


def test_a_narrow_terminal_shows_the_whole_step(monkeypatch, tmp_path, capfd):
    """The bar gives way in 80 columns, and neither the steps nor the numbers of the step."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    console = RunConsole(tmp_path, steps=381_470, done_steps=0)
    console.start()
    console.step({"step": 127_156, "loss": 5.0264, "lr": 3.47e-3, "grad_norm": 0.653, "tokens_per_second": 14_780})
    console.end(ExitCode.REQUEUE)
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capfd.readouterr().err)
    assert re.search(r"127156/381470 loss 5\.0264  lr 3\.47e-03  grad norm 0\.653  14,780 tokens/s -:--:--", shown)


def test_a_terminal_gets_a_bar_and_lines_of_what_happens(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    console = RunConsole(tmp_path / "[run]", steps=3, done_steps=0)
    console.start()
    for step in range(1, 4):
        console.step(record(step, **({"validation_loss_32": 2.5} if step == 2 else {})))
    console.saved(tmp_path / "[run]" / "step_00000003", seconds=1.25)
    console.end(ExitCode.FINISHED)
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capfd.readouterr().err)
    assert "step 2: held-out loss 2.5000 at 32 tokens" in said
    assert f"saved {tmp_path}/[run]/step_00000003 in 1.2 s" in said
    assert "3/3" in said
    assert "loss 2.0000  lr 1.00e-03" in said
    assert "step 3/3" not in said
    assert "finished at step 3 after" in said
