"""Muon (arXiv 2502.16982) for the matrices of layers, and AdamW for everything else, as one optimizer.

torch.optim.Muon takes whole matrices and its numbers from the host. Here a rank may hold a share of a flat buffer, a
parameter may join several matrices, and the device decides whether a step is skipped, so the step is our own.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from sambalm.parallel.zero.deepspeed_adapter import FlatGroup
from sambalm.parallel.zero.parameter_info import info_of

ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # of https://kellerjordan.github.io/posts/muon
RMS_OF_ADAMW = 0.2  # of a step, about; with it learning rate and decay are AdamW's (arXiv 2502.16982, section 2.2)
SMALLEST_NORM = 1e-7


class Muon(Optimizer):
    """Steps parameter groups with `muon` set, and hands the others to AdamW.

    As a fused optimizer it divides gradients by `grad_scale` and skips the step where `found_inf` is 1, each fp32 [],
    where they are set. A matrix's momentum is the state `exp_avg`; there is no other.

    Args:
        adamw: over all groups. Its own step takes the groups without `muon`.
        momentum: of the gradients, with Nesterov's step ahead.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, adamw: Optimizer, *, momentum: float) -> None:
        super().__init__(adamw.param_groups, adamw.defaults)
        self.adamw: Any = adamw
        self.adamw.state = self.state
        self.momentum = momentum
        self.flat: dict[Tensor, FlatGroup] = {}  # by the share of it that this rank steps

    def share_out(self, groups: Sequence[FlatGroup], *, group: dist.ProcessGroup) -> None:
        """Tells how replicas share out the groups, in their order; each steps one flat share of a group."""
        self.group = group
        for settings, flat in zip(self.param_groups, groups, strict=True):
            (share,) = settings["params"]
            self.flat[share] = flat

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nobody evaluates a closure in it
        """Takes a step. Collective where replicas share out the groups."""
        for settings in self.param_groups:
            if settings["muon"]:
                self._step(settings)
        rest = [settings for settings in self.param_groups if not settings["muon"]]
        if rest:
            self.adamw.param_groups = rest
            self.adamw.grad_scale, self.adamw.found_inf = self.grad_scale, self.found_inf
            self.adamw.step()

    def _step(self, settings: dict[str, Any]) -> None:
        for weight in settings["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            kept = 1.0 if self.found_inf is None else 1.0 - self.found_inf
            state["step"].add_(kept)
            step = self._orthogonal(weight, self._direction(weight.grad, state["exp_avg"]))
            weight.mul_(1.0 - settings["lr"] * settings["weight_decay"] * kept)
            weight.sub_(step.mul_(settings["lr"] * kept))

    def _direction(self, gradient: Tensor, momentum: Tensor) -> Tensor:
        """Brings the momentum up to date, and returns what is to be orthogonalised."""
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        if self.found_inf is not None:
            gradient = torch.where(self.found_inf > 0, momentum, gradient)  # which leaves the momentum as it is
        momentum.lerp_(gradient, 1.0 - self.momentum)
        return gradient.lerp(momentum, self.momentum)

    def _orthogonal(self, weight: Tensor, direction: Tensor) -> Tensor:
        """Returns the step of a parameter, or of this rank's share of a flat buffer, at a learning rate of 1; fp32.

        A rank gathers the whole buffer and orthogonalises the matrices that its share has a part of.
        """
        flat = self.flat.get(weight)
        if flat is None:
            found = torch.zeros_like(direction)
            _orthogonalise(weight, direction, found)
            return found
        size, rank, elements = self.group.size(), self.group.rank(), direction.numel()
        direction = direction.to(_working_dtype(direction))
        whole = direction.new_empty(size * elements)
        dist.all_gather_into_tensor(whole, direction, group=self.group)
        found = torch.zeros_like(whole)
        first, last = rank * elements, (rank + 1) * elements
        for (parameter, given), (_, taken), offset in zip(
            flat.views(whole), flat.views(found), flat.offsets, strict=True
        ):
            if offset < last and offset + parameter.numel() > first:
                _orthogonalise(parameter, given, taken)
        return found[first:last].float()


def _orthogonalise(parameter: nn.Parameter | Tensor, given: Tensor, taken: Tensor) -> None:
    """Fills the step of a parameter, each of the matrices that it joins on its own; zeros that align it stay zeros."""
    for piece in info_of(parameter).slices:
        matrix = piece.of_local(given)
        scale = RMS_OF_ADAMW * math.sqrt(max(matrix.shape))
        piece.of_local(taken).copy_(orthogonal(matrix).mul_(scale))


def orthogonal(matrix: Tensor) -> Tensor:
    """Returns a matrix with the given one's singular vectors, and with singular values near 1, but for tiny ones.

    Args:
        matrix: [rows, columns]; products are in bf16 on a GPU and in fp32 elsewhere.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.t()).to(_working_dtype(matrix))
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.t()
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.t()


def _working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.bfloat16 if tensor.is_cuda else torch.float32
