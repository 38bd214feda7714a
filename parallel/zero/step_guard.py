"""What decides, on the device and alike on all ranks, whether the optimizer takes a step."""

from collections.abc import Callable

import torch
from torch import Tensor

from sambalm.parallel.groups import World

NO_LIMIT = torch.finfo(torch.float32).max  # which every finite number passes, and no other


class StepGuard:
    """Lets the optimizer skip a step whose loss or gradient norm is not finite or beyond a limit.

    Limits, loss, norm and verdict stay on the device, so that the host waits for none of them. All ranks see the same
    loss and norm, which collectives have summed, and so come to the same verdict.

    Attributes:
        before_update: called in each step, in their order, between the last backward and the optimizer. The weights are
            then still those that the step's forwards have read, on every layout.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._loss_limit = torch.full((), NO_LIMIT, device=world.device)
        self._norm_limit = torch.full((), NO_LIMIT, device=world.device)
        self.loss: Tensor  # of the step at hand: the mean over all ranks, fp32 []
        self.before_update: list[Callable[[], None]] = []

    def set_limits(self, *, loss: float, norm: float) -> None:
        """Sets the largest loss, in nats per token, and the largest norm of the steps to come; NO_LIMIT for none."""
        self._loss_limit.fill_(loss)
        self._norm_limit.fill_(norm)

    def after_backward(self, loss: Tensor) -> None:
        """Takes this rank's mean loss of a step, fp32 [], before the optimizer is called. Collective."""
        self.loss = self._world.sum_over_replicas(loss) / self._world.replica_size
        for call in self.before_update:
            call()

    def skips(self, norm: Tensor) -> Tensor:
        """Returns 1.0 where the step is to be skipped, else 0.0, fp32 [].

        Args:
            norm: of the step's whole gradient before clipping, [] on any device.
        """
        norm = norm.to(self._norm_limit.device, non_blocking=True)
        passes = (norm <= self._norm_limit) & (self.loss <= self._loss_limit)
        return passes.logical_not().float()
