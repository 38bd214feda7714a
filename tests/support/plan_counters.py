"""Counters of tensor bytes and of communication for holding the planner's formulas against real runs."""

import weakref
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPERATIONS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "send": "send",
}
INPUT_IS_SECOND = ("_allgather_base_", "_reduce_scatter_base_")
SINGLE_NUMBERS_BYTES = 16


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are alive: now and at most. Meta tensors have none."""

    def __init__(self) -> None:
        super().__init__()
        self.now_bytes = self.peak_bytes = 0
        self.known: set[int] = set()

    def leave_out(self, tensors: list[Tensor]) -> None:
        self.known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.now_bytes)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now_bytes -= size


class HandedBytes(TorchDispatchMode):
    """Bytes of the tensors handed to collectives of several ranks and to sends; single numbers are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("c10d::")
        if func.namespace == "c10d" and name in OPERATIONS and self._ranks(args) > 1:
            given = args[1] if name in INPUT_IS_SECOND else args[0]
            size = sum(tensor.nbytes for tensor in tree_leaves(given) if isinstance(tensor, Tensor))
            self.by_operation[OPERATIONS[name]] += size if size > SINGLE_NUMBERS_BYTES else 0
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _ranks(args: tuple) -> int:
        groups = (arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        return dist.ProcessGroup.unbox(next(groups)).size()
