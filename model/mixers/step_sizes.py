"""The initial step sizes of layers with a state, which their sections of a config share. Imports no torch."""

from typing import ClassVar, Self

from pydantic import BaseModel, Field, model_validator


class StepSizes(BaseModel):
    """Step sizes are drawn log-uniform between two numbers, and are not below a third."""

    step_section: ClassVar[str] = ""  # before the keys where an error names them

    dt_min: float = Field(1e-3, gt=0, description="Smallest initial step size (log-uniform up to dt_max)")
    dt_max: float = Field(1e-1, gt=0, description="Largest initial step size")
    dt_floor: float = Field(1e-4, gt=0, description="Floor of the initial step size")

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.dt_min > self.dt_max:
            section = self.step_section
            raise ValueError(f"{section}dt_min is {self.dt_min}, above {section}dt_max {self.dt_max}")
        return self
