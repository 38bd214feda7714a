"""The paper's initialisation (arXiv 2406.07522, appendix A, and its reference code): fills of whole canonical tensors.

Each function fills a tensor in place from a generator, or returns such a fill. A fill sees the whole canonical tensor,
whatever a rank holds of it, so it may give each channel or head a value of its own.

The fill of a tensor whose steps depend on the model's width or depth also says how (`step`, which `model/scaling.py`
reads). All other tensors take the same steps in every model.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sambalm.model.config import ModelConfig
from sambalm.model.mixers.step_sizes import StepSizes
from sambalm.parallel.sharding import Init


def ones(tensor: Tensor, generator: Generator) -> None:
    tensor.fill_(1.0)


def zeros(tensor: Tensor, generator: Generator) -> None:
    tensor.zero_()


@dataclass(frozen=True)
class Constant:
    """One number everywhere; steps are in proportion to it."""

    value: float

    @property
    def step(self) -> float:
        return self.value

    def __call__(self, tensor: Tensor, generator: Generator) -> None:
        tensor.fill_(self.value)


def normal(std: float) -> Init:
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


@dataclass(frozen=True)
class Linear:
    """PyTorch's default for linear and convolution weights and biases: uniform within scale / sqrt(fan_in).

    Initial weights are independent, so a sum over fan_in of them grows with its root. Steps are not, so theirs shrink
    with fan_in (arXiv 2203.03466, table 3).
    """

    fan_in: int
    scale: float = 1.0

    @property
    def step(self) -> float:
        return self.scale / self.fan_in

    def __call__(self, tensor: Tensor, generator: Generator) -> None:
        bound = self.scale / math.sqrt(self.fan_in)
        tensor.uniform_(-bound, bound, generator=generator)


def linear(fan_in: int, *, scale: float = 1.0) -> Linear:
    return Linear(fan_in, scale)


def residual_linear(fan_in: int, config: ModelConfig) -> Linear:
    """For projections that write the residual stream: the default over the root of the number of such writes."""
    return Linear(fan_in, 1.0 / math.sqrt(len(config.pattern)))


def dt_bias(config: StepSizes) -> Init:
    """The inverse softplus of log-uniform step sizes."""

    def fill(tensor: Tensor, generator: Generator) -> None:
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = tensor.uniform_(low, high, generator=generator).exp_().clamp_(min=config.dt_floor)
        tensor.copy_(dt + torch.log(-torch.expm1(-dt)))

    return fill


def log_uniform(low: float, high: float) -> Init:
    """The logarithm of numbers that are uniform within two bounds."""
    return lambda tensor, generator: tensor.uniform_(low, high, generator=generator).log_()


def a_log(tensor: Tensor, generator: Generator) -> None:
    """log(1), ..., log(d_state) in every channel (S4D-real)."""
    tensor.copy_(torch.arange(1, tensor.shape[1] + 1, dtype=tensor.dtype).log())


def head_a_log(tensor: Tensor, generator: Generator) -> None:
    """The logarithm of a decay rate between 1 and 16 for every head, uniform (arXiv 2405.21060's code)."""
    tensor.copy_(tensor.uniform_(1, 16, generator=generator).log())
