"""AdamW's step on a GPU in one launch for all tensors of a parameter group (source/adamw.cu)."""

import math

import torch
from torch import Tensor

from sambalm.model.ops.cuda.memory import INPUTS
from sambalm.model.ops.cuda.nvrtc import kernel
from sambalm.parallel.zero.parameter_info import find_info

THREADS, CHUNK = 256, 16384  # of a block, and elements that it takes of one tensor


class CudaAdamW(torch.optim.AdamW):
    """torch.optim.AdamW of fp32 parameters on a GPU, with the same state.

    As torch's fused one it divides gradients by `grad_scale` and skips the step where `found_inf` is 1, each fp32 [],
    where they are set. Gradients stay as they are, which torch's would overwrite: a pass over memory less. Weights'
    copies in 16 bits (`ComputeWeights`) are written with them.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nobody evaluates a closure in it
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._step(weights, group)

    def _step(self, weights: list[Tensor], group: dict) -> None:
        # Alive until the launch.
        gradients = [weight.grad.contiguous() for weight in weights if weight.grad is not None]
        states = [self._state_of(weight) for weight in weights]
        copies = [_compute_weight(weight) for weight in weights]
        steps = [state["step"] for state in states]
        # A list, since the host would read a tensor for all, and wait.
        torch._foreach_add_(steps, 1.0 if self.found_inf is None else [1.0 - self.found_inf] * len(steps))
        rows, blocks = [], 0
        for weight, gradient, copy, state in zip(weights, gradients, copies, states, strict=True):
            tensors = (weight, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"], copy)
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            rows.append([*addresses, weight.numel(), blocks])
            blocks += math.ceil(weight.numel() / CHUNK)
        # Pinned, so that the host does not wait for the copy.
        table = torch.tensor(rows, dtype=torch.int64, pin_memory=True).to(weights[0].device, non_blocking=True)
        factors = map(float, (group["lr"], *group["betas"], group["eps"], group["weight_decay"]))
        (copied,) = {copy.dtype for copy in copies if copy is not None} or {torch.bfloat16}
        defines = {"THREADS": THREADS, "CHUNK": CHUNK, "INPUT": INPUTS[copied]}
        run = kernel("adamw", "elements.cuh", "adamw.cu", defines=defines)
        run((blocks, 1, 1), THREADS, table, len(rows), self.grad_scale, self.found_inf, *factors)

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state


def _compute_weight(weight: Tensor) -> Tensor | None:
    """Returns the weight's copy in 16 bits that the step writes with it, if there is one."""
    info = find_info(weight)
    return info.compute_weights.to_write(weight) if info and info.compute_weights else None
