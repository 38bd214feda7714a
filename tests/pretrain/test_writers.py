"""Where metrics go: the real packages of each writer, without a network, and writers that fail in every way."""

import errno
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.reporting import writers
from sambalm.pretrain.reporting.metrics_file import read_metrics
from sambalm.pretrain.reporting.writers import BackgroundWriter, WriterTarget, check_writers, start_writers
from tests.support import program
from tests.support.whole_runs import changed, run_dir, train

CONFIG = {"run": {"dir": "x", "seed": 7}, "train": {"steps": 4}}
RECORDS = [{"loss": 3.0 - step, "grad_norm": 1.0, "validation_loss_32": float("nan")} for step in range(2)]


def write_two_attempts(name: str, folder: Path) -> None:
    for attempt in range(2):
        (writer,) = start_writers([name], WriterTarget(folder, CONFIG, 2 * attempt))
        for step, record in enumerate(RECORDS, start=2 * attempt + 1):
            writer.write(record, step=step)
        writer.close(timeout_s=200)


def test_tensorboard_shows_every_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_two_attempts("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 2.0), (3, 3.0), (4, 2.0)]


def test_wandb_goes_on_with_its_run_offline(tmp_path, monkeypatch, capfd):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_two_attempts("wandb", tmp_path)
    wandb.teardown()  # as a process does at its end: wandb's own may still write a moment after a run has finished
    assert "the run goes on, but" not in capfd.readouterr().err
    found = [(record["step"], record["loss"]) for record in wandb_history(tmp_path)]
    assert found == [(1, 3.0), (2, 2.0), (3, 3.0), (4, 2.0)]
    assert all("validation_loss_32" in record for record in wandb_history(tmp_path))


def wandb_history(folder: Path) -> list[dict[str, float]]:
    """What W&B would upload of a run's attempts, by its own protocol, oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    identity = (folder / "wandb_id").read_text().strip()
    history = []
    for path in sorted(folder.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb")):
        for content in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            if items := record.history.item:
                history.append({item.nested_key[0] if item.nested_key else item.key: item for item in items})
    return [{name: json.loads(item.value_json) for name, item in items.items()} for items in history]


def log_records(content: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format, in blocks of 32 KiB, after W&B's 7 bytes."""
    place, record = 7, b""
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last of its pieces
            yield record
            record = b""


def test_mlflow_goes_on_with_its_run_in_files(tmp_path, monkeypatch, capfd):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_two_attempts("mlflow", tmp_path)
    assert "the run goes on, but" not in capfd.readouterr().err
    client, identity = MlflowClient((tmp_path / "mlruns").as_uri()), (tmp_path / "mlflow_id").read_text().strip()
    history = client.get_metric_history(identity, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 3.0), (2, 2.0), (3, 3.0), (4, 2.0)]
    run = client.get_run(identity)
    assert (run.info.status, run.data.params["train.steps"]) == ("FINISHED", "4")


def test_a_writer_that_is_not_installed_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr(writers.WandbWriter, "package", "no_such_package")
    check_writers(["tensorboard"])
    with pytest.raises(ConfigError, match=r"names wandb, which is not installed: install sambalm\[wandb\]"):
        check_writers(["tensorboard", "wandb"])


class Failing:
    """Fails where it is told to, and remembers the rest."""

    def __init__(self, where: str, steps: list[int]) -> None:
        if where == "make":
            raise OSError(errno.ENOSPC, "No space left on device")
        self.where, self.steps = where, steps

    def write(self, record, *, step):
        if self.where == "write" and step < 3:
            raise ConnectionError("the network\nis gone")
        self.steps.append(step)

    def close(self):
        if self.where == "close":
            raise RuntimeError("no")


@pytest.mark.parametrize(
    ("where", "kept"), [("make", []), ("write", [3, 4]), ("close", [1, 2, 3, 4]), ("", [1, 2, 3, 4])]
)
def test_a_writer_that_fails_is_told_of_once_and_tried_again(where, kept, capfd):
    steps: list[int] = []
    made: list[int] = []
    writer = BackgroundWriter("X", lambda: (made.append(1), Failing(where, steps))[1], retry_s=0.0)
    for step in range(1, 5):
        writer.write({"loss": 1.0}, step=step)
    writer.close()
    assert steps == kept
    assert len(made) == {"make": 4, "write": 3}.get(where, 1)  # anew after each failure
    assert capfd.readouterr().err.count("the run goes on, but X does not get all of its metrics: ") == bool(where)


def test_a_writer_that_is_named_twice_writes_once(tmp_path):
    (writer,) = start_writers(["tensorboard", "tensorboard"], WriterTarget(tmp_path, CONFIG, 0))
    writer.close()


def test_a_writer_that_hangs_holds_nothing_up(capfd, monkeypatch):
    monkeypatch.setattr(writers, "_QUEUED_RECORDS", 10)

    class Hanging(Failing):
        def write(self, record, *, step):
            time.sleep(60)

    writer = BackgroundWriter("X", lambda: Hanging("", []))
    start_s = time.monotonic()
    for step in range(100):
        writer.write({}, step=step)
    writer.close(timeout_s=0.2)
    assert time.monotonic() - start_s < 5
    assert "it takes longer than training" in capfd.readouterr().err


def test_a_run_writes_where_its_config_says(run_values):
    train(changed(run_values, reporting={"writers": []}))
    assert (run_dir(run_values) / "metrics.jsonl").exists()
    assert not (run_dir(run_values) / "tensorboard").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_training_is_read_back_by_each_packages_own_reader(name, run_values, tmp_path, monkeypatch):
    """Every finite metric of every step, of the program's two attempts."""
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    values = changed(run_values, reporting={"writers": [name]})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    for steps in (3, 6):
        finished = program.run("train", tmp_path / "run.yaml", f"train.steps={steps}")
        assert finished.returncode == 0, finished.stderr
        assert "does not get all of its metrics" not in finished.stderr
    expected = {(r["step"], key): value for r in read_metrics(run_dir(values)) for key, value in r.items()}
    assert {step for step, _ in expected} == set(range(1, 7))
    found = {"wandb": from_wandb, "mlflow": from_mlflow}[name](run_dir(values), {key for _, key in expected} - {"step"})
    assert found == {key: value for key, value in expected.items() if key[1] != "step"}


def from_wandb(folder: Path, names: set[str]) -> dict[tuple[int, str], float]:
    return {(record["step"], name): record[name] for record in wandb_history(folder) for name in names & record.keys()}


def from_mlflow(folder: Path, names: set[str]) -> dict[tuple[int, str], float]:
    from mlflow.tracking import MlflowClient

    client, identity = MlflowClient((folder / "mlruns").as_uri()), (folder / "mlflow_id").read_text().strip()
    return {(m.step, name): m.value for name in names for m in client.get_metric_history(identity, name)}
