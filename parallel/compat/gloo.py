"""gloo's groups on one thread for their messages: torch gives each group its own, which wakes 120 times a second."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


@contextmanager
def shared_thread() -> Iterator[None]:
    """Goes around the making of groups: those of gloo send through the default group's devices, if that is gloo's."""
    module: Any = distributed_c10d
    own, cpu, group = module.ProcessGroupGloo, torch.device("cpu"), distributed_c10d._get_default_group()
    default: Any = group._get_backend(cpu) if cpu in group._device_types else None

    class Group(distributed_c10d.ProcessGroupGloo):
        def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
            options: Any = own._Options()
            options._devices, options._threads = default.options._devices, default.options._threads
            options._timeout = timeout
            super().__init__(store, rank, size, options)

    if isinstance(default, own):
        module.ProcessGroupGloo = Group
    try:
        yield
    finally:
        module.ProcessGroupGloo = own
