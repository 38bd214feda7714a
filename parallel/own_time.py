"""How long a rank works for itself: the time of a step without what it waits for messages.

Every message passes through a method of a process group, and a wait for one through `Work.wait`. Both are replaced for
the time of a measured block. On GPUs, events around them say how long the device waited; the host does not. Messages
within a CUDA graph are not seen, so a rank's wait for others in one counts as its own time.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

MESSAGES = {
    dist.Work: ["wait"],
    dist.ProcessGroup: [
        *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "gather", "scatter", "barrier", "send", "recv"),
        *("allgather", "_allgather_base", "allgather_into_tensor_coalesced", "all_gather_single"),
        *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "reduce_scatter_single"),
        *("alltoall", "alltoall_base", "all_to_all_single", "_end_coalescing"),
    ],
}


@dataclass
class _Block:
    """The start and the end of a measured block and of each wait in it: events on a GPU, else seconds."""

    ends: list[tuple[Any, Any]] = field(default_factory=list)  # the block's own come last


class OwnTime:
    """Measures blocks of the thread that makes it, and of autograd's threads meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda, self._thread = device.type == "cuda", threading.current_thread()
        self._blocks: dict[int, _Block] = {}

    @contextmanager
    def measured(self, number: int) -> Iterator[None]:
        """Measures a block, under a number that is higher than those before."""
        block = self._blocks[number] = _Block()
        with ExitStack() as replaced:
            for owner, names in MESSAGES.items():
                for name in names:
                    if method := vars(owner).get(name):  # getattr would return a function that no longer binds self
                        setattr(owner, name, self._timed(method, block))
                        replaced.callback(setattr, owner, name, method)
            start = self._now()
            yield
            block.ends.append((start, self._now()))

    def take(self, until: int) -> list[float]:
        """Removes blocks with numbers up to one, and returns the seconds of each. The device must be through them."""
        numbers = [number for number in self._blocks if number <= until]
        return [self._seconds(self._blocks.pop(number)) for number in numbers]

    def _timed(self, method: Callable[..., Any], block: _Block) -> Callable[..., Any]:
        @wraps(method)
        def timed(*args: Any, **named: Any) -> Any:
            if not self._counts():
                return method(*args, **named)
            start = self._now()
            try:
                return method(*args, **named)
            finally:
                block.ends.append((start, self._now()))

        return timed

    def _counts(self) -> bool:
        """Whether the calling thread works for the block; events cannot be recorded for a graph."""
        thread = threading.current_thread()
        ours = thread is self._thread or thread.name.startswith("Dummy-")  # as Python calls a thread of C++
        return ours and not (self._is_cuda and torch.cuda.is_current_stream_capturing())

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, block: _Block) -> float:
        *waits, whole = (self._difference(*ends) for ends in block.ends)
        return whole - sum(waits)

    def _difference(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._is_cuda else end - start
