"""Resuming exactly, on the same layout and on others, and never from something half-written or damaged."""

import json
import os
import resource
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

from sambalm.parallel.config import ParallelConfig
from sambalm.parallel.groups import start_world
from sambalm.pretrain.checkpointing import format as files
from sambalm.pretrain.checkpointing import read, write
from sambalm.pretrain.checkpointing.format import (
    MANIFEST,
    STATE,
    Checkpoint,
    checkpoint_folder,
    checkpoint_folders,
    checksums,
    commit,
    newest_checkpoint,
    open_checkpoint,
    remove_checkpoint,
)
from sambalm.pretrain.checkpointing.read import send_to_replicas
from sambalm.pretrain.checkpointing.shard_file import write_shards
from sambalm.pretrain.checkpointing.snapshot import SavedSlice
from sambalm.pretrain.checkpointing.to_hf import _facts
from sambalm.pretrain.checkpointing.write import _complete, save_checkpoint
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import CheckpointError
from sambalm.pretrain.optimizer import BUCKET_ELEMENTS
from tests.support.marks import slow_except
from tests.support.power_loss import assert_lasts, noted_operations
from tests.support.whole_runs import changed, run_dir, stopped_after, train
from tests.support.worlds import run_world


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    slow_except(
        [(1, {}), (2, {"zero_stage": 1})],
        [
            (1, {}),
            (2, {"zero_stage": 1}),
            (2, {"zero_stage": 2}),
            (2, {"zero_stage": 3}),
            (2, {"tensor": 2, "sequence": True}),
            (2, {"pipeline": 2, "virtual_pipeline": 2}),
            (2, {"context": 2, "zero_stage": 2}),
        ],
    ),
)
def test_a_stopped_run_goes_on_with_the_same_bits(ranks, parallel, run_values, tmp_path):
    values = changed(run_values, checkpoint={"every_steps": 1}, parallel=parallel, train={"steps": 5})
    uninterrupted = train(values, ranks=ranks)
    for step in (1, 4):
        resumed = train(stopped_after(values, step, tmp_path / f"resumed{step}"), ranks=ranks)
        assert resumed == uninterrupted


IN_FP8 = [(1, {}), (2, {"tensor": 2}), (2, {"pipeline": 2})]


@pytest.mark.parametrize(("ranks", "parallel"), slow_except(IN_FP8[:1], IN_FP8, long=IN_FP8[1:]))
def test_a_stopped_run_in_fp8_goes_on_with_the_same_bits(ranks, parallel, run_values, tmp_path):
    """Its scales are in the checkpoint: without them a run would find others in a step that is not in FP8."""
    train_section = {"steps": 4, "matmul_precision": "fp8"}
    values = changed(run_values, checkpoint={"every_steps": 1}, parallel=parallel, train=train_section)
    uninterrupted = train(values, ranks=ranks)
    scales = newest_checkpoint(run_dir(values), warn=print).state["fp8_scales"]
    assert len(scales) == 2 * len(values["model"]["pattern"])
    assert "layers.1.mixer.gate_up_proj.gate.weight" in scales, "the name of a fused product's first slice"
    resumed = stopped_after(values, 2, tmp_path / "resumed")
    assert train(resumed, ranks=ranks) == uninterrupted
    plain = changed(values, train={"matmul_precision": None}, run={"dir": str(tmp_path / "plain")})
    assert train(plain, ranks=ranks) != uninterrupted


def test_a_finished_run_does_nothing_more(run_values):
    records = train(run_values)
    saved = {path: path.stat().st_mtime_ns for path in run_dir(run_values).glob("checkpoints/*/*")}
    assert train(run_values) == records
    assert {path: path.stat().st_mtime_ns for path in run_dir(run_values).glob("checkpoints/*/*")} == saved


MOVES = {
    "TP2xDP2 ZeRO-3 to one": ((4, {"tensor": 2, "sequence": True, "zero_stage": 3}), (1, {})),
    "DP2 ZeRO-2 to TP2": ((2, {"zero_stage": 2}), (2, {"tensor": 2})),
    "one to DP2 ZeRO-3": ((1, {}), (2, {"zero_stage": 3})),
    "TP2xPP2 to CP2xDP2 ZeRO-2": ((4, {"tensor": 2, "pipeline": 2}), (4, {"context": 2, "zero_stage": 2})),
    "PP2xVPP2 to TP4": ((2, {"pipeline": 2, "virtual_pipeline": 2}), (4, {"tensor": 4, "sequence": True})),
    "CP4 to PP2xDP2": ((4, {"context": 4}), (4, {"pipeline": 2})),
    "TP4 to PP4": ((4, {"tensor": 4}), (4, {"pipeline": 4})),
    "DP4 ZeRO-1 to PP2xVPP2": ((4, {"zero_stage": 1}), (2, {"pipeline": 2, "virtual_pipeline": 2})),
}


FOUR_RANKS = [name for name, sides in MOVES.items() if max(ranks for ranks, _ in sides) == 4]


def sent_to_replicas() -> tuple[list[int], list[float]]:
    config = ParallelConfig(tensor=2)
    with start_world(config) as world:
        tensors = [torch.full((3,), float(world.rank)) for _ in range(2)]
        send_to_replicas(tensors, [0, 1], world=world)
        return dist.get_process_group_ranks(world.replica_group), [float(tensor[2]) for tensor in tensors]


def test_a_replica_s_tensors_reach_the_others_of_its_slice():
    """Each pair of replicas has a tensor from its first rank and one from its second."""
    for rank, (replicas, values) in enumerate(run_world(sent_to_replicas, ranks=4)):
        assert replicas == [rank % 2, rank % 2 + 2]
        assert values == replicas


@pytest.mark.parametrize("move", slow_except(["DP2 ZeRO-2 to TP2"], MOVES, long=FOUR_RANKS))
def test_a_checkpoint_resumes_on_another_layout(move, run_values, tmp_path):
    (ranks, parallel), (other_ranks, other_parallel) = MOVES[move]
    # An MLP width that no two ranks share equally, and an untied head in half of the moves.
    model = {"mlp_size": 50, "tie_embeddings": len(move) % 2 == 0}
    values = changed(run_values, parallel=parallel, model=model)
    uninterrupted = train(values, ranks=ranks)
    moved = stopped_after(values, 3, tmp_path / "moved") | {"parallel": other_parallel}

    again = changed(moved, run={"dir": str(tmp_path / "again")})
    run_world(load_and_save, moved, again, ranks=other_ranks)
    before, after = (stored_tensors(checkpoint_folder(run_dir(v), 3)) for v in (values, again))
    assert before.keys() == after.keys()
    assert {name.partition(".")[0] for name in before} == {"model", "exp_avg", "exp_avg_sq"}
    assert [name for name in before if not torch.equal(before[name], after[name])] == []

    for record, expected in zip(train(moved, ranks=other_ranks), uninterrupted, strict=True):
        assert record == pytest.approx(expected, rel=1e-5)


def test_tensors_that_ranks_cannot_share_equally_are_resumed(run_values, tmp_path):
    """ZeRO-3 pads them over three ranks, so that a rank's share starts elsewhere than where a tensor is divided."""
    values = changed(run_values, train={"steps": 3, "global_batch_tokens": 192}, model={"pattern": "M*"})
    train(values)
    moved = stopped_after(values, 3, tmp_path / "moved") | {"parallel": {"zero_stage": 3}}
    again = changed(moved, run={"dir": str(tmp_path / "again")})
    run_world(load_and_save, moved, again, ranks=3)
    before, after = (stored_tensors(checkpoint_folder(run_dir(v), 3)) for v in (values, again))
    assert any(tensor.numel() % 3 for tensor in before.values())
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_a_checkpoint_is_the_same_whatever_gradients_are_reduced_together(run_values, tmp_path):
    values = changed(run_values, parallel={"zero_stage": 1})
    train(values, ranks=2)
    moved = stopped_after(values, 3, tmp_path / "moved")
    again = changed(moved, run={"dir": str(tmp_path / "again")})
    run_world(load_and_save, moved, again, 1, ranks=2)  # each layer's
    before, after = (stored_tensors(checkpoint_folder(run_dir(v), 3)) for v in (values, again))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def load_and_save(values, target, bucket_elements=BUCKET_ELEMENTS):
    """Takes a run's newest checkpoint over, without a step, and saves it into the run folder of other values."""
    from sambalm.model.registry import weight_copies
    from sambalm.parallel.groups import start_world
    from sambalm.pretrain.checkpointing.load import find_resume_point
    from sambalm.pretrain.checkpointing.write import save_checkpoint
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training

    config = parse_config(values, source="test")
    with start_world(config.parallel, copies=weight_copies(config.model, tensor_ranks=config.parallel.tensor)) as world:
        checkpoint = find_resume_point(config, world=world)
        training = build_training(config, world=world, checkpoint=checkpoint, bucket_elements=bucket_elements)
        target_config = parse_config(target, source="test")
        save_checkpoint(training.chunks, config=target_config, world=world, step=3, samples=24, data={})


def stored_tensors(path):
    """Every tensor of a checkpoint put together from its slices, which must fill it exactly once."""
    wholes, filled = {}, {}
    for name, pieces in open_checkpoint(path)._slices.items():
        ends = [[o + n for o, n in zip(p.offsets, p.sizes, strict=True)] for p in pieces]
        wholes[name] = torch.full([max(dim) for dim in zip(*ends, strict=True)], float("nan"))
        filled[name] = sum(torch.Size(p.sizes).numel() for p in pieces)
        for piece in pieces:
            with safe_open(piece.path, framework="pt") as file:
                region = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))
                wholes[name][region] = file.get_tensor(name)
    assert all(filled[name] == whole.numel() and not whole.isnan().any() for name, whole in wholes.items())
    return wholes


PEAK_OF_READING = """
import sys
from pathlib import Path

import torch
from sambalm.pretrain.checkpointing.format import open_checkpoint


def resident_mb(field):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


checkpoint = open_checkpoint(Path(sys.argv[1]))
shapes = checkpoint.shapes()
checkpoint.read(min(shapes, key=lambda name: torch.Size(shapes[name]).numel()))  # loads what reading needs
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
before = resident_mb("VmRSS")
for name in shapes:
    assert checkpoint.read(name).shape == shapes[name]
assert not torch.distributed.is_initialized()
print(resident_mb("VmHWM") - before)
"""


@pytest.mark.long
def test_reading_offline_takes_the_memory_of_one_tensor(run_values):
    large = {"hidden_size": 256, "mlp_size": 8192, "vocab_size": 4096}
    run = {"train": {"steps": 1}, "validation": {"length_multiples": [1], "tokens": 64}}
    values = changed(run_values, model=large, parallel={"tensor": 2}, **run)
    train(values, ranks=2)
    folder = checkpoint_folder(run_dir(values), 1)
    sizes = [4e-6 * torch.Size(shape).numel() for shape in open_checkpoint(folder).shapes().values()]
    assert sum(sizes) > 6 * max(sizes)
    command = [sys.executable, "-c", PEAK_OF_READING, str(folder)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}  # what is freed goes back at once
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    peak_mb = float(result.stdout)
    # The tensor, and its half that is being read: once in the file's pages and once as a tensor.
    assert peak_mb < 2.5 * max(sizes)


@pytest.fixture
def finished(run_values):
    train(run_values)
    return run_values


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
@pytest.mark.parametrize("file", ["*.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(damage, file, finished):
    newest = checkpoint_folder(run_dir(finished), 6)
    (target,) = newest.glob(file)
    damage(target)
    with pytest.raises(CheckpointError, match=target.name):
        open_checkpoint(newest)
    warnings = []
    assert newest_checkpoint(run_dir(finished), warn=warnings.append).step == 3
    assert len(warnings) == 1
    assert target.name in warnings[0]
    assert [record["step"] for record in train(finished)] == [1, 2, 3, 4, 5, 6]
    assert newest_checkpoint(run_dir(finished), warn=pytest.fail).step == 6


def test_a_run_with_nothing_but_damaged_checkpoints_does_not_start_afresh(finished):
    for folder in checkpoint_folders(run_dir(finished)):
        flip_a_bit(next(folder.glob("*.safetensors")))
    with pytest.raises(AssertionError, match=r"every checkpoint in .* is damaged"):
        train(finished)


def test_another_format_version_is_refused_with_both_named(finished):
    newest = checkpoint_folder(run_dir(finished), 6)
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {"format_version": 9}))
    with pytest.raises(CheckpointError, match="version 9 and this program reads 1"):
        open_checkpoint(newest)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        newest_checkpoint(tmp_path, warn=pytest.fail)


def test_another_model_is_refused_by_its_key(finished):
    other = changed(finished, model={"mlp_size": 64}, train={"steps": 8})
    with pytest.raises(AssertionError, match=r"ConfigError: model.mlp_size is 64 and .* was saved with 48"):
        train(other)


def test_only_the_newest_checkpoints_are_kept(run_values):
    train(changed(run_values, checkpoint={"every_steps": 1, "keep": 2}))
    names = sorted(path.name for path in (run_dir(run_values) / "checkpoints").iterdir())
    assert names == ["step_00000005", "step_00000006"]


def train_with_a_full_disk(values):
    """Rank 1 cannot write a file of the size of its shard, as when its disk is full."""
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.trainer import train

    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        train(parse_config(values, source="test"))
    except CheckpointError as error:
        return str(error)


def test_a_committed_checkpoint_survives_a_power_loss(tmp_path, monkeypatch):
    partial, final = tmp_path / ".step_00000001.partial", checkpoint_folder(tmp_path, 1)
    final.mkdir(parents=True)  # of an earlier attempt
    partial.mkdir()
    calls = noted_operations(monkeypatch)
    written = write_shards(partial, [SavedSlice("model.w", (0,), torch.ones(3))] * 2, rank=0)  # in two files
    _complete(partial, {"step": 1, "samples": 8, "config": {}}, written)
    commit(partial, final)
    assert_lasts(calls, final, parts=[STATE, MANIFEST, *written])
    assert open_checkpoint(final).step == 1


def test_a_tensor_reaches_to_the_end_of_its_farthest_slice(tmp_path):
    whole = torch.arange(15.0).view(3, 5)
    for number, (rows, columns) in enumerate(
        ((slice(0, 1), slice(0, 5)), (slice(1, 3), slice(0, 2)), (slice(1, 3), slice(2, 5)))
    ):
        placement = {"model.w": {SAVED_OFFSETS_KEY: [rows.start, columns.start]}}
        tensors, path = {"model.w": whole[rows, columns].contiguous()}, tmp_path / f"shard-{number}.safetensors"
        save_file(tensors, path, metadata={CUSTOM_METADATA_KEY: json.dumps(placement)})
    checkpoint = Checkpoint(tmp_path, {})
    assert checkpoint.shapes() == {"w": (3, 5)}
    assert torch.equal(checkpoint.read("w"), whole)


def test_a_file_that_is_larger_than_memory_is_read(tmp_path):
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    kib = sum(int(lines[name].split()[0]) for name in ("MemTotal", "SwapTotal"))
    rows = kib * 1024 // 4000 + 1
    placement = {name: {SAVED_OFFSETS_KEY: [0, 0]} for name in ("exp_avg.w", "model.w")}
    entries = {
        "__metadata__": {CUSTOM_METADATA_KEY: json.dumps(placement)},
        "exp_avg.w": {"dtype": "F32", "shape": [rows, 1000], "data_offsets": [0, 4000 * rows]},
        "model.w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [4000 * rows, 4000 * rows + 16]},
    }
    header = json.dumps(entries).encode()
    with (tmp_path / "shard.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(4000 * rows, os.SEEK_CUR)  # a hole, which takes no disk
        file.write(torch.arange(4.0).numpy().tobytes())
    checkpoint = Checkpoint(tmp_path, {})
    assert torch.equal(checkpoint.read("w"), torch.arange(4.0).view(2, 2))
    wanted = [read.WantedSlice(name, (0, 1), torch.full((2, 1), -1.0)) for name in ("model.w", "exp_avg.w")]
    read._read_all([part for one in wanted for part in read._reads(checkpoint.stored(), one)])
    assert [one.target.tolist() for one in wanted] == [[[1.0], [3.0]], [[0.0], [0.0]]]


def test_a_checksum_is_that_of_all_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK_BYTES", 4)
    (tmp_path / "a").write_bytes(b"0123456789")
    assert checksums(tmp_path, ["a"]) == {"a": {"bytes": 10, "crc32": zlib.crc32(b"0123456789")}}


def test_a_checkpoint_has_the_scales_of_all_stages(run_values, monkeypatch):
    config, ours, theirs = parse_config(run_values, source="test"), {"layers.0": [1.0, 2.0]}, {"layers.1": [4.0, 8.0]}
    monkeypatch.setattr(write, "fp8_scales", lambda chunks: ours)
    world = SimpleNamespace(rank=0, size=2, is_main=True, broadcast_object=lambda value: value)
    world.of_save_thread = world

    def gather(answer):
        value, failure = answer
        return [answer, (({}, theirs) if value == ({}, ours) else value, failure)]

    world.all_gather_object = gather
    folder = save_checkpoint([], config=config, world=world, step=1, samples=2, data={})
    assert open_checkpoint(folder).state["fp8_scales"] == ours | theirs


def test_a_model_card_tells_the_checkpoints_step(run_values):
    config = parse_config(run_values, source="test")
    run_dir(run_values).mkdir()
    records = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    (run_dir(run_values) / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    facts = _facts(Checkpoint(Path(), {"step": 2, "samples": 4, "tokens": 128}), config)
    assert (facts.step, facts.tokens_seen, facts.loss, facts.sequence_tokens) == (2, 128, 2.0, 32)


def test_a_checkpoint_is_renamed_before_it_is_removed(tmp_path, monkeypatch):
    folder, removed = checkpoint_folder(tmp_path, 1), tmp_path / "checkpoints" / ".step_00000001.removed"
    folder.mkdir(parents=True)
    calls = noted_operations(monkeypatch)
    remove_checkpoint(folder)
    assert calls == [("rename", str(folder), str(removed))]
    assert not list(folder.parent.iterdir())


def test_a_rank_that_cannot_write_commits_nothing_on_any(run_values):
    messages = run_world(train_with_a_full_disk, changed(run_values, parallel={"zero_stage": 1}), ranks=2)
    assert all("the checkpoint of step 6 was not saved: rank 1: [Errno 27] File too large" in m for m in messages)
    assert list((run_dir(run_values) / "checkpoints").iterdir()) == []


def test_a_line_of_metrics_that_a_kill_cut_short_is_forgotten(run_values, tmp_path):
    values = changed(run_values, checkpoint={"every_steps": 1}, train={"steps": 4})
    uninterrupted = train(values)
    stopped = stopped_after(values, 2, tmp_path / "cut")
    metrics = tmp_path / "cut" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    assert train(stopped) == uninterrupted
