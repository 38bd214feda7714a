"""What tests ask of every mixer: that it counts what its layer has, sends and keeps, and that its runs resume."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from sambalm.model.config import ModelConfig
from sambalm.model.mixers.counts import KernelNames
from sambalm.model.ops.registry import TORCH_KERNELS
from sambalm.model.registry import mixer
from sambalm.model.samba import Sublayer
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.planner.communication import step_transfers
from sambalm.pretrain.planner.memory import stage_memories
from tests.support.whole_runs import changed, stopped_after, train


def assert_counts_its_parameters(letter: str, config: ModelConfig, *, ranks: int) -> None:
    """Compares what a mixer says of its parameters with those of the first rank's layer."""
    one = mixer(letter)
    with torch.device("meta"):
        layer = Sublayer(letter, config, tp=TensorParallel(rank=0, size=ranks), kernels=TORCH_KERNELS)
    counts, held = one.parameters(config, tensor_ranks=ranks), dict(layer.mixer.named_parameters())
    assert {each.name: each.shape for each in counts} == {name: tuple(t.shape) for name, t in held.items()}
    for each in counts:
        info = info_of(held[each.name])
        found = (info.matmul_only, info.takes_fp8, info.weight_decay)
        assert found == (each.matmul_only, each.takes_fp8, each.decays), each.name


def assert_sends_what_it_says(config: RunConfig, handed: list[tuple[int, Counter]], *, stage: int = 0) -> None:
    """Compares what ranks handed over in a step (`handed_on_rank`) with what the planner counts of a stage."""
    counted: Counter = Counter()
    for of_rank, by_operation in handed:
        if of_rank == stage:
            counted |= by_operation  # of the rank that hands over most
    expected: Counter = Counter()
    for transfer in step_transfers(config, stage=stage, world_size=len(handed)):
        expected[transfer.operation] += transfer.handed_bytes
    assert expected == pytest.approx(+counted, rel=0.01)


def assert_keeps_what_it_says(config: RunConfig, kept: list[int], *, kernels: KernelNames, tolerance: float) -> None:
    """Compares what ranks kept for a backward (`kept_on_rank`) with what the planner counts."""
    memory, *_ = stage_memories(config, world_size=len(kept), kernels=kernels)
    # The buffer for gathered sequences is alive as well.
    gathered = memory.communication_bytes % (4 * 500_000_000)
    assert memory.rounded_bytes + memory.saved_bytes + gathered == pytest.approx(max(kept), rel=tolerance)


def assert_resumes_on(parallel: dict[str, Any], values: dict[str, Any], folder: Path, *, ranks: int = 2) -> None:
    """Trains on one process, and again from step 3 on another layout: the losses are the same."""
    values = changed(values, train={"micro_batch_size": 1})
    whole_run = train(values)
    resumed = train(changed(stopped_after(values, 3, folder), parallel=parallel), ranks=ranks)
    for before, after in zip(whole_run, resumed, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
