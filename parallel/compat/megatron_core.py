"""The parts of megatron-core that the product uses. No other file imports it."""

from sambalm.parallel.compat.uncompiled import nothing_compiled

with nothing_compiled():
    from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import schedules

__all__ = ["ModelParallelConfig", "ModelType", "parallel_state", "schedules", "tensor_parallel"]
