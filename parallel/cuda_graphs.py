"""Micro-batches that are launched as CUDA graphs.

A micro-batch is thousands of kernels, most of them shorter than the host takes to launch one, and the device waits
between them. As a graph they are launched at once, with what ranks send each other on the way.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sambalm.parallel.errors import ParallelError
from sambalm.parallel.micro_batch import MicroBatch
from sambalm.parallel.transfer import to_device

UNCAPTURED_STEPS = 2  # in which kernels are compiled, loaded and chosen, and ranks connect, which cannot be captured


@contextmanager
def captured_graph(pool: Any = None) -> Iterator[torch.cuda.CUDAGraph]:
    """Captures what is inside as a graph, instead of running it.

    Args:
        pool: the memory of other graphs, to share it; None: memory of its own.

    Raises:
        ParallelError: it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # NCCL has a thread that looks after its messages all the while; only this one's calls are to be refused.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield graph
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ParallelError(
            f"a micro-batch could not be captured as a CUDA graph ({reason}): set train.cuda_graphs=false"
        ) from error


def fixed_copy(batch: MicroBatch) -> MicroBatch:
    """Returns a micro-batch on its device whose tensors a graph may read at each launch, after `fill`."""
    # Starts come from the CPU, so that moving them makes a tensor of the graph's own.
    starts = None if batch.document_starts is None else to_device(batch.document_starts, batch.tokens.device)
    weights = None if batch.loss_weights is None else batch.loss_weights.clone()
    return MicroBatch(batch.tokens.clone(), batch.labels.clone(), starts, weights)


def fill(fixed: MicroBatch, batch: MicroBatch) -> None:
    """Writes a micro-batch into a `fixed_copy` of another."""
    fixed.tokens.copy_(batch.tokens)
    fixed.labels.copy_(batch.labels)
    if fixed.document_starts is not None and batch.document_starts is not None:
        fixed.document_starts.copy_(to_device(batch.document_starts, batch.tokens.device))
    if fixed.loss_weights is not None and batch.loss_weights is not None:
        fixed.loss_weights.copy_(batch.loss_weights)


class Run(Protocol):
    """Runs a micro-batch's forward and backward."""

    def __call__(self, batch: MicroBatch, micro_batches: Tensor | int, *, is_first: bool, is_last: bool) -> Tensor:
        """Adds the gradients of one of a step's micro_batches to the parameters' and returns its loss, fp32 []."""


def run_in_turn(run: Run, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Runs a step's micro-batches one after the other, and returns their losses."""
    count = len(micro_batches)
    return [
        run(batch, count, is_first=number == 1, is_last=number == count)
        for number, batch in enumerate(micro_batches, start=1)
    ]


@dataclass(frozen=True)
class Captured:
    """A micro-batch's forward and backward as a graph, with the tensors that it reads and writes at each launch.

    Attributes:
        batch: its inputs.
        micro_batches: how many the step has, fp32 [].
        loss: fp32 [].
        gradients: of all parameters, in their order; None where a parameter has none.
    """

    graph: torch.cuda.CUDAGraph
    batch: MicroBatch
    micro_batches: Tensor
    loss: Tensor
    gradients: list[Tensor | None]


class CaptureRule:
    """Says which steps are launched as CUDA graphs.

    Args:
        documents: whether documents' starts are taken on the device alone; else packed documents run uncaptured.
    """

    def __init__(self, *, documents: bool) -> None:
        self.documents = documents
        self.begin_anew()

    def begin_anew(self) -> None:
        """Leaves the first steps with micro-batches of another size uncaptured, too."""
        self.uncaptured_steps = UNCAPTURED_STEPS

    def captures(self, micro_batches: Sequence[MicroBatch]) -> bool:
        """Says whether a step is captured, once for each."""
        packed = any(batch.document_starts is not None for batch in micro_batches)
        captured = self.uncaptured_steps == 0 and (self.documents or not packed)
        self.uncaptured_steps = max(0, self.uncaptured_steps - 1)
        return captured


class CapturedMicroBatches:
    """Runs micro-batches as `run` does, to the same bits.

    A step's first micro-batch has a graph of its own, which writes gradients where steps start without. Where the last
    differs, so has the last, and one that is both. All graphs use the same memory, which stays reserved from step to
    step until `clear`.

    Gradients that are there before the first micro-batch must lie at the same place in every step.

    Args:
        run: must do the same for each first, each last and each other micro-batch, and on all ranks.
        last_differs: whether `run` does anything else for the last.
        documents: of `CaptureRule`.
    """

    def __init__(self, run: Run, parameters: Iterable[nn.Parameter], *, last_differs: bool, documents: bool) -> None:
        self.run, self.parameters, self.last_differs = run, list(parameters), last_differs
        self.rule = CaptureRule(documents=documents)
        self.captured: dict[tuple[bool, bool], Captured] = {}  # by whether it is first, and a last that differs

    def losses(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Runs a step's micro-batches.

        Raises:
            ParallelError: a micro-batch cannot be captured.
        """
        return run_in_turn(self._replay if self.rule.captures(micro_batches) else self.run, micro_batches)

    def clear(self) -> None:
        """Gives the graphs' memory back; the next step captures them again, in a fraction of a second."""
        if self.captured:
            self.captured.clear()
            torch.cuda.empty_cache()

    def begin_anew(self) -> None:
        """Prepares for micro-batches of another size, whose first steps are not captured either."""
        self.clear()
        self.rule.begin_anew()

    def _replay(self, batch: MicroBatch, micro_batches: Tensor | int, *, is_first: bool, is_last: bool) -> Tensor:
        kind = is_first, is_last and self.last_differs
        if kind not in self.captured:
            self.captured[kind] = self._capture(batch, is_first=is_first, is_last=is_last)
        captured = self.captured[kind]
        fill(captured.batch, batch)
        captured.micro_batches.fill_(micro_batches)
        captured.graph.replay()
        for parameter, gradient in zip(self.parameters, captured.gradients, strict=True):
            parameter.grad = gradient
        return captured.loss.clone()

    def _capture(self, batch: MicroBatch, *, is_first: bool, is_last: bool) -> Captured:
        """Captures a graph, which computes nothing yet. It will add to gradients that parameters have by now."""
        batch, micro_batches = fixed_copy(batch), torch.ones((), device=batch.tokens.device)
        pool = next((other.graph.pool() for other in self.captured.values()), None)
        with captured_graph(pool) as graph:
            loss = self.run(batch, micro_batches, is_first=is_first, is_last=is_last)
        return Captured(graph, batch, micro_batches, loss, [parameter.grad for parameter in self.parameters])
