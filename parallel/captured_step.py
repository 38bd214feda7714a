"""Steps of a model that one GPU trains alone, whose micro-batches are launched as CUDA graphs.

A micro-batch is thousands of kernels, most of them shorter than the host takes to launch one, and the device waits
between them. As a graph they are launched at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sambalm.parallel.errors import ParallelError
from sambalm.parallel.pipeline import MicroBatch
from sambalm.parallel.zero import Engine

UNCAPTURED_STEPS = 2  # in which kernels are compiled, loaded and chosen, which cannot be captured


@dataclass(frozen=True)
class Captured:
    """A micro-batch's forward and backward. It reads its inputs, and leaves its results, where they were captured."""

    graph: torch.cuda.CUDAGraph
    batch: MicroBatch
    micro_batches: Tensor  # of the step, fp32 []
    loss: Tensor  # fp32 []
    gradients: list[Tensor | None]  # of all parameters, in their order


class CapturedModel:
    """`execution.WholeModel` for a world of one GPU, with the same results.

    Two graphs: a step's first micro-batch writes the gradients, the others add to them. Both use the same memory, which
    stays reserved from step to step; for `losses` it is given back. Packed documents, whose lengths differ from step to
    step, run uncaptured.

    Raises:
        ParallelError: of train_step, where the micro-batch cannot be captured.
    """

    def __init__(self, engine: Engine, model: nn.Module) -> None:
        self.engine, self.model = engine, model
        self.parameters = list(model.parameters())
        self.uncaptured_steps = UNCAPTURED_STEPS
        self.captured: dict[bool, Captured] = {}  # for a step's first micro-batch, and for the others

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        packed = any(batch.document_starts is not None for batch in micro_batches)
        capture = not packed and self.uncaptured_steps == 0
        losses = []
        for number, batch in enumerate(micro_batches):
            if capture:
                losses.append(self._run_captured(batch, first=number == 0, micro_batches=len(micro_batches)))
            else:
                losses.append(self._run(batch, len(micro_batches)))
        self.uncaptured_steps = max(0, self.uncaptured_steps - 1)
        self.engine.step()
        return torch.stack(losses).mean()

    @torch.no_grad()
    def losses(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        self.captured.clear()  # a fraction of a second to capture again, against memory that longer sequences may need
        torch.cuda.empty_cache()
        self.model.eval()
        losses = [self._forward(batch) for batch in micro_batches]
        self.model.train()
        return losses

    def _forward(self, batch: MicroBatch) -> Tensor:
        return self.model(batch.tokens, batch.labels, document_starts=batch.document_starts)

    def _run(self, batch: MicroBatch, micro_batches: Tensor | int) -> Tensor:
        """Adds to the gradients; the loss, fp32 []."""
        loss = self._forward(batch).mean()
        (loss / micro_batches).backward()
        return loss.detach()

    def _run_captured(self, batch: MicroBatch, *, first: bool, micro_batches: int) -> Tensor:
        if first not in self.captured:
            self.captured[first] = self._capture(batch)
        captured = self.captured[first]
        captured.batch.tokens.copy_(batch.tokens)
        captured.batch.labels.copy_(batch.labels)
        captured.micro_batches.fill_(micro_batches)
        captured.graph.replay()
        for parameter, gradient in zip(self.parameters, captured.gradients, strict=True):
            parameter.grad = gradient  # the engine's step took it away
        return captured.loss.clone()

    def _capture(self, batch: MicroBatch) -> Captured:
        """Nothing is computed yet. Parameters that have a gradient get it added to."""
        batch = MicroBatch(batch.tokens.clone(), batch.labels.clone())
        micro_batches = torch.ones((), device=batch.tokens.device)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.graph.pool() for other in self.captured.values()), None)
        try:
            with torch.cuda.graph(graph, pool=pool):
                loss = self._run(batch, micro_batches)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ParallelError(
                f"a micro-batch could not be captured as a CUDA graph ({reason}): set train.cuda_graphs=false"
            ) from error
        return Captured(graph, batch, micro_batches, loss, [parameter.grad for parameter in self.parameters])
