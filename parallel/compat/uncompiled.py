"""Imports of packages that hand functions of their own to `torch.compile` as they are imported, without the compiler.

None of those functions runs here, and PyTorch's compiler takes seconds to import.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Goes around imports."""
    module: Any = torch
    compiler, module.compile = module.compile, _as_it_is
    try:
        yield
    finally:
        module.compile = compiler


def _as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Stands for `torch.compile` as a call and as a decorator with options."""
    return function if function else _as_it_is
