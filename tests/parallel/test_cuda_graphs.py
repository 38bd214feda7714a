"""When micro-batches are captured and what each launch reads and writes, with a stand-in for CUDA graphs on the CPU.

Whether a GPU captures what a step does is in tests/gpu/test_captured_step.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sambalm.parallel.cuda_graphs import UNCAPTURED_STEPS, CapturedMicroBatches, run_in_turn
from sambalm.parallel.errors import ParallelError
from sambalm.parallel.execution import AccumulatingExecutor, StepState
from sambalm.parallel.micro_batch import MicroBatch
from sambalm.parallel.pipeline.captured_chunk import CapturedChunk

COUNTS = (1, 2, 4, 1, 3, 4, 1)  # micro-batches of each step


class NotedOperations(TorchDispatchMode):
    """Notes the operations of a capture and runs them again, on the same tensors, at each replay."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.before: list[tuple[Tensor, Tensor]] = []  # of what operations change in place

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.is_mutable:
            self.before.append((args[0], args[0].clone()))
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def undo(self) -> None:
        """Leaves tensors as they were: a capture computes nothing."""
        for tensor, before in reversed(self.before):
            tensor.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            result.copy_(function(*args, **kwargs))

    def pool(self) -> None:
        return None


@contextmanager
def noting(graph: NotedOperations, **_: Any) -> Iterator[None]:
    with graph:
        yield
    graph.undo()


@pytest.fixture(autouse=True)
def cpu_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", NotedOperations)
    monkeypatch.setattr(torch.cuda, "graph", noting)


class Model:
    """A weight for each token, whose last micro-batch also halves the gradient, as a reduction would change it."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.arange(1.0, 9.0))
        self.runs: list[tuple[bool, bool]] = []

    def run(self, batch: MicroBatch, micro_batches: Tensor | int, *, is_first: bool, is_last: bool) -> Tensor:
        self.runs.append((is_first, is_last))
        found = self.weight[batch.tokens] * batch.labels
        loss = batch.mean((found if batch.document_starts is None else found + batch.document_starts).square())
        (loss / micro_batches).backward()
        if is_last:
            self.weight.grad.mul_(0.5)
        return loss.detach()


def steps_of(count: int, *, packed: bool, weighted: bool = False, length: int = 4) -> list[MicroBatch]:
    def drawn() -> Tensor:
        return torch.randint(8, (1, length))

    return [
        MicroBatch(drawn(), drawn(), drawn() if packed else None, torch.rand(1, length) if weighted else None)
        for _ in range(count)
    ]


def captured_and_not(
    *, last_differs: bool, documents: bool, packed: bool, weighted: bool = False
) -> CapturedMicroBatches:
    """Compares losses and gradients of captured steps with those of steps run in turn; returns the captured."""
    torch.manual_seed(0)
    ours, plain = Model(), Model()
    graphs = CapturedMicroBatches(ours.run, [ours.weight], last_differs=last_differs, documents=documents)
    for count in COUNTS:
        batches = steps_of(count, packed=packed, weighted=weighted)
        ours.weight.grad = plain.weight.grad = None
        expected = run_in_turn(plain.run, batches)
        copies = [replace(batch, tokens=batch.tokens.clone(), labels=batch.labels.clone()) for batch in batches]
        found = graphs.losses(copies)
        assert [loss.item() for loss in found] == [loss.item() for loss in expected]
        assert torch.equal(ours.weight.grad, plain.weight.grad)
    uncaptured = sum(COUNTS[:UNCAPTURED_STEPS])
    assert plain.runs[:uncaptured] == ours.runs[:uncaptured]
    assert len(ours.runs) == uncaptured + len(graphs.captured) or not graphs.captured
    return graphs


def test_captured_steps_are_those_run_in_turn():
    graphs = captured_and_not(last_differs=True, documents=True, packed=False)
    assert set(graphs.captured) == {(True, True), (True, False), (False, False), (False, True)}
    graphs.clear()
    assert not graphs.captured


def test_micro_batches_of_another_size_are_run_before_they_are_captured():
    """Of 4 tokens, then of 6: graphs of the former are gone, and kernels are run anew before others are captured."""
    torch.manual_seed(0)
    ours, plain = Model(), Model()
    graphs = CapturedMicroBatches(ours.run, [ours.weight], last_differs=True, documents=True)
    captured = []
    for step, length in enumerate([4] * 4 + [6] * 4):
        if step == 4:
            graphs.begin_anew()
        batches = steps_of(2, packed=False, length=length)
        ours.weight.grad = plain.weight.grad = None
        expected = run_in_turn(plain.run, batches)
        assert [loss.item() for loss in graphs.losses(batches)] == [loss.item() for loss in expected]
        assert torch.equal(ours.weight.grad, plain.weight.grad)
        captured.append(bool(graphs.captured))
    assert captured == [False, False, True, True] * 2


def test_packed_documents_are_captured_where_no_kernel_reads_them_on_the_host():
    assert captured_and_not(last_differs=True, documents=True, packed=True).captured
    assert not captured_and_not(last_differs=True, documents=False, packed=True).captured


def test_each_launch_takes_the_loss_weights_of_its_micro_batch():
    assert captured_and_not(last_differs=True, documents=True, packed=False, weighted=True).captured


class Chunk(nn.Module):
    """A part of a pipeline, which adds to the hidden stream what its weight makes of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 9.0))

    def forward(self, tokens, labels, *, hidden, document_starts):
        found = self.weight[tokens] * labels + (0 if document_starts is None else document_starts)
        return found.square() if hidden is None else found * hidden


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("is_first", [True, False])
def test_micro_batches_under_way_in_a_pipeline_have_slots_of_their_own(is_first, packed):
    """Up to three forwards wait for their backward, in two steps alike."""
    torch.manual_seed(0)
    ours, plain = Chunk(), Chunk()
    captured = CapturedChunk(ours)
    ours.weight.grad, plain.weight.grad = torch.zeros(8), torch.zeros(8)  # at the same place in every step
    for _ in range(2):
        ours.weight.grad.zero_()
        plain.weight.grad.zero_()
        batches = steps_of(6, packed=packed)
        hidden = [None if is_first else torch.rand(1, 4, requires_grad=True) for _ in batches]
        copies = [None if one is None else one.detach().clone().requires_grad_() for one in hidden]
        gradients = torch.rand(6, 1, 4)
        waiting, outputs = [], []

        def backward(number, found, expected, gradients=gradients):
            found.backward(gradients[number])
            expected.backward(gradients[number])

        for number, batch in enumerate(batches):
            found = captured(batch, copies[number])
            starts = batch.document_starts
            expected = plain(batch.tokens, batch.labels, hidden=hidden[number], document_starts=starts)
            assert torch.equal(found, expected)
            outputs.append((found, expected))
            waiting.append((number, found, expected))
            if len(waiting) == 3:
                backward(*waiting.pop(0))
        for one in waiting:
            backward(*one)
        assert torch.equal(ours.weight.grad, plain.weight.grad)
        assert all(torch.equal(found, expected) for found, expected in outputs)  # also once slots are used again
        assert is_first or all(torch.equal(a.grad, b.grad) for a, b in zip(copies, hidden, strict=True))
        assert len(captured.slots) == len(captured.free) == 3


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("reduces", [True, False])
def test_an_executor_says_what_its_graphs_may_hold(documents, reduces):
    model, rest = nn.Linear(2, 2), dict.fromkeys(("guard", "weights", "compute_weights", "fp8"))
    state = StepState(gradients=object() if reduces else None, **rest)
    graphs = AccumulatingExecutor(None, model, state, cuda_graphs=True, captures_documents=documents).graphs
    assert (graphs.last_differs, graphs.rule.documents) == (reduces, documents)
    assert list(map(id, graphs.parameters)) == list(map(id, model.parameters()))


def test_a_last_micro_batch_that_does_nothing_else_has_no_graph_of_its_own():
    model = Model()

    def run(batch: MicroBatch, micro_batches: Tensor | int, *, is_first: bool, is_last: bool) -> Tensor:
        return model.run(batch, micro_batches, is_first=is_first, is_last=False)

    graphs = CapturedMicroBatches(run, [model.weight], last_differs=False, documents=True)
    for count in COUNTS:
        model.weight.grad = None
        graphs.losses(steps_of(count, packed=False))
    assert set(graphs.captured) == {(True, False), (False, False)}


def test_what_cannot_be_captured_is_one_sentence():
    def run(batch: MicroBatch, micro_batches: Tensor | int, *, is_first: bool, is_last: bool) -> Tensor:
        if isinstance(micro_batches, Tensor):
            raise RuntimeError("operation not permitted\nwhen a stream is capturing")
        return torch.zeros(())

    graphs = CapturedMicroBatches(run, [], last_differs=False, documents=True)
    for _ in range(UNCAPTURED_STEPS):
        graphs.losses(steps_of(1, packed=False))
    with pytest.raises(ParallelError, match=r"\(operation not permitted\): set train.cuda_graphs=false$"):
        graphs.losses(steps_of(1, packed=False))
