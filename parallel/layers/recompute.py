"""Activations computed again in the backward instead of kept."""

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """function(*args), keeping its inputs alone; the backward runs it again. It must not draw random numbers."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
