"""A step that the host has handed to the device, and may go on from before the device is through."""

import time
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sambalm.pretrain.lifecycle.signals import Request


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, as all ranks see it."""

    tokens: int  # of the run so far
    batch_tokens: int
    loss: float  # mean over the global batch, nats per token
    grad_norm: float  # before clipping
    lr: float
    step_time_s: float
    skipped: bool  # whether the optimizer left weights and moments as they were


@dataclass(frozen=True)
class Moment:
    """When the device has done all that it was handed so far; on a CPU, which is never behind, now."""

    host_s: float
    event: torch.cuda.Event | None

    @classmethod
    def after_all(cls, device: torch.device) -> Self:
        event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if event:
            event.record()
        return cls(time.perf_counter(), event)

    def seconds_since(self, earlier: "Moment") -> float:
        """Waits for this moment."""
        if self.event is None or earlier.event is None:
            return self.host_s - earlier.host_s
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


@dataclass(frozen=True)
class LaunchedStep:
    """What is known of a step at its launch; the rest is on its way to the host."""

    number: int  # of the step, from 1
    tokens: int  # of the run so far
    batch_tokens: int
    lr: float
    start: Moment
    end: Moment
    # Loss, gradient norm, whether skipped, and what ranks agreed on; fp64 [3 + agreed] on the host, at the step's end.
    values: Tensor

    @classmethod
    def launch(
        cls,
        *,
        number: int,
        tokens: int,
        batch_tokens: int,
        lr: float,
        start: Moment,
        loss: Tensor,
        norm: Tensor,
        skipped: Tensor,
        agreed: Tensor,
    ) -> Self:
        """
        Args:
            start: when the device was through with what came before the step.
            loss, norm, skipped: [] on the device.
            agreed: what the run is asked for and the hooks' votes, the largest of all ranks; [1 + hooks] on the device.
        """
        found = torch.cat([torch.stack([loss.double(), norm.double(), skipped.double()]), agreed.double()])
        if found.is_cuda:
            found = torch.empty(found.shape, dtype=torch.float64, pin_memory=True).copy_(found, non_blocking=True)
        end = Moment.after_all(loss.device)
        return cls(number, tokens, batch_tokens, lr, start=start, end=end, values=found)

    @property
    def is_finished(self) -> bool:
        """Whether reading the results waits for nothing."""
        return self.end.event is None

    def result(self) -> StepResult:
        """Waits for the device."""
        step_time_s = self.end.seconds_since(self.start)
        loss, norm, skipped, *_ = self.values.tolist()
        return StepResult(
            tokens=self.tokens,
            batch_tokens=self.batch_tokens,
            loss=loss,
            grad_norm=norm,
            lr=self.lr,
            step_time_s=step_time_s,
            skipped=bool(skipped),
        )

    def request(self) -> Request:
        """What any rank was asked for before the step's end. Waits for the device."""
        return Request(self._agreed()[0])

    def votes(self) -> list[int]:
        """The largest of all ranks' votes, by hook. Waits for the device."""
        return self._agreed()[1:]

    def _agreed(self) -> list[int]:
        if self.end.event:
            self.end.event.synchronize()
        return [int(value) for value in self.values[3:].tolist()]
