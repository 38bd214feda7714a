"""Pipeline parallelism: megatron-core's schedules (1F1B and interleaved) over this rank's chunks of a model."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sambalm.parallel.compat.megatron_core import ModelParallelConfig, ModelType, schedules
from sambalm.parallel.groups import World
from sambalm.parallel.micro_batch import MicroBatch
from sambalm.parallel.pipeline.captured_chunk import CapturedChunk

Reduce = Callable[[MicroBatch, Tensor], Tensor]
Loss = Callable[[Tensor], tuple[Tensor, Tensor]]


class ScheduledChunk(nn.Module):
    """One chunk of the model as the schedules know it; they set its input before each call."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, module: nn.Module, config: ModelParallelConfig) -> None:
        super().__init__()
        self.module, self.config = module, config
        self.hidden: Tensor | None = None
        self.captured: CapturedChunk | None = None  # runs the module, where that is launched as CUDA graphs

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        (self.hidden,) = tensors

    def forward(self, batch: MicroBatch) -> Tensor:
        if self.captured:
            return self.captured(batch, self.hidden)
        return self.module(batch.tokens, batch.labels, hidden=self.hidden, document_starts=batch.document_starts)


class PipelineSchedule:
    """Runs micro-batches through the stages.

    Args:
        modules: this rank's chunks of the model in order; called with (tokens, labels, hidden=the output of the chunk
            before, document_starts=the micro-batch's).
        hidden_size, dtype: of the activations between chunks.
    """

    def __init__(self, modules: Sequence[nn.Module], *, world: World, hidden_size: int, dtype: torch.dtype) -> None:
        pipeline = world.pipeline
        config = ModelParallelConfig(
            tensor_model_parallel_size=world.tensor.size,
            sequence_parallel=world.tensor.sequence,
            context_parallel_size=world.context.size,
            pipeline_model_parallel_size=pipeline.size,
            virtual_pipeline_model_parallel_size=pipeline.chunks if pipeline.chunks > 1 else None,
            pipeline_dtype=dtype,
            # With two stages the interleaved schedule's batched messages mix up its two directions, silently.
            overlap_p2p_comm=pipeline.chunks > 1,
            batch_p2p_comm=pipeline.chunks == 1,
            # The device would wait for each message, because of a fault of PyTorch before 1.13 (pytorch#82450).
            batch_p2p_sync=False,
            deallocate_pipeline_outputs=False,
        )
        # The schedules read these two of a TransformerConfig, which a model that is none does not have.
        config.hidden_size, config.fine_grained_activation_offloading = hidden_size, False
        self.world = world
        self.chunks = [ScheduledChunk(module, config) for module in modules]

    def capture(self) -> None:
        """Has chunks launched as CUDA graphs in the steps to come, until `release`."""
        for chunk in self.chunks:
            chunk.captured = chunk.captured or CapturedChunk(chunk.module)

    def release(self) -> None:
        """Gives the graphs' memory back; chunks are launched kernel by kernel."""
        for chunk in self.chunks:
            chunk.captured = None

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Adds a step's gradients (of the mean over the micro-batches) to the parameters' and returns the mean loss."""
        losses = self._run(micro_batches, forward_only=False, reduce=MicroBatch.mean)
        mean = torch.stack(losses).mean() if losses else torch.zeros((), device=self.world.device)
        return self.world.from_last_stage(mean)

    @torch.no_grad()
    def losses(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Losses of each micro-batch, fp32 [batch, this rank's part of the sequence], on every stage."""
        # The interleaved schedule takes whole rounds of the stages; what fills the last one up is dropped.
        filled = [*micro_batches, *[micro_batches[-1]] * (-len(micro_batches) % self.world.pipeline.size)]
        found = self._run(filled, forward_only=True, reduce=lambda _, losses: losses)
        found = found or [torch.zeros_like(batch.tokens, dtype=torch.float32) for batch in filled]
        return list(self.world.from_last_stage(torch.stack(found)))[: len(micro_batches)]

    def _run(self, micro_batches: Sequence[MicroBatch], *, forward_only: bool, reduce: Reduce) -> list[Tensor]:
        def loss(batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
            # The schedule multiplies by the context-parallel size, for losses that are sums over it; ours are means.
            return batch.mean(output) / self.world.context.size, reduce(batch, output.detach())

        def forward(iterator: Iterator[MicroBatch], chunk: ScheduledChunk) -> tuple[Tensor, Loss]:
            batch = next(iterator)
            return chunk(batch), partial(loss, batch)

        tokens = micro_batches[0].tokens
        return schedules.get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(micro_batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            seq_length=tokens.shape[1] * self.world.context.size,
            micro_batch_size=tokens.shape[0],
            forward_only=forward_only,
        )
