"""What the product's adapter needs of DeepSpeed beyond its public interface, one line a member."""

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

VERSION = "0.19.8"  # of which the adapter was written


@dataclass(frozen=True)
class Member:
    """A private or replaced member of DeepSpeed.

    Attributes:
        name: as the adapter writes it.
        owner: what has it; a key of `owners`.
        stages: of ZeRO, under which it is there.
        holds: whether a value is what the adapter takes it for.
        file: of DeepSpeed, below its package.
    """

    name: str
    owner: str
    stages: tuple[int, ...]
    holds: Callable[[Any], bool]
    file: str


def _tensors(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(tensor, torch.Tensor) for tensor in value)


def _lists(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(inner, list) for inner in value)


def _lists_of_tensors(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_tensors, value))


STAGE_1_2, ENGINE = "runtime/zero/stage_1_and_2.py", "runtime/engine.py"
LINKAGE = "utils/mixed_precision_linkage.py"
MEMBERS = (
    Member("build_shm_op", "communication", (0, 1), callable, "comm/torch.py"),
    Member("enable_backward_allreduce", "engine", (0, 1), lambda value: isinstance(value, bool), ENGINE),
    Member("_global_grad_norm", "engine", (0, 1), lambda value: value is None, ENGINE),
    Member("_global_grad_norm", "optimizer", (1,), lambda value: value == 0.0, STAGE_1_2),
    Member("optimizer", "optimizer", (1,), lambda value: isinstance(value, torch.optim.AdamW), STAGE_1_2),
    Member("averaged_gradients", "optimizer", (1,), lambda value: value == {}, STAGE_1_2),
    Member("reduce_gradients", "optimizer", (1,), callable, STAGE_1_2),
    Member("bit16_groups_flat", "optimizer", (1,), _tensors, STAGE_1_2),
    Member("round_robin_bit16_groups", "optimizer", (1,), _lists_of_tensors, STAGE_1_2),
    Member("round_robin_bit16_offsets", "optimizer", (1,), _lists, STAGE_1_2),
    Member("parallel_partitioned_bit16_groups", "optimizer", (1,), _lists_of_tensors, STAGE_1_2),
    Member("_update_model_bit16_weights", "optimizer", (1,), callable, STAGE_1_2),
    Member("single_partition_of_fp32_groups", "optimizer", (1,), _tensors, STAGE_1_2),
    Member("_lazy_init_hp_params_optimizer_state", "optimizer", (1,), callable, STAGE_1_2),
    Member("_hp_mapping", "parameter", (1,), lambda value: hasattr(value, "lp_fragment"), LINKAGE),
    Member("lp_fragment", "mapping", (1,), torch.is_tensor, "utils/tensor_fragment.py"),
    Member("lp_fragment_address", "mapping", (1,), lambda value: hasattr(value, "numel"), "utils/tensor_fragment.py"),
    Member("get_hp_fragment", "mapping", (1,), callable, "utils/tensor_fragment.py"),
)
# What no other file of the product may mention. `optimizer` is too common a name for that.
PRIVATE_NAMES = {member.name for member in MEMBERS if member.name != "optimizer"}


def owners(engine: Any) -> dict[str, Any]:
    """What a rank's engine has members on, by `Member.owner`."""
    parameters = list(engine.module.parameters())
    # A rank has no mapping of a parameter that it steps nothing of.
    mapped = [parameter for parameter in parameters if getattr(parameter, "_hp_mapping", None) is not None]
    return {
        "communication": importlib.import_module("deepspeed.comm.torch"),
        "engine": engine,
        "optimizer": engine.optimizer,
        "parameter": (mapped or parameters)[0],
        "mapping": mapped[0]._hp_mapping if mapped else None,
    }


def breaches(found: dict[str, Any], *, stage: int) -> Iterator[str]:
    """Sentences about what a stage's engine lacks or has otherwise than the adapter takes it for."""
    version, missing = importlib.metadata.version("deepspeed"), object()
    for member in MEMBERS:
        if stage not in member.stages:
            continue
        value = getattr(found[member.owner], member.name, missing)
        if value is missing or not member.holds(value):
            fault = "is gone" if value is missing else "is no longer what it was"
            yield (
                f"DeepSpeed {version} under ZeRO-{stage}: {member.owner}.{member.name} ({member.file}) "
                f"{fault}, which parallel/zero/deepspeed_adapter.py needs as it was in {VERSION}"
            )
