"""Saves that go on while a run trains: what they cost it, what a slow or failing disk does, and how a run leaves."""

import collections
import contextlib
import errno
import itertools
import json
import os
import resource
import signal
import sys
import time
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint import HuggingFaceStorageReader

from sambalm.parallel.rectangles import rectangles
from sambalm.pretrain.checkpointing import format as format_of_checkpoints
from sambalm.pretrain.checkpointing import write
from sambalm.pretrain.checkpointing.format import (
    StoredSlice,
    checkpoint_folder,
    checkpoint_folders,
    checksums,
    newest_checkpoint,
    open_checkpoint,
)
from sambalm.pretrain.checkpointing.read import WantedSlice, _reads
from sambalm.pretrain.checkpointing.shard_file import write_shards
from sambalm.pretrain.checkpointing.snapshot import SavedSlice
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import CheckpointError, ExitCode, SaveBrokenError, print_line, print_warning
from sambalm.pretrain.lifecycle.guards import Guards
from sambalm.pretrain.reporting.appended_file import AppendedFile
from sambalm.pretrain.reporting.metrics_file import read_metrics
from tests.support import program
from tests.support.whole_runs import changed, run_dir, train, without_measured
from tests.support.worlds import run_world

SLOW_S = 1.0


@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 1, 4), (2, 3, 4)])
def test_rectangles_make_up_a_range_in_its_order(shape):
    whole = torch.arange(torch.Size(shape).numel())
    for start, stop in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        found = rectangles(shape, start=start, stop=stop)
        parts = [
            whole.view(shape)[tuple(slice(o, o + n) for o, n in zip(r.offsets, r.sizes, strict=True))] for r in found
        ]
        assert torch.cat([part.flatten() for part in parts] or [whole[:0]]).tolist() == list(range(start, stop))
        assert [int(part.flatten()[0]) for part in parts] == [rectangle.start for rectangle in found]
        assert len(found) <= 2 * sum(size > 1 for size in shape[1:]) + 1


def test_shards_are_what_other_readers_take_and_have_the_checksums_that_were_computed(tmp_path):
    """Three rectangles of one tensor lie in three files; one is a view with gaps of something larger."""
    whole = torch.randn(9, 50)
    wide = torch.cat([whole, torch.full((9, 7), torch.nan)], dim=1)
    pieces = [
        SavedSlice("model.a", (0, 30), whole[0:1, 30:].clone()),
        SavedSlice("model.a", (1, 0), wide[1:8, :50]),
        SavedSlice("model.a", (8, 0), whole[8:, :20].clone()),
        SavedSlice("model.b", (0,), whole[0, :30].clone()),
    ]
    written = write_shards(tmp_path, pieces, rank=4)
    assert sorted(written) == [f"shard-00005-{number}.safetensors" for number in range(3)]
    assert written == checksums(tmp_path, list(written))
    rest = [SavedSlice("model.a", (0, 0), whole[0:1, :30].clone()), SavedSlice("model.a", (8, 20), whole[8:, 20:])]
    assert len(write_shards(tmp_path, rest, rank=0)) == 2
    read = {"model.a": torch.empty(9, 50), "model.b": torch.empty(30)}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert torch.equal(read["model.a"], whole)
    assert torch.equal(read["model.b"], whole[0, :30])
    assert write_shards(tmp_path, [], rank=9) == {}


def test_zeros_take_no_disk(tmp_path):
    some = torch.zeros(3 << 20)
    some[-1] = 1.0
    tensors = {"model.a": torch.zeros(5 << 20), "model.b": some, "model.c": torch.zeros(9 << 20)}
    tensors["model.d"] = torch.zeros(7)  # which a file ends with, so that a hole is its end
    written = write_shards(tmp_path, [SavedSlice(name, (0,), tensor) for name, tensor in tensors.items()], rank=0)
    assert written == checksums(tmp_path, list(written))
    (path,) = tmp_path.iterdir()
    assert path.stat().st_blocks * 512 < 4 * (4 << 20) < path.stat().st_size
    read = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_blocks_of_a_large_view_are_written_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr("sambalm.pretrain.checkpointing.shard_file._BLOCK_BYTES", 64)
    whole = torch.randn(20, 30)
    pieces = [SavedSlice("model.a", (0, 0), whole[:, :11]), SavedSlice("model.b", (0, 0), whole)]
    assert write_shards(tmp_path, pieces, rank=0) == checksums(tmp_path, ["shard-00001-0.safetensors"])
    read = {"model.a": torch.empty(20, 11), "model.b": torch.empty(20, 30)}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert torch.equal(read["model.a"], whole[:, :11])
    assert torch.equal(read["model.b"], whole)


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_replicas_write_the_shares_that_they_hold(stage, run_values):
    values = changed(run_values, parallel={"zero_stage": stage}, train={"steps": 1}, checkpoint={"every_steps": 9})
    train(values, ranks=2)
    (folder,) = checkpoint_folders(run_dir(values))
    sizes = [sum(path.stat().st_size for path in folder.glob(f"shard-0000{rank}-*")) for rank in (1, 2)]
    assert min(sizes) > 0.4 * sum(sizes)
    assert sum(path.stat().st_size for path in folder.glob("shard-*-[12].safetensors")) < 0.1 * sum(sizes)


def committed(tmp_path, monkeypatch, *, fails: str) -> list[str]:
    """Commits the checkpoint of step 2 where an operation fails; returns the checkpoints that are there then."""
    folders = [checkpoint_folder(tmp_path, step) for step in (1, 2)]
    partial = folders[1].with_name(".step_00000002.partial")
    for folder in (folders[0], partial):
        folder.mkdir(parents=True)

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    module, name = {"os.replace": (os, "replace"), "sync": (format_of_checkpoints, "sync")}[fails]
    monkeypatch.setattr(module, name, fail)
    write._commit(partial, folders[1])
    return [folder.name for folder in checkpoint_folders(tmp_path)]


def test_a_checkpoint_that_has_its_name_counts_whatever_fails_after_it(tmp_path, monkeypatch, capsys):
    assert committed(tmp_path / "a", monkeypatch, fails="sync") == ["step_00000001", "step_00000002"]
    assert "step_00000002 is complete, but a power loss may undo it: [Errno 5]" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(OSError, match="Input/output"):
        committed(tmp_path / "b", monkeypatch, fails="os.replace")
    assert [folder.name for folder in checkpoint_folders(tmp_path / "b")] == ["step_00000001"]


def test_memory_of_copies_is_given_back_once_no_save_reads_it(run_values):
    writer = write.CheckpointWriter(
        parse_config(run_values, source="test"), world=SimpleNamespace(of_save_thread=None), data={}
    )
    released: list[bool] = []
    writer._snapshot = SimpleNamespace(release=lambda: released.append(True))
    writer._save = Future()
    assert (writer.under_way, writer.is_done, writer.is_broken) == (True, False, False)
    with pytest.raises(TimeoutError):
        writer.result(timeout_s=0)
    writer.close()
    assert not released
    writer._save.set_exception(RuntimeError("connection reset"))
    assert (writer.under_way, writer.is_done, writer.is_broken) == (True, True, True)
    with pytest.raises(SaveBrokenError, match=r"lost each other .*: RuntimeError: connection reset"):
        writer.result()
    assert (writer.under_way, writer.is_done, writer.is_broken) == (False, True, False)
    writer.close()
    assert released == [True]


def slow(monkeypatch, seconds=SLOW_S):
    """Has every rank's tensors take some time to be written."""
    real = write.write_shards

    def write_late(*args, **named):
        time.sleep(seconds)
        return real(*args, **named)

    monkeypatch.setattr(write, "write_shards", write_late)


def train_past_saves(values, seen_steps):
    """Trains while the save of each step ends only once metrics.jsonl has a later one; others end at once.

    Returns:
        The steps whose state was looked at before a save.
    """
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.trainer import train

    start, write_shards, unfit_to_save = write.CheckpointWriter.start, write.write_shards, Guards.unfit_to_save
    saved: list[int] = []
    examined: list[int] = []

    def note_and_examine(self, **named):
        examined.append(max(step.number for step in self.window))
        return unfit_to_save(self, **named)

    def start_and_note(self, chunks, *, step, **named):
        saved.append(step)
        start(self, chunks, step=step, **named)

    def write_late(*args, **named):
        later = seen_steps.get(saved[-1], 0)
        program.wait_until(lambda: len(read_metrics(run_dir(values))) >= later, 60)
        return write_shards(*args, **named)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(write.CheckpointWriter, "start", start_and_note)
        monkeypatch.setattr(write, "write_shards", write_late)
        monkeypatch.setattr(Guards, "unfit_to_save", note_and_examine)
        train(parse_config(values, source="test"))
    return examined


def test_a_run_trains_while_it_saves(run_values, tmp_path):
    """With the bits of a run whose saves are over at once, in its losses and in each checkpoint."""
    values = changed(run_values, parallel={"zero_stage": 1}, train={"steps": 8}, checkpoint={"every_steps": 2})
    clean = changed(values, run={"dir": str(tmp_path / "clean")})
    expected = train(clean, ranks=2)
    run_world(train_past_saves, values, {2: 3, 4: 5, 6: 7}, ranks=2)  # the next turn waits for the save before
    records = read_metrics(run_dir(values))
    assert [without_measured(record) for record in records] == expected
    assert next(record["checkpoint_step"] for record in records if "checkpoint_step" in record) == 2
    assert [open_checkpoint(folder).step for folder in checkpoint_folders(run_dir(values))] == [2, 4, 6, 8]
    for slowly, at_once in zip(*(checkpoint_folders(run_dir(v)) for v in (values, clean)), strict=True):
        for file in slowly.glob("*.safetensors"):
            assert file.read_bytes() == (at_once / file.name).read_bytes()


def test_a_turn_is_skipped_where_the_config_says_so(run_values):
    section = {"every_steps": 2, "when_busy": "skip"}
    values = changed(run_values, parallel={"zero_stage": 1}, train={"steps": 9}, checkpoint=section)
    assert run_world(train_past_saves, values, {2: 8}, ranks=2) == [[2, 9]] * 2
    assert [open_checkpoint(folder).step for folder in checkpoint_folders(run_dir(values))] == [2, 9]
    skips = [record["checkpoint_skips"] for record in read_metrics(run_dir(values)) if "checkpoint_skips" in record]
    assert skips == [1, 2, 3]


@contextlib.contextmanager
def errors_in_a_pipe():
    """Yields a list that gets what is written to stderr, also where files cannot grow."""
    reader, writer = os.pipe()
    kept, found = os.dup(2), []
    os.dup2(writer, 2)
    os.close(writer)
    try:
        yield found
    finally:
        os.dup2(kept, 2)
        with open(reader, errors="replace") as file:
            found.extend(file.read().splitlines())


def train_with_limits(values, limits):
    """Trains while the last rank can write no file larger than a limit, in bytes by step; returns what it printed."""
    from sambalm.pretrain import trainer
    from sambalm.pretrain.config_file import parse_config

    launch, (_, hard) = trainer.Trainer._launch_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit_and_launch(self):
        if self.world.rank == self.world.size - 1 and self.step in limits:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits[self.step] or hard, hard))
        return launch(self)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainer.Trainer, "_launch_step", limit_and_launch)
        with errors_in_a_pipe() as errors:
            trainer.train(parse_config(values, source="test"))
        return errors


def train_with_failing_saves(values, numbers):
    """Trains while the last rank can write only small files in some saves, counted from 1; returns what it printed."""
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.trainer import train

    real, count = write.write_shards, itertools.count(1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_within_a_limit(*args, rank):
        fails = next(count) in numbers and rank == int(os.environ["WORLD_SIZE"]) - 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if fails else hard, hard))
        try:
            return real(*args, rank=rank)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    with pytest.MonkeyPatch.context() as monkeypatch, errors_in_a_pipe() as errors:
        monkeypatch.setattr(write, "write_shards", write_within_a_limit)
        train(parse_config(values, source="test"))
    return errors


@pytest.mark.slow
def test_a_save_that_fails_on_a_rank_is_tried_again_at_the_next_turn(run_values, tmp_path):
    # The save of step 8 waits for that of step 6, however slow: a later record tells how that ended.
    values = changed(run_values, parallel={"zero_stage": 1}, train={"steps": 10}, checkpoint={"every_steps": 2})
    expected = train(changed(values, run={"dir": str(tmp_path / "clean")}), ranks=2)
    errors, silent = run_world(train_with_failing_saves, values, {2, 3}, ranks=2)
    assert [open_checkpoint(folder).step for folder in checkpoint_folders(run_dir(values))] == [2, 8, 10]
    assert sorted(path.name for path in (run_dir(values) / "checkpoints").iterdir())[0] == "step_00000002"
    records = read_metrics(run_dir(values))
    assert [without_measured(record) for record in records] == expected
    told = [record["checkpoint_failures"] for record in records if "checkpoint_failures" in record]
    assert told in ([1, 2], [2])  # one record tells of both where the first save ends no sooner than the second
    assert not [line for line in silent if line.startswith("warning: ")]
    warnings = [line for line in errors if line.startswith("warning: ")]
    assert [line.split(" was not saved: ")[0][-6:] for line in warnings] == ["step 4", "step 6"]
    assert all("rank 1: [Errno 27] File too large" in line for line in warnings)


def limit_files_of_rank_1():
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def test_saves_that_fail_again_and_again_end_the_run_with_a_sentence(run_values, tmp_path):
    checkpoint = {"every_steps": 1, "max_failed_saves": 2}
    values = changed(run_values, parallel={"zero_stage": 1}, train={"steps": 500}, checkpoint=checkpoint)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    ranks = program.start_ranks("train", tmp_path / "run.yaml", ranks=2, before=limit_files_of_rank_1)
    assert [rank.wait() for rank in ranks] == [ExitCode.NOT_SAVED] * 2
    (outcome,) = run_dir(values).glob("attempts/*/outcome.json")
    reason = json.loads(outcome.read_text())["reason"]
    assert reason.startswith("2 saves in a row failed; the last one: the checkpoint of step ")
    assert "\n" not in reason
    assert list((run_dir(values) / "checkpoints").iterdir()) == []
    assert all("Traceback" not in rank.communicate()[1] for rank in ranks)


def slow_saves():
    slow(pytest.MonkeyPatch())


def test_a_run_that_leaves_while_it_saves_ends_both_saves(run_values, tmp_path):
    values = changed(run_values, train={"steps": 4000}, checkpoint={"every_steps": 100_000})
    values = changed(values, validation={"every_steps": 100_000})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    folder = run_dir(values) / "checkpoints"
    with program.start("train", tmp_path / "run.yaml", before=slow_saves) as run:
        program.wait_until(lambda: len(read_metrics(run_dir(values))) > 2, 60)
        run.send_signal(signal.SIGUSR1)
        program.wait_until(lambda: list(folder.glob(".step_*.partial")), 60)
        run.send_signal(signal.SIGTERM)
        assert run.wait() == ExitCode.REQUEUE
    steps = [open_checkpoint(path).step for path in checkpoint_folders(run_dir(values))]
    assert len(steps) == 2
    assert sorted(folder.iterdir()) == checkpoint_folders(run_dir(values))
    assert steps[-1] == read_metrics(run_dir(values))[-1]["step"]


def fail_at_step_4():
    from sambalm.pretrain import trainer

    launch = trainer.Trainer._launch_step
    slow_saves()

    def launch_or_fail(self):
        if self.step == 4:
            raise ZeroDivisionError
        return launch(self)

    trainer.Trainer._launch_step = launch_or_fail


def test_a_save_under_way_survives_an_error(run_values, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_values))
    ended = program.run("train", tmp_path / "run.yaml", before=fail_at_step_4)
    assert "ZeroDivisionError" in ended.stderr
    assert newest_checkpoint(run_dir(run_values), warn=pytest.fail).step == 3


def kill_rank_1_in_its_save():
    if os.environ["RANK"] == "1":
        write.write_shards = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_killed_in_its_save_ends_the_others_and_commits_nothing(run_values, tmp_path):
    values = changed(run_values, parallel={"zero_stage": 1}, train={"steps": 500})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    survivor, killed = program.start_ranks("train", tmp_path / "run.yaml", ranks=2, before=kill_rank_1_in_its_save)
    assert killed.wait() == -signal.SIGKILL
    assert survivor.wait(30) != 0
    assert checkpoint_folders(run_dir(values)) == []


def append_with_a_limit(path: str) -> tuple[list[bytes], list[str]]:
    """What a file holds after each record, as the room for it comes and goes, and what is printed."""
    file, found = AppendedFile(Path(path)), []
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with errors_in_a_pipe() as errors:
        for number, limit in enumerate([hard, 17, 17, hard, hard]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            file.append(f"record {number};".encode() * (1 + number % 2))
            found.append(Path(path).read_bytes())
        file.close()
    return found, errors


@pytest.mark.parametrize("tell", [print_line, print_warning])
def test_a_log_on_a_full_disk_ends_nothing(tell, monkeypatch):
    log = open("/dev/full", "w")  # noqa: SIM115  # closing it fails as well
    monkeypatch.setattr(sys, "stderr", log)
    with pytest.raises(OSError, match="No space left"):
        print("text", file=sys.stderr, flush=True)
    tell("text")
    with contextlib.suppress(OSError):
        log.close()


def test_records_wait_for_room_on_the_disk(tmp_path):
    records = [f"record {number};".encode() * (1 + number % 2) for number in range(5)]
    ((found, warnings),) = run_world(append_with_a_limit, str(tmp_path / "new" / "file"), ranks=1)
    ends = [1, 1, 1, 4, 5]
    assert found == [b"".join(records[:end]) for end in ends]
    assert len(warnings) == 1
    assert os.strerror(errno.EFBIG) in warnings[0]


def test_reports_that_cannot_be_written_end_no_run(run_values):
    """One process whose files may not grow from the second step to the fifth."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = changed(run_values, checkpoint={"every_steps": 100})
    (errors,) = run_world(train_with_limits, values, {1: 100, 5: None}, ranks=1)
    output = "\n".join(errors)
    assert output.count("cannot be written, and the run goes on") == 2
    assert "Traceback" not in output
    assert [record["step"] for record in read_metrics(run_dir(values))] == [1, 2, 3, 4, 5, 6]
    board = EventAccumulator(str(run_dir(values) / "tensorboard"))
    board.Reload()
    assert [scalar.step for scalar in board.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def read_bytes_on_rank(values):
    """Takes the newest checkpoint over; returns the bytes that this rank reads, by kind."""
    from sambalm.parallel.groups import start_world
    from sambalm.pretrain.checkpointing import read
    from sambalm.pretrain.checkpointing.load import find_resume_point
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training

    config, counts = parse_config(values, source="test"), collections.Counter()
    real = read._read_region

    def count(file, name, region):
        tensor = real(file, name, region)
        counts[name.partition(".")[0]] += tensor.numel() * tensor.element_size()
        return tensor

    with pytest.MonkeyPatch.context() as monkeypatch, start_world(config.parallel) as world:
        monkeypatch.setattr(read, "_read_region", count)
        build_training(config, world=world, checkpoint=find_resume_point(config, world=world))
    return counts


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_replicas_read_a_checkpoint_once_between_them(stage, run_values):
    values = changed(run_values, parallel={"zero_stage": stage}, train={"steps": 1}, checkpoint={"every_steps": 9})
    train(values, ranks=2)
    checkpoint = newest_checkpoint(run_dir(values), warn=pytest.fail)
    elements = sum(torch.Size(shape).numel() for shape in checkpoint.shapes().values())
    counts = run_world(read_bytes_on_rank, values, ranks=2)
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        assert sum(count[kind] for count in counts) == 4 * elements
        assert min(count[kind] for count in counts) > 0.4 * 4 * elements


@pytest.mark.parametrize(
    ("rows", "is_whole"),
    [([(0, 4), (4, 6)], True), ([(0, 4)], False), ([(0, 4), (5, 5)], False), ([(0, 2), (8, 2)], False), ([], False)],
)
def test_a_rectangle_is_read_where_files_hold_all_of_it(rows, is_whole):
    """Rows by where they begin and their number; those from 1 to 7 are wanted."""
    stored = {"model.a": [StoredSlice(Path(str(start)), (start, 0), (count, 3)) for start, count in rows]}
    wanted = WantedSlice("model.a", (1, 0), torch.zeros(6, 3))
    with nullcontext() if is_whole else pytest.raises(CheckpointError, match=r"^no file holds all of model\.a$"):
        found = [(read.path.name, read.region[0], len(read.target)) for read in _reads(stored, wanted)]
        assert found == [("0", slice(1, 4), 3), ("4", slice(0, 3), 3)]


def test_a_tensor_that_no_file_holds_whole_is_refused_on_all_ranks(run_values):
    values = changed(run_values, parallel={"zero_stage": 1}, train={"steps": 1})
    train(values, ranks=2)
    (folder,) = checkpoint_folders(run_dir(values))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["shard-00002-0.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "shard-00002-0.safetensors").unlink()
    with pytest.raises(
        AssertionError, match=r"CheckpointError: a checkpoint cannot be read: rank 0: no file holds all"
    ):
        train(changed(values, train={"steps": 2}), ranks=2)
