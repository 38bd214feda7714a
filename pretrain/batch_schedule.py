"""How many samples a step takes: the same number always, or a ramp up to it."""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field


class BatchRamp(BaseModel):
    """A global batch that grows in equal increments while the first tokens of a run are consumed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start_tokens: int = Field(gt=0, description="Tokens of the first steps' global batch")
    increment_tokens: int = Field(gt=0, description="Tokens by which it grows at a time")
    ramp_tokens: int = Field(
        gt=0, description="Tokens after which it is train.global_batch_tokens; each size lasts alike"
    )


@dataclass(frozen=True)
class BatchSchedule:
    """Sizes in samples. A step's size follows from the samples consumed before it and from nothing else.

    `ramp_samples` is 0 without a ramp; `start` and `increment` lead to `final`.
    """

    final: int
    start: int
    increment: int
    ramp_samples: int

    def sizes(self) -> list[int]:
        """Every size that occurs, in order."""
        return [*range(self.start, self.final, self.increment), self.final]

    def step_samples(self, consumed_samples: int) -> int:
        """Samples of the step that comes after `consumed_samples`."""
        for size, end in self._stages():
            if consumed_samples < end:
                return size
        return self.final

    def consumed_samples(self, steps: int) -> int:
        """Samples of the first `steps` steps."""
        consumed = 0
        for size, end in self._stages():
            taken = min(steps, max(0, -(-(end - consumed) // size)))
            steps, consumed = steps - taken, consumed + taken * size
        return consumed + steps * self.final

    def _stages(self) -> Iterator[tuple[int, int]]:
        """Each size below the final one and the number of samples at which it ends."""
        growing = self.sizes()[:-1]
        for number, size in enumerate(growing, start=1):
            yield size, -(-self.ramp_samples * number // len(growing))
