"""The parts of megatron-core that the product uses, imported without the compiler: the only file that imports it.

megatron-core hands functions of its own to `torch.compile` as it is imported, none of which runs here. That alone
would load PyTorch's compiler: half of the seconds in which a rank starts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    module: Any = torch
    compiler, module.compile = module.compile, _as_it_is
    try:
        yield
    finally:
        module.compile = compiler


def _as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Stands for `torch.compile` as a call and as a decorator with options."""
    return function if function else _as_it_is


with _nothing_compiled():
    from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import schedules

__all__ = ["ModelParallelConfig", "ModelType", "parallel_state", "schedules", "tensor_parallel"]
