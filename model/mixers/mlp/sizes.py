"""The width of the MLP, and that of the second MLP of a model."""

from pydantic import BaseModel, ConfigDict, Field


class MLPSizes(BaseModel):
    """The width of the MLP."""

    mlp_size: int = Field(gt=0, description="Inner width of the SwiGLU MLP")


class MLP2Sizes(BaseModel):
    """The width of the layers `=`, which are MLPs in the place of a mixer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(gt=0, description="Inner width of the SwiGLU MLP")
