"""A step consumes the same samples in the same order on every layout, wherever a run stopped and went on."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sambalm.data_pipeline.shards import ShardWriter
from tests.support.marks import slow_except
from tests.support.read_samples import samples_by_step
from tests.support.whole_runs import changed, stopped_after, train
from tests.support.worlds import run_world


@pytest.fixture(scope="module")
def alone():
    """What one process reads, filled by the first test."""
    return {}


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    slow_except(
        [(2, {})],
        [
            (2, {}),
            (4, {"zero_stage": 2}),
            (4, {"context": 2}),
            (4, {"pipeline": 2}),
            (4, {"tensor": 2}),
            (2, {"context": 2}),
        ],
        long=[(4, {"pipeline": 2}), (4, {"tensor": 2}), (2, {"context": 2})],
    ),
)
def test_the_order_of_samples_does_not_depend_on_the_layout(ranks, parallel, run_values, alone, tmp_path):
    values = changed(run_values, train={"steps": 3}, validation={"every_steps": 3})
    if not alone:
        alone["samples"] = samples_by_step(changed(values, run={"dir": str(tmp_path / "alone")}), 1)
    expected = alone["samples"]
    assert expected[0].shape == (2, 8, 32)
    assert not torch.equal(expected[0], expected[1])
    found = samples_by_step(changed(values, parallel=parallel), ranks)
    for step, (samples, wanted) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(samples, wanted), step


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    slow_except(
        [],
        [(2, {"context": 2}), (2, {"pipeline": 2}), (4, {"tensor": 2, "sequence": True})],
        long=[(4, {"tensor": 2, "sequence": True})],
    ),
)
def test_a_run_that_resets_at_documents_has_the_same_losses_on_every_layout(ranks, parallel, run_values, tmp_path):
    values = changed(run_values, data={"reset_at_document": True})
    alone = train(changed(values, run={"dir": str(tmp_path / "alone")}))
    assert alone != train(changed(run_values, run={"dir": str(tmp_path / "stream")}))
    for record, expected in zip(train(changed(values, parallel=parallel), ranks=ranks), alone, strict=True):
        assert record == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def blended_values(run_values, tmp_path) -> dict:
    """Two sources by weight, and batches of 4, 4, 8, 8, 12, 12, ... samples."""
    writer = ShardWriter(tmp_path / "other", 384)
    for document in np.split(np.random.RandomState(0).randint(0, 384, size=2400), 40):
        writer.add(document)
    writer.finish()
    writer.commit()
    sources = [{"prefix": run_values["data"]["train"], "weight": 2}, {"prefix": str(tmp_path / "other"), "weight": 1}]
    ramp = {"start_tokens": 128, "increment_tokens": 128, "ramp_tokens": 768}
    return changed(
        run_values,
        data={"train": sources},
        train={"steps": 8, "global_batch_tokens": 384, "micro_batch_size": 1, "batch_ramp": ramp},
        validation={"every_steps": 8},
        checkpoint={"every_steps": 1, "keep": 20},
    )


@pytest.mark.long
def test_a_run_stopped_after_any_step_goes_on_with_the_same_bits(blended_values, tmp_path):
    uninterrupted = train(blended_values)
    assert len({record["batch_tokens"] for record in uninterrupted}) == 3
    for step in range(1, 8):
        assert train(stopped_after(blended_values, step, tmp_path / f"resumed{step}")) == uninterrupted, step


def dies_within_a_step(values: dict, batches: int) -> None:
    """Trains until this rank has taken a number of micro-batches, and fails at the next."""
    from sambalm.data_pipeline.loader import BatchLoader
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.trainer import train as run

    taken, take = [], BatchLoader.next_micro_batch

    def take_or_fail(loader):
        if len(taken) == batches:
            raise ConnectionResetError
        taken.append(None)
        return take(loader)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchLoader, "next_micro_batch", take_or_fail)
        with pytest.raises(ConnectionResetError):
            run(parse_config(values, source="test"))


@pytest.mark.parametrize("batches", slow_except([], [1, 17, 31], long=[1]))
def test_a_run_that_dies_between_micro_batches_goes_on_with_the_same_bits(batches, blended_values, tmp_path):
    uninterrupted = train(changed(blended_values, run={"dir": str(tmp_path / "whole")}))
    run_world(dies_within_a_step, blended_values, batches, ranks=1)
    assert train(blended_values) == uninterrupted


@pytest.mark.long
def test_ranks_and_threads_that_change_on_the_way_read_the_same_samples(blended_values, tmp_path):
    """From one data-parallel rank to two, to four, and back to one, with other numbers of threads each."""
    alone = samples_by_step(blended_values, 1)
    uninterrupted = train(blended_values)
    values = blended_values
    for leg, (step, ranks, workers) in enumerate([(2, 2, 3), (4, 4, 1), (6, 1, 4)]):
        values = changed(stopped_after(values, step, tmp_path / f"leg{leg}"), data={"workers": workers})
        found = samples_by_step(values, ranks)
        assert len(found) == 8 - step
        for samples, wanted in zip(found, alone[step:], strict=True):
            assert torch.equal(samples, wanted)
        for record, expected in zip(train(values), uninterrupted, strict=True):
            assert record == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
def test_a_longer_run_only_adds_samples(blended_values, tmp_path):
    steps = samples_by_step(blended_values, 1)
    longer = changed(stopped_after(blended_values, 5, tmp_path / "longer"), train={"steps": 11})
    found = samples_by_step(longer, 1)
    assert len(found) == 6
    assert all(torch.equal(a, b) for a, b in zip(found, steps[5:], strict=False))


@pytest.mark.slow
def test_another_batch_goes_on_with_the_next_sample(blended_values, tmp_path):
    """The position is a number of samples, not of steps."""
    rows = torch.cat(samples_by_step(blended_values, 1), dim=1)
    larger = {"steps": 7, "global_batch_tokens": 640, "batch_ramp": None}
    found = samples_by_step(changed(stopped_after(blended_values, 5, tmp_path / "larger"), train=larger), 1)
    assert [samples.shape[1] for samples in found] == [20, 20]
    consumed = 4 + 4 + 4 + 8 + 8
    assert torch.equal(found[0], rows[:, consumed : consumed + 20])


@pytest.mark.long
def test_moved_data_is_the_same_data(blended_values, tmp_path):
    uninterrupted = train(blended_values)
    moved = stopped_after(blended_values, 4, tmp_path / "moved")
    for source in moved["data"]["train"]:
        prefix = Path(source["prefix"])
        for path in [*prefix.parent.glob(f"{prefix.name}*"), *prefix.parent.glob("tokenizer.model")]:
            if path.is_file():
                shutil.copy(path, tmp_path / "moved")  # with other times
        source["prefix"] = str(tmp_path / "moved" / prefix.name)
    assert train(moved) == uninterrupted
