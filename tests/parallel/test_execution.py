"""What an executor leaves when a run builds its model anew."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sambalm.parallel import execution
from sambalm.parallel.execution import AccumulatingExecutor, PipelinedExecutor, StepState


def executors(buffers: dict[str, Any]) -> list[execution.Executor]:
    state = StepState(guard=None, fp8=None, **buffers)
    captures: dict[str, Any] = {"cuda_graphs": False, "captures_documents": True}
    return [
        AccumulatingExecutor(None, nn.Linear(2, 2), state, **captures),
        PipelinedExecutor(None, None, state, embedding_group=None, tied_weight=None, **captures),
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_a_released_executor_holds_no_memory(number, monkeypatch):
    of_engine, gradient, sums, weight, own, slot, copied = tensors = [torch.ones(3) for _ in range(7)]
    monkeypatch.setattr(execution, "tensors_of_run", lambda engine: [of_engine])
    partitioned = SimpleNamespace(tensors=[slot])
    flat = {
        "gradients": SimpleNamespace(buffers=[gradient], shares=[sums]),
        "weights": SimpleNamespace(buffers=[weight], shares=[own], partitioned=partitioned),
    }
    executors(flat | {"compute_weights": SimpleNamespace(copies={(): copied})})[number].release()
    assert [tensor.untyped_storage().size() for tensor in tensors] == [0] * 7
    alone = {"gradients": None, "weights": None, "compute_weights": SimpleNamespace(copies={})}
    assert executors(alone)[number].buffers() == []
