"""Runs whose parameters have several learning rates, or Muon: stopped, resumed, moved to another layout, refused."""

import re

import pytest

from sambalm.pretrain.checkpointing.format import newest_checkpoint
from sambalm.pretrain.errors import ConfigError
from tests.support.marks import slow_except
from tests.support.whole_runs import changed, run_dir, stopped_after, train

OPTIMIZERS = {
    "muon": {"optimizer": {"kind": "muon"}},
    "mup": {"model": {"scaling": "mup", "base": {"pattern": "M*-", "hidden_size": 16, "mlp_size": 24}}},
}
RUNS = [(kind, ranks, stage) for kind in OPTIMIZERS for ranks, stage in ((2, 1), (2, 3), (1, 1))]


def run_of(kind, run_values, parallel):
    sections = OPTIMIZERS[kind]
    return changed(run_values, checkpoint={"every_steps": 1}, parallel=parallel, train={"steps": 4}, **sections)


@pytest.mark.parametrize(("kind", "ranks", "stage"), slow_except([], RUNS, long=RUNS[1:]))
def test_a_stopped_run_goes_on_with_the_same_bits_and_on_another_layout(kind, ranks, stage, run_values, tmp_path):
    values = run_of(kind, run_values, {"zero_stage": stage})
    uninterrupted = train(values, ranks=ranks)
    assert train(stopped_after(values, 2, tmp_path / "resumed"), ranks=ranks) == uninterrupted
    moved = stopped_after(values, 2, tmp_path / "moved")
    moved["parallel"] = {"zero_stage": 1}
    losses = [record["loss"] for record in train(moved, ranks=3 - ranks)]
    assert losses == pytest.approx([record["loss"] for record in uninterrupted], rel=1e-4)


def test_a_run_does_not_change_its_optimizer(run_values):
    values = run_of("muon", run_values, {})
    train(values)
    path = newest_checkpoint(run_dir(values), warn=print).path
    sentence = f"optimizer.kind is adamw and {path} was saved with muon, whose state it cannot go on from: restore"
    with pytest.raises(AssertionError, match=re.escape(f"{ConfigError.__name__}: {sentence}")):
        train(changed(values, optimizer={"kind": "adamw"}, train={"steps": 5}))
