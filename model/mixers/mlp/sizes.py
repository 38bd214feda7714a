"""The MLP's key of the section `model`."""

from pydantic import BaseModel, Field


class MLPSizes(BaseModel):
    """The width of the MLP."""

    mlp_size: int = Field(gt=0, description="Inner width of the SwiGLU MLP")
