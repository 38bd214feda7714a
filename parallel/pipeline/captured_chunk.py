"""A pipeline's chunk whose forwards and backwards are launched as CUDA graphs.

A pipeline has several micro-batches between their forward and their backward. Each of them has a slot: a graph of the
forward, one of the backward, and memory of its own, with the activations between the two. Slots are made when a
schedule first needs one more, and used again once their backward is through; a step takes them in the same order as the
step before.
"""

import heapq
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sambalm.parallel.cuda_graphs import captured_graph, fill, fixed_copy
from sambalm.parallel.micro_batch import MicroBatch


@dataclass(frozen=True)
class Slot:
    """A micro-batch's forward and backward as graphs, with the tensors that they read and write at each launch.

    Attributes:
        batch, hidden: the forward's inputs; hidden is the chunk before's output, None for the first chunk.
        output: the forward's.
        gradient: of the output, the backward's input.
    """

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    batch: MicroBatch
    hidden: Tensor | None
    output: Tensor
    gradient: Tensor


class CapturedChunk:
    """Runs a chunk as its module does, to the same bits, forward and backward.

    The gradients of the module's parameters must be there before the first forward, and lie at the same place in every
    step: the backward adds to them.

    Args:
        module: called with (tokens, labels, hidden=, document_starts=); has run a few times.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.slots: list[Slot] = []
        self.free: list[int] = []
        self.anchor = torch.zeros((), requires_grad=True)  # the input of a chunk that has none with a gradient

    def __call__(self, batch: MicroBatch, hidden: Tensor | None) -> Tensor:
        """Returns the module's output.

        Raises:
            ParallelError: the chunk cannot be captured.
        """
        if not self.free:
            self.slots.append(self._capture(batch, hidden))
            self.free.append(len(self.slots) - 1)
        return _Replay.apply(self.anchor if hidden is None else hidden, self, heapq.heappop(self.free), batch)

    def _capture(self, batch: MicroBatch, hidden: Tensor | None) -> Slot:
        """Captures both graphs, which compute nothing yet."""
        batch = fixed_copy(replace(batch, loss_weights=None))  # the schedule takes the mean
        hidden = None if hidden is None else hidden.detach().clone().requires_grad_()
        with captured_graph() as forward:
            output = self.module(batch.tokens, batch.labels, hidden=hidden, document_starts=batch.document_starts)
        gradient = torch.zeros_like(output)
        with captured_graph(forward.pool()) as backward:
            torch.autograd.backward(output, gradient)
        return Slot(forward, backward, batch, hidden, output.detach(), gradient)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, chunk: CapturedChunk, number: int, batch: MicroBatch) -> Tensor:
        ctx.chunk, ctx.number, slot = chunk, number, chunk.slots[number]
        if slot.hidden is not None:
            slot.hidden.detach().copy_(hidden)
        fill(slot.batch, batch)
        slot.forward.replay()
        return slot.output.clone()  # it is on its way to the next stage when the slot is used again

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        slot = ctx.chunk.slots[ctx.number]
        slot.gradient.copy_(gradient)
        slot.backward.replay()
        heapq.heappush(ctx.chunk.free, ctx.number)
        return None if slot.hidden is None else slot.hidden.grad.clone(), None, None, None
