"""A step over a global batch, on the whole model or on a pipeline of model chunks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sambalm.parallel.cuda_graphs import CapturedMicroBatches, CaptureRule, run_in_turn
from sambalm.parallel.groups import World
from sambalm.parallel.layers.fp8 import Fp8Store
from sambalm.parallel.layers.linear import fuse_gradient_accumulation
from sambalm.parallel.micro_batch import MicroBatch
from sambalm.parallel.pipeline.schedule import PipelineSchedule
from sambalm.parallel.zero.buckets import GradientBucket, completed_together
from sambalm.parallel.zero.clipping import clip_before_steps
from sambalm.parallel.zero.compute_weights import ComputeWeights
from sambalm.parallel.zero.deepspeed_adapter import Engine, ShardedOptimizer, adamw
from sambalm.parallel.zero.engine import tensors_of_run
from sambalm.parallel.zero.gradients import FlatGradients
from sambalm.parallel.zero.muon import Muon
from sambalm.parallel.zero.partitioned_gradients import PartitionedGradients
from sambalm.parallel.zero.step_guard import StepGuard
from sambalm.parallel.zero.weights import FlatWeights


class Executor(Protocol):
    """How a rank takes its part in a step. Every method but `close` is collective.

    Attributes:
        engine: holds the weights and the optimizer.
        guard: decides whether the optimizer takes a step, and has the step's mean loss over all ranks.
    """

    engine: Engine
    guard: StepGuard

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Takes an optimizer step on this rank's micro-batches, or skips it; returns their mean loss, fp32 [].

        Args:
            micro_batches: whose loss weights, where they have some, `weighted` has scaled.
        """

    def losses(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Returns losses of each micro-batch without training, fp32 [batch, this rank's sequence shard]."""

    def close(self) -> None:
        """Ends what the process groups would wait for when they are destroyed; by default there is nothing."""
        return

    def begin_anew(self) -> None:
        """Prepares for micro-batches of another size; by default there is nothing to prepare."""
        return

    def release(self) -> None:
        """Frees the memory of weights, gradients and optimizer. The executor and its model are of no use afterwards.

        A ZeRO-1 engine outlives its last reference and the collector, for a reason that has not been found: so only the
        storage goes.
        """
        self.close()
        for tensor in (*tensors_of_run(self.engine), *self.buffers()):
            tensor.untyped_storage().resize_(0)

    def buffers(self) -> list[Tensor]:
        """Returns what the executor has made besides the engine's tensors; by default there is nothing."""
        return []


@dataclass(frozen=True)
class StepState:
    """What a step fills and empties besides the engine's tensors.

    Attributes:
        gradients: how they are reduced, where ranks share out their optimizer; None elsewhere.
        weights: how they are gathered, likewise.
        compute_weights: those of the rank's chunks.
        fp8: the scales of the chunks' products in FP8; None: there are none.
    """

    guard: StepGuard
    gradients: FlatGradients | None
    weights: FlatWeights | None
    compute_weights: ComputeWeights
    fp8: Fp8Store | None

    def buffers(self) -> list[Tensor]:
        gradients, weights = self.gradients, self.weights
        flat = [*gradients.buffers, *gradients.shares] if gradients else []
        if weights:
            flat += [*weights.buffers, *weights.shares, *(weights.partitioned.tensors if weights.partitioned else ())]
        return [*flat, *self.compute_weights.copies.values()]


@contextmanager
def evaluating(engine: Engine) -> Iterator[None]:
    engine.eval()
    with torch.no_grad():
        yield
    engine.train()


class AccumulatingExecutor(Executor):
    """Every rank runs all layers, and DeepSpeed's engine takes the step.

    Args:
        cuda_graphs: whether micro-batches are launched as CUDA graphs, whose memory is free during `losses`.
        captures_documents: see `build_executor`.
    """

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        state: StepState,
        *,
        cuda_graphs: bool,
        captures_documents: bool,
    ) -> None:
        self.engine, self.model, self.state, self.guard = engine, model, state, state.guard
        self.gradients, self.weights = state.gradients, state.weights
        self.compute_weights, self.fp8, self.graphs = state.compute_weights, state.fp8, None
        if cuda_graphs:
            reduces = state.gradients is not None
            self.graphs = CapturedMicroBatches(
                self._run, model.parameters(), last_differs=reduces, documents=captures_documents
            )

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        if self.gradients:
            self.gradients.clear()
        if self.weights:
            self.weights.stale = False  # once the first micro-batch, or its graph, has gathered them
        else:
            self.compute_weights.update()
        with self.compute_weights.kept(), self.fp8.kept() if self.fp8 else nullcontext():
            losses = self.graphs.losses(micro_batches) if self.graphs else run_in_turn(self._run, micro_batches)
        if self.fp8:
            self.fp8.finish_step()
        loss = torch.stack(losses).mean()
        self.guard.after_backward(loss)
        self.engine.step()
        return loss

    def losses(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        self.close()  # longer sequences may need the memory
        if self.weights:
            self.weights.gather()
        with evaluating(self.engine):
            return [self._forward(batch) for batch in micro_batches]

    def close(self) -> None:
        if self.graphs:
            self.graphs.clear()

    def begin_anew(self) -> None:
        if self.graphs:
            self.graphs.begin_anew()

    def buffers(self) -> list[Tensor]:
        return self.state.buffers()

    def _forward(self, batch: MicroBatch) -> Tensor:
        return self.model(batch.tokens, batch.labels, document_starts=batch.document_starts)

    def _run(self, batch: MicroBatch, micro_batches: Tensor | int, *, is_first: bool, is_last: bool) -> Tensor:
        with (
            self.weights.arriving() if self.weights and is_first else nullcontext(),
            self.fp8.renewing() if self.fp8 and is_first else nullcontext(),
        ):
            loss = batch.mean(self._forward(batch))
        gradients = self.gradients
        with gradients.accumulating(is_first=is_first, is_last=is_last) if gradients else nullcontext():
            (loss / micro_batches).backward()
        return loss.detach()


class PipelinedExecutor(Executor):
    """Ranks hold model chunks: megatron-core's schedule fills the gradients, DeepSpeed's engine takes the step.

    Args:
        schedule: over this rank's chunks.
        state: under ZeRO-1 alone with gradients and weights.
        cuda_graphs: see `build_executor`. Without FP8, whose weights a step's first micro-batch rounds, chunks are
            launched as CUDA graphs, whose memory is free during `losses`.
        captures_documents: see `build_executor`.
        embedding_group: the first and the last stage.
        tied_weight: this rank's copy of an embedding that these two share; None elsewhere.
    """

    def __init__(
        self,
        engine: Engine,
        schedule: PipelineSchedule,
        state: StepState,
        *,
        cuda_graphs: bool,
        captures_documents: bool,
        embedding_group: dist.ProcessGroup | None,
        tied_weight: nn.Parameter | None,
    ) -> None:
        self.engine, self.schedule, self.state, self.guard = engine, schedule, state, state.guard
        self.gradients, self.weights = state.gradients, state.weights
        self.compute_weights, self.fp8 = state.compute_weights, state.fp8
        self.embedding_group, self.tied_weight = embedding_group, tied_weight
        self.rule = CaptureRule(documents=captures_documents) if cuda_graphs and state.fp8 is None else None
        self.own_gradients: list[Tensor] = []  # where graphs add up those that no replica has a part in

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        captured = self.rule is not None and self.rule.captures(micro_batches)
        if captured:
            self.schedule.capture()
        self._clear(captured=captured)
        if not self.weights:
            self.compute_weights.update()
        with (
            self.compute_weights.kept(),
            self.fp8.kept() if self.fp8 else nullcontext(),
            self.fp8.renewing() if self.fp8 else nullcontext(),
            self.gradients.overwritten() if self.gradients and not captured else nullcontext(),
        ):
            loss = self.schedule.train_step(micro_batches)
        if self.fp8:
            self.fp8.finish_step()
        if self.tied_weight is not None:
            dist.all_reduce(self.tied_weight.grad, group=self.embedding_group)
        if self.gradients:
            self.gradients.reduce()
        self.guard.after_backward(loss)
        self.engine.step()
        if self.weights:
            self.weights.gather()
        return loss

    def _clear(self, *, captured: bool) -> None:
        """Prepares parameters' gradients. Graphs, the same for all micro-batches, add to what is there."""
        if self.gradients:
            self.gradients.clear(everything=captured)
        elif captured:
            parameters = list(self.engine.module.parameters())
            self.own_gradients = self.own_gradients or [torch.empty_like(parameter) for parameter in parameters]
            torch._foreach_zero_(self.own_gradients)
            for parameter, gradient in zip(parameters, self.own_gradients, strict=True):
                parameter.grad = gradient

    def losses(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        self.close()  # longer sequences may need the memory
        with evaluating(self.engine):
            return self.schedule.losses(micro_batches)

    def close(self) -> None:
        if self.rule and self.rule.uncaptured_steps == 0:
            self.schedule.release()
            torch.cuda.empty_cache()

    def begin_anew(self) -> None:
        self.close()
        if self.rule:
            self.rule.begin_anew()

    def buffers(self) -> list[Tensor]:
        return [*self.own_gradients, *self.state.buffers()]


def build_executor(
    engine: Engine,
    chunks: Sequence[nn.Module],
    *,
    world: World,
    zero_stage: int,
    buckets: Sequence[GradientBucket],
    hidden_size: int,
    dtype: torch.dtype,
    recompute_layers: bool,
    tied_weight: nn.Parameter | None,
    clip_norm: float,
    cuda_graphs: bool,
    captures_documents: bool,
    fp8: Fp8Store | None,
) -> Executor:
    """Returns the way to run this rank's model chunks, which the engine holds.

    Args:
        zero_stage: what replicas share out: 1 the optimizer's state, 2 gradients as well, 3 weights as well.
        buckets: those of the engine's optimizer.
        dtype: of activations and matrix products.
        recompute_layers: whether the backward runs layers again; products then convert weights at each use.
        fp8: the scales of the chunks' products in FP8; None: there are none.
        captures_documents: whether no kernel reads the documents of a micro-batch on the host.
    """
    guard = StepGuard(world)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    fuse_gradient_accumulation(parameters)
    compute_weights = ComputeWeights([] if recompute_layers or dtype == torch.float32 else parameters)
    gradients = weights = None
    if world.replica_size > 1:
        if isinstance(optimizer := adamw(engine), Muon):
            optimizer.share_out(ShardedOptimizer(engine).groups, group=world.replica_group)
        kind = PartitionedGradients if zero_stage > 1 else FlatGradients
        gradients = kind(engine, world, buckets=buckets, clip_norm=clip_norm, guard=guard)
        partitioned = completed_together(buckets) if zero_stage == 3 else []
        weights = FlatWeights(
            engine, chunks, world=world, dtype=dtype, compute_weights=compute_weights, partitioned=partitioned
        )
    else:
        clip_before_steps(engine.optimizer, max_norm=clip_norm, group=world.model_group, guard=guard)
    state = StepState(guard, gradients, weights, compute_weights, fp8)
    captured = cuda_graphs and world.device.type == "cuda"
    if world.pipeline.size > 1:
        schedule = PipelineSchedule(chunks, world=world, hidden_size=hidden_size, dtype=dtype)
        return PipelinedExecutor(
            engine,
            schedule,
            state,
            cuda_graphs=captured,
            captures_documents=captures_documents,
            embedding_group=world.pipeline.embedding_group,
            tied_weight=tied_weight,
        )
    return AccumulatingExecutor(engine, chunks[0], state, cuda_graphs=captured, captures_documents=captures_documents)
