"""A step that the host has handed to the device, and may go on from before the device is through."""

import time
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sambalm.pretrain.metrics import StepResult


@dataclass
class LaunchedStep:
    """What is known of a step at its launch; loss and gradient norm are on their way to the host."""

    number: int  # of the step, from 1
    tokens: int  # of the run so far
    batch_tokens: int
    lr: float
    start_s: float  # of time.perf_counter
    values: Tensor  # loss and gradient norm, fp64 [2] on the host
    copied: torch.cuda.Event | None  # None where the values are there already

    @classmethod
    def launch(
        cls, *, number: int, tokens: int, batch_tokens: int, lr: float, start_s: float, loss: Tensor, norm: Tensor
    ) -> Self:
        """
        Args:
            loss, norm: [] on the device.
        """
        found = torch.stack([loss.double(), norm.double()])
        if not found.is_cuda:
            return cls(number, tokens, batch_tokens, lr, start_s, found, None)
        values = torch.empty(2, dtype=torch.float64, pin_memory=True).copy_(found, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return cls(number, tokens, batch_tokens, lr, start_s, values, copied)

    @property
    def is_finished(self) -> bool:
        """Whether reading the results waits for nothing."""
        return self.copied is None

    def finish(self, *, previous_end_s: float) -> tuple[StepResult, float]:
        """Waits for the device. The step's time runs from the end of the previous step if that was after its launch.

        Returns:
            The result, and when the step ended.
        """
        if self.copied:
            self.copied.synchronize()
        end_s = time.perf_counter()
        loss, norm = self.values.tolist()
        result = StepResult(
            tokens=self.tokens,
            batch_tokens=self.batch_tokens,
            loss=loss,
            grad_norm=norm,
            lr=self.lr,
            step_time_s=end_s - max(self.start_s, previous_end_s),
        )
        return result, end_s
