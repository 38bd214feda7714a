"""Tensors that products and optimizers take for parameters of the product."""

from typing import TypeVar

from torch import Tensor

from sambalm.parallel.zero.parameter_info import ParameterInfo, attach_info

T = TypeVar("T", bound=Tensor)


def described(parameter: T) -> T:
    """Gives a tensor the info that a weight of matrix products alone has, and returns it."""
    attach_info(parameter, ParameterInfo((), owned=True, matmul_only=True, weight_decay=True))
    return parameter
