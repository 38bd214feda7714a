"""megatron-core's modules, imported when they are first used: that takes two seconds, which a plan does not need."""

import importlib
from typing import Any


class _Module:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        module = getattr(importlib.import_module("sambalm.parallel.compat.megatron_core"), self._name)
        return getattr(module, attribute)


parallel_state = _Module("parallel_state")
tensor_parallel = _Module("tensor_parallel")
