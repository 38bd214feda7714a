"""What an executor leaves when a run builds its model anew."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sambalm.parallel import execution
from sambalm.parallel.execution import AccumulatingExecutor, PartitioningExecutor, PipelinedExecutor


def executors(buffers: dict[str, Any]) -> list[execution.Executor]:
    rest: dict[str, Any] = {**buffers, "guard": None, "fp8": None}
    return [
        AccumulatingExecutor(None, nn.Linear(2, 2), cuda_graphs=False, captures_documents=True, **rest),
        PipelinedExecutor(None, None, embedding_group=None, tied_weight=None, **rest),
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_a_released_executor_holds_no_memory(number, monkeypatch):
    of_engine, of_gradients, of_weights, copied = tensors = [torch.ones(3) for _ in range(4)]
    monkeypatch.setattr(execution, "tensors_of_run", lambda engine: [of_engine])
    flat = {"gradients": SimpleNamespace(buffers=[of_gradients]), "weights": SimpleNamespace(buffers=[of_weights])}
    executors(flat | {"compute_weights": SimpleNamespace(copies={(): copied})})[number].release()
    assert [tensor.untyped_storage().size() for tensor in tensors] == [0] * 4
    alone = {"gradients": None, "weights": None, "compute_weights": SimpleNamespace(copies={})}
    assert executors(alone)[number].buffers() == []


def test_an_engine_that_partitions_has_all_that_there_is(monkeypatch):
    held = torch.ones(3)
    monkeypatch.setattr(execution, "tensors_of_run", lambda engine: [held])
    monkeypatch.setattr(execution, "guard_own_steps", lambda engine, guard: None)
    PartitioningExecutor(None, guard=None).release()
    assert held.untyped_storage().size() == 0
