"""Mamba's keys of the section `model`."""

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from sambalm.model.mixers.step_sizes import StepSizes


class MambaSizes(StepSizes):
    """Sizes and initial step sizes of Mamba-1 (arXiv 2406.07522, section 2.1 and its reference code)."""

    step_section: ClassVar = "model."
    if TYPE_CHECKING:
        hidden_size: int  # of the model

    d_state: int = Field(16, gt=0, description="Mamba states per channel")
    d_conv: int = Field(4, gt=1, description="Taps of Mamba's causal convolution")
    expand: int = Field(2, gt=0, description="Mamba's inner width over hidden_size")
    dt_rank: int | None = Field(None, gt=0, description="Rank of Mamba's step sizes; null: ceil(hidden_size / 16)")

    @property
    def inner_size(self) -> int:
        """Width of Mamba's inner stream (d_inner)."""
        return self.expand * self.hidden_size

    @property
    def dt_rank_size(self) -> int:
        return self.dt_rank or math.ceil(self.hidden_size / 16)
