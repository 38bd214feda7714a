"""Mamba's keys of the section `model`."""

import math
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, Field, model_validator


class MambaSizes(BaseModel):
    """Sizes and initial step sizes of Mamba-1 (arXiv 2406.07522, section 2.1 and its reference code)."""

    if TYPE_CHECKING:
        hidden_size: int  # of the model

    d_state: int = Field(16, gt=0, description="Mamba states per channel")
    d_conv: int = Field(4, gt=1, description="Taps of Mamba's causal convolution")
    expand: int = Field(2, gt=0, description="Mamba's inner width over hidden_size")
    dt_rank: int | None = Field(None, gt=0, description="Rank of Mamba's step sizes; null: ceil(hidden_size / 16)")
    dt_min: float = Field(1e-3, gt=0, description="Smallest initial step size (log-uniform up to dt_max)")
    dt_max: float = Field(1e-1, gt=0, description="Largest initial step size")
    dt_floor: float = Field(1e-4, gt=0, description="Floor of the initial step size")

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.dt_min > self.dt_max:
            raise ValueError(f"model.dt_min is {self.dt_min}, above model.dt_max {self.dt_max}")
        return self

    @property
    def inner_size(self) -> int:
        """Width of Mamba's inner stream (d_inner)."""
        return self.expand * self.hidden_size

    @property
    def dt_rank_size(self) -> int:
        return self.dt_rank or math.ceil(self.hidden_size / 16)
