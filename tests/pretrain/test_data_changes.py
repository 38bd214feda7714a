"""Data that is damaged or not what a checkpoint was trained on is refused before the first step."""

import copy
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from sambalm.data_pipeline.shards import ShardWriter
from sambalm.data_pipeline.sources import open_sources
from sambalm.parallel.groups import ContextParallel, Pipeline
from sambalm.pretrain.checkpointing.data_record import data_change, data_record
from sambalm.pretrain.checkpointing.format import Checkpoint
from sambalm.pretrain.checkpointing.load import check_data
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.reporting.data_index import index_data
from sambalm.pretrain.validation import Validator
from tests.support import program
from tests.support.marks import slow_except
from tests.support.whole_runs import changed, train


def write_source(prefix: Path, *, seed: int) -> None:
    """Forty documents of 60 random ids."""
    writer = ShardWriter(prefix, 384)
    for document in np.split(np.random.RandomState(seed).randint(0, 384, size=2400), 40):
        writer.add(document)
    writer.finish()
    writer.commit()


@pytest.fixture
def blended_values(run_values, tmp_path) -> dict:
    """Two sources of equal weight, held out whole in every validation."""
    for seed, name in enumerate(("first", "second")):
        write_source(tmp_path / name, seed=seed)
    sources = [{"prefix": str(tmp_path / name), "weight": 1} for name in ("first", "second")]
    return changed(run_values, data={"train": sources}, validation={"tokens": 10**6})


def sambalm(values: dict, tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    """`sambalm WORDS CONFIG`, by default `train`."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    return program.run(*(words or ["train"]), config, variables={"COLUMNS": "200"})


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 64
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("inflict", "message"),
    [
        pytest.param(
            lambda path: os.truncate(path, 100),
            r"second\.bin has 100 bytes where its index says 4800",
            marks=pytest.mark.slow,
        ),
        (lambda path: path.unlink(), r"neither .*second\.json nor .*second\.bin with .*second\.idx exists"),
        pytest.param(
            lambda path: flip(path, 801),
            r"second\.bin holds token id \d+ at byte 800, outside the 384 ids of model\.vocab",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["short", "missing", "out of vocabulary"],
)
def test_a_damaged_shard_ends_the_program_before_the_first_step(inflict, message, blended_values, tmp_path):
    inflict(tmp_path / "second.bin")
    result = sambalm(blended_values, tmp_path)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert re.search(message, line)
    assert "Traceback" not in result.stderr
    assert not Path(blended_values["run"]["dir"]).exists()


@pytest.mark.long
def test_several_ranks_end_with_the_same_sentence(blended_values, tmp_path):
    """Under torchrun, which ends the ranks that wait for the one that met the damage."""
    os.truncate(tmp_path / "second.bin", 100)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(blended_values))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", program.PROGRAM, "train"]
    result = subprocess.run([*command, config], capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    assert result.returncode != 0
    assert re.search(r"^error.*second\.bin has 100 bytes", result.stderr, re.MULTILINE)
    assert not Path(blended_values["run"]["dir"]).exists()


def test_the_index_tells_what_a_run_draws(blended_values, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    told = []
    index_data(parse_config(blended_values, source="test"), progress=lambda *done: told.append(done))
    assert told == [(1, 1), (1, 1)]  # a shard of each source
    for name in ("first", "second"):  # 24 of 59 samples
        assert re.search(rf"{name} +│ +1 │ +1,920 │ +480 │ 50.00% │ +0.41 │", capsys.readouterr().out), name
        index_data(parse_config(blended_values, source="test"), progress=lambda *done: told.append(done))
    assert len(told) == 2  # found again


@pytest.mark.long
def test_a_run_starts_on_the_index_that_was_made_ahead(blended_values, tmp_path):
    result = sambalm(blended_values, tmp_path, "data", "index")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"first .* 1 .* 1,920 .* 480 .* 50.00% .* 0.41", result.stdout)  # 24 of 59 samples
    index = {path: path.stat().st_mtime_ns for path in (tmp_path / ".index_cache").iterdir()}
    assert len(index) == 2
    train(blended_values, ranks=2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / ".index_cache").iterdir()} == index


@pytest.mark.parametrize("allowed", [False, True])
def test_changed_data_is_refused_unless_the_config_allows_it(allowed, blended_values):
    config = parse_config(changed(blended_values, data={"allow_changed": allowed}), source="test")
    record = data_record(config, open_sources(config.data))
    saved = Checkpoint(Path("step_3"), {"data": record})
    check_data(saved, copy.deepcopy(record), config=config)
    for other, message in (
        (Checkpoint(Path("step_3"), {}), "it is unknown whether the data has changed since step_3 was saved"),
        (Checkpoint(Path("step_3"), {"data": record | {"seed": 8}}), "run.seed has changed from 8 to 7 since step_3"),
    ):
        with nullcontext() if allowed else pytest.raises(ConfigError, match=message):
            check_data(other, record, config=config)


@pytest.mark.slow
def test_a_run_refuses_data_that_changed_since_its_checkpoint(blended_values, tmp_path):
    half = changed(blended_values, train={"steps": 3})
    train(half)
    values = changed(blended_values, train={"steps": 4})
    write_source(tmp_path / "second", seed=7)
    result = sambalm(values, tmp_path)
    assert result.returncode == 2
    assert re.search(r"error: the data under .*second has changed since .*step_00000003 was saved: .*", result.stderr)
    assert "data.allow_changed=true" in result.stderr

    assert [record["step"] for record in train(changed(values, data={"allow_changed": True}))] == [1, 2, 3, 4]
    # The checkpoint of step 4 knows the data as it is now.
    assert len(train(changed(values, train={"steps": 5}))) == 5


def test_held_out_losses_are_told_for_each_source(blended_values, tmp_path):
    """With weights that never move, each source's loss is that of a run that has no other."""
    frozen = changed(blended_values, optimizer={"peak_lr": 1e-30}, train={"steps": 1})
    record = train(frozen)[-1]
    assert len([name for name in record if "validation" in name]) == 6
    for length in (32, 64):
        of_sources = [record[f"source_validation_loss_{length}/{name}"] for name in ("first", "second")]
        # Both have as many held-out samples.
        assert record[f"validation_loss_{length}"] == pytest.approx(np.mean(of_sources), rel=1e-9)
        assert of_sources[0] != pytest.approx(of_sources[1], rel=1e-4)
        for name, loss in zip(("first", "second"), of_sources, strict=True):
            run = {"dir": str(tmp_path / f"alone_{name}")}
            alone = train(changed(frozen, run=run, data={"train": str(tmp_path / name)}))[-1]
            assert alone[f"validation_loss_{length}"] == pytest.approx(loss, rel=1e-6)
            assert not any(key.startswith("source_") for key in alone)


@pytest.mark.parametrize(
    ("ranks", "parallel"), slow_except([(2, {})], [(2, {}), (2, {"context": 2}), (2, {"pipeline": 2})])
)
def test_each_source_s_loss_is_the_same_on_every_layout(ranks, parallel, blended_values, tmp_path):
    """Also where a rank has no samples left: of 28, and of 14 twice as long, it repeats the last one for nothing."""
    expected = train(changed(blended_values, run={"dir": str(tmp_path / "alone")}))[-1]
    values = changed(blended_values, parallel=parallel, train={"micro_batch_size": 4})
    assert train(values, ranks=ranks)[-1] == pytest.approx(expected, rel=1e-5)


def test_longer_sequences_are_validated_fewer_at_a_time(blended_values):
    """As many tokens as in a micro-batch of the training, unless one sequence has more."""
    values = changed(blended_values, train={"micro_batch_size": 4}, validation={"length_multiples": [1, 2, 8]})
    config, shapes = parse_config(values, source="test"), set()

    def losses(micro_batches):
        shapes.update(tuple(batch.tokens.shape) for batch in micro_batches)
        return [batch.tokens.float() for batch in micro_batches]

    world = SimpleNamespace(
        device=torch.device("cpu"), context=ContextParallel(), pipeline=Pipeline(), data_rank=0, data_size=1
    )
    world.sum_over_replicas = lambda sums: sums
    Validator(config, open_sources(config.data), world=world).losses(SimpleNamespace(losses=losses))
    assert shapes == {(4, 32), (2, 64), (1, 256)}


RECORD = {
    "seed": 1,
    "sequence_length": 32,
    "sources": [
        {"prefix": "a", "weight": 1.0, "validation_fraction": 0.1, "content": "x"},
        {"prefix": "b", "weight": 3.0, "validation_fraction": 0.1, "content": "y"},
    ],
}


def other(*, source: int | None = None, **keys) -> dict:
    record = copy.deepcopy(RECORD)
    (record if source is None else record["sources"][source]).update(keys)
    return record


@pytest.mark.parametrize(
    ("now", "change"),
    [
        (other(seed=2), "run.seed has changed from 1 to 2"),
        (other(sequence_length=64), "data.sequence_length has changed from 32 to 64"),
        (other(sources=RECORD["sources"][:1]), "data.train has changed from 2 sources to 1"),
        (other(source=1, content="z"), "the data under b has changed"),
        (other(source=0, validation_fraction=0.2), "the validation_fraction of a has changed from 0.1 to 0.2"),
        (other(source=0, weight=3.0), "the share of a in the samples has changed from 0.25 to 0.5"),
        (other(source=0, weight=1.001), "the share of a in the samples has changed from 0.25 to 0.250187"),
    ],
)
def test_whatever_moves_samples_is_a_change(now, change):
    assert data_change(RECORD, now) == change


def test_names_and_the_scale_of_weights_are_none():
    assert data_change(RECORD, other(source=0, prefix="elsewhere/a")) is None
    doubled = copy.deepcopy(RECORD)
    for source in doubled["sources"]:
        source["weight"] *= 2
    assert data_change(RECORD, doubled) is None
    assert data_change(None, RECORD) == "it is unknown whether the data has changed"
