"""How a run is spread over ranks."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sambalm.parallel.errors import ParallelError


class ParallelConfig(BaseModel):
    """Sizes of the layout's dimensions; what they leave of the world is data parallel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensor: int = Field(1, gt=0, description="Tensor-parallel ranks: heads, channels and widths of each layer are cut")
    sequence: bool = Field(False, description="Cut activations along the sequence over them between matrix products")
    context: int = Field(1, gt=0, description="Context-parallel ranks: each sequence is cut, through whole layers")
    pipeline: int = Field(1, gt=0, description="Pipeline stages: the model's layers are cut into so many parts")
    virtual_pipeline: int = Field(1, gt=0, description="Parts of the model on each pipeline stage, taken in turns")
    pipeline_layers: list[Annotated[int, Field(gt=0)]] | None = Field(
        None, description="Sublayers of each part in the model's order; null: balanced by their operations"
    )
    zero_stage: Literal[1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO: 1 cuts optimizer states over data-parallel ranks, 2 gradients, 3 weights too"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="What the backward computes again instead of keeping: the scan's and attention's insides, or all",
    )
    timeout_s: float = Field(
        1800.0,
        gt=0,
        le=604_800,
        description="How long ranks wait for each other in any message or agreement before the run fails, in seconds",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "ParallelConfig":
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "parallel.sequence is true while parallel.tensor is 1: sequence parallelism runs over the "
                "tensor-parallel ranks, so set parallel.tensor to 2 or more or parallel.sequence to false"
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"parallel.virtual_pipeline is {self.virtual_pipeline} while parallel.pipeline is 1: set "
                "parallel.pipeline to 2 or more or parallel.virtual_pipeline to 1"
            )
        if self.pipeline > 1 and self.zero_stage > 1:
            raise ValueError(
                f"parallel.zero_stage is {self.zero_stage} while parallel.pipeline is {self.pipeline}: ZeRO-2 and "
                "ZeRO-3 reduce gradients in each backward, layer by layer, of which a pipeline has several in turns, "
                "so set parallel.zero_stage to 1"
            )
        if self.pipeline_layers is not None and len(self.pipeline_layers) != self.model_chunks:
            raise ValueError(
                f"parallel.pipeline_layers is {self.pipeline_layers}: it needs parallel.pipeline x "
                f"parallel.virtual_pipeline = {self.model_chunks} entries"
            )
        return self

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model, and work on one sequence, between them."""
        return self.tensor * self.pipeline * self.context

    def replicas(self, world_size: int) -> int:
        """Ranks with the same weights, of the data and the context dimension; where it is one, there is no ZeRO."""
        return world_size // (self.tensor * self.pipeline)

    def partitions_gradients(self, world_size: int) -> bool:
        """Whether a rank keeps its share of the layers' gradients alone, of every micro-batch (ZeRO-2 and ZeRO-3)."""
        return self.zero_stage > 1 and self.replicas(world_size) > 1

    def partitions_weights(self, world_size: int) -> bool:
        """Whether a rank keeps its share of the layers' weights alone (ZeRO-3)."""
        return self.zero_stage > 2 and self.replicas(world_size) > 1

    def overlaps_messages(self, world_size: int) -> bool:
        """Whether replicas reduce gradients within backwards and gather weights within forwards."""
        return self.pipeline == 1 and self.replicas(world_size) > 1

    @property
    def model_chunks(self) -> int:
        """Chunks that the layers are cut into."""
        return self.pipeline * self.virtual_pipeline


def layout_name(config: ParallelConfig, *, world_size: int) -> str:
    """A layout in a few words, such as 'TP2+SP CP2 PP4x2 ZeRO-1'; a dimension of one is left out."""
    parts = []
    if config.tensor > 1:
        parts.append(f"TP{config.tensor}" + ("+SP" if config.sequence else ""))
    if config.context > 1:
        parts.append(f"CP{config.context}")
    if config.pipeline > 1:
        chunks = f"x{config.virtual_pipeline}" if config.virtual_pipeline > 1 else ""
        parts.append(f"PP{config.pipeline}{chunks}")
    shared = config.replicas(world_size) > 1
    return " ".join([*parts, f"ZeRO-{config.zero_stage}" if shared else "no ZeRO"])


def check_world_size(config: ParallelConfig, *, world_size: int) -> None:
    """Raises ParallelError unless whole copies of the model fill the world."""
    if world_size % config.model_ranks:
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        raise ParallelError(
            f"{processes} cannot hold whole copies of a model spread over {config.model_ranks} "
            f"(parallel.tensor {config.tensor} x parallel.pipeline {config.pipeline} x parallel.context "
            f"{config.context}): start a multiple of {config.model_ranks} processes, as with `torchrun "
            f"--nproc-per-node {config.model_ranks} -m sambalm.pretrain.cli train ...`, or lower one of the three"
        )
