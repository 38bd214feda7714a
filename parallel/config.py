"""How a run is spread over ranks."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sambalm.parallel.errors import ParallelError


class ParallelConfig(BaseModel):
    """Sizes of the layout's dimensions; what they leave of the world is data parallel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensor: int = Field(1, gt=0, description="Tensor-parallel ranks: heads, channels and widths of each layer are cut")
    sequence: bool = Field(False, description="Cut activations along the sequence over them between matrix products")
    pipeline: Literal[1] = Field(1, description="Pipeline stages")
    virtual_pipeline: Literal[1] = Field(1, description="Model chunks a pipeline stage")
    context: Literal[1] = Field(1, description="Context-parallel ranks: the sequence is cut through whole layers")
    zero_stage: Literal[1, 2, 3] = Field(
        1,
        description="DeepSpeed ZeRO: 1 cuts optimizer states over data-parallel ranks, 2 gradients, 3 weights too",
    )

    @model_validator(mode="after")
    def _check_sequence(self) -> "ParallelConfig":
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "parallel.sequence is true while parallel.tensor is 1: sequence parallelism runs over the "
                "tensor-parallel ranks, so set parallel.tensor to 2 or more or parallel.sequence to false"
            )
        return self

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model between them."""
        return self.tensor * self.pipeline * self.context


def check_world_size(config: ParallelConfig, *, world_size: int) -> None:
    """Raises ParallelError unless whole copies of the model fill the world."""
    if world_size % config.model_ranks:
        raise ParallelError(
            f"{world_size} processes cannot hold whole copies of a model spread over {config.model_ranks} "
            f"(parallel.tensor {config.tensor}): start a multiple of {config.model_ranks} processes or lower "
            "parallel.tensor"
        )
