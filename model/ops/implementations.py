"""The implementations of each operation, best first, and what each can do on any device. Needs no torch.

The registry chooses a run's kernels by these limits and by what the device and its packages add to them; the planner
chooses a plan's by the limits alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from sambalm.model.ops.cuda.conv_sizes import MAX_TAPS
from sambalm.model.ops.cuda.scan_sizes import D_STATES
from sambalm.model.ops.errors import KernelError


@dataclass(frozen=True)
class AttentionCall:
    """The sizes of one call of an attention kernel; queries are the last of the keys' positions."""

    batch: int
    query_heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    window: int  # positions that a query sees, itself included


@dataclass(frozen=True)
class KernelRequirements:
    """What a run asks of its kernels."""

    device: str  # the type of its device: cuda or cpu
    precision: Literal["bf16", "fp16", "fp32"]  # of activations
    d_state: int = 16  # states of a channel that the scan holds
    d_conv: int = 4  # taps of the convolution
    operations: tuple[str, ...] = ()  # of BY_MIXERS, those that a layer of the model computes
    delta_key_dims: tuple[int, ...] = ()  # channels of a key of the delta rule, in each kind of layer with one
    initial_states: bool = False  # whether the scan must start from given states
    resets: bool = False  # whether sequences hold several documents, which must not see each other
    attention_calls: tuple[AttentionCall, ...] = ()  # every one of a training step; none where they are not known


@dataclass(frozen=True)
class Implementation:
    """What one implementation of an operation needs and what it can do."""

    module: str | None = None  # Python module that it imports; None: torch is enough
    is_extra: bool = False  # whether that module has to be installed besides PyTorch's CUDA build
    is_compiled: bool = False  # by torch.compile
    runs_on_cpu: bool = False
    half_only: bool = False  # computes in bf16 and fp16 alone
    takes_initial_states: bool = True
    takes_documents: bool = True
    reads_documents: bool = False  # on the host, which a CUDA graph has no part in
    may_decline: bool = False  # whether it may raise DeclinedError when it is called
    max_d_state: int | None = None
    max_d_conv: int | None = None
    max_delta_key_dim: int | None = None
    min_head_dim: int = 1
    max_head_dim: int | None = None
    head_dim_multiple: int = 1

    def declines(self, requirements: KernelRequirements) -> str | None:
        """Why no device can give a run what it requires with this implementation; None when one can."""
        d_state, d_conv = requirements.d_state, requirements.d_conv
        if self.half_only and requirements.precision == "fp32":
            return "it computes in bf16 or fp16, not fp32"
        if requirements.initial_states and not self.takes_initial_states:
            return "it takes no initial state, which context parallelism needs"
        if requirements.resets and not self.takes_documents:
            return "it does not keep packed documents apart, which data.reset_at_document needs"
        if self.max_d_state is not None and d_state > self.max_d_state:
            return f"model.d_state is {d_state} and it holds at most {self.max_d_state} states"
        if self.max_d_conv is not None and d_conv > self.max_d_conv:
            return f"model.d_conv is {d_conv} and it holds at most {self.max_d_conv} taps"
        key_dim = max(requirements.delta_key_dims, default=0)
        if self.max_delta_key_dim is not None and key_dim > self.max_delta_key_dim:
            return f"the delta rule's head_dim is {key_dim} and it takes {self.max_delta_key_dim} at most"
        for head_dim in sorted({call.head_dim for call in requirements.attention_calls}):
            if reason := self._declines_head_dim(head_dim):
                return f"the head dim is {head_dim} and {reason}"
        return None

    def _declines_head_dim(self, head_dim: int) -> str | None:
        if head_dim < self.min_head_dim:
            return f"it takes at least {self.min_head_dim}"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"it takes at most {self.max_head_dim}"
        if head_dim % self.head_dim_multiple:
            return f"it takes multiples of {self.head_dim_multiple}"
        return None


FLA_MAX_KEY_DIM = 256  # fla/ops/kda/chunk.py refuses wider keys
_NVRTC = "cuda.bindings.nvrtc"  # comes with PyTorch's CUDA build
_IN_TORCH = Implementation(runs_on_cpu=True)
# By operation and name, best first. The last of each runs everywhere.
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {
    "scan": {
        "cuda": Implementation(_NVRTC, max_d_state=max(D_STATES)),
        "mamba-ssm": Implementation(
            "mamba_ssm.ops.selective_scan_interface", is_extra=True, takes_initial_states=False, takes_documents=False
        ),
        "torch": _IN_TORCH,
    },
    "conv": {
        # csrc/causal_conv1d.cpp raises an error for more taps.
        "causal-conv1d": Implementation("causal_conv1d", is_extra=True, max_d_conv=4),
        "cuda": Implementation(_NVRTC, max_d_conv=MAX_TAPS),
        "torch": _IN_TORCH,
    },
    "attention": {
        # nvidia-cudnn-frontend. Which shapes cuDNN computes only it knows (attention/cudnn.py).
        "cudnn": Implementation("cudnn", is_extra=True, half_only=True, takes_documents=False, may_decline=True),
        # Triton's products are of 16 elements at least.
        "flex": Implementation(is_compiled=True, half_only=True, min_head_dim=16),
        "torch-flash": Implementation(half_only=True, max_head_dim=256, head_dim_multiple=8, reads_documents=True),
        "flash-attn": Implementation(
            "flash_attn", is_extra=True, half_only=True, max_head_dim=256, reads_documents=True
        ),
        "torch": _IN_TORCH,
    },
    "norm": {
        "compiled": Implementation(is_compiled=True),
        # PyPI's `apex` is another project; NVIDIA's is the one with this module.
        "apex": Implementation("apex.normalization.fused_layer_norm", is_extra=True),
        "torch": _IN_TORCH,
    },
    "elementwise": {"compiled": Implementation(is_compiled=True), "torch": _IN_TORCH},
    "delta_rule": {
        # fla-core, whose products are in half precision.
        "fla": Implementation(
            "fla.ops", is_extra=True, half_only=True, reads_documents=True, max_delta_key_dim=FLA_MAX_KEY_DIM
        ),
        "torch": _IN_TORCH,
    },
    "linear_attention": {
        "fla": Implementation("fla.ops", is_extra=True, half_only=True, reads_documents=True),
        "torch": _IN_TORCH,
    },
    "ssd": {"mamba-ssm": Implementation("mamba_ssm.ops.triton.ssd_combined", is_extra=True), "torch": _IN_TORCH},
    "optimizer": {"cuda": Implementation(_NVRTC), "torch-fused": _IN_TORCH},
}

# Operations that only some mixers have. A run without such a layer takes PyTorch's and names none.
BY_MIXERS = frozenset({"delta_rule", "linear_attention", "ssd"})


def why_unasked(operation: str, name: str, requirements: KernelRequirements) -> str | None:
    """Why a run has no use for the implementation of an operation; None where a layer of its model computes it."""
    if operation in BY_MIXERS.difference(requirements.operations) and IMPLEMENTATIONS[operation][name] is not _IN_TORCH:
        return "no layer of model.pattern computes it"
    return None


def reads_documents(chosen: Mapping[str, str]) -> bool:
    """Whether the host reads each micro-batch's documents for any of the implementations, by operation and name."""
    return any(IMPLEMENTATIONS[operation][name].reads_documents for operation, name in chosen.items())


def choose(operation: str, asked: str, declines: Callable[[str], str | None]) -> str:
    """The name of an operation's implementation.

    Args:
        asked: a name, or auto for the first one that is not declined.
        declines: says why the implementation of a name cannot run, or None.

    Raises:
        KernelError: an implementation is asked for that cannot run.
    """
    if asked == "auto":
        return next(name for name in IMPLEMENTATIONS[operation] if not declines(name))
    if reason := declines(asked):
        raise KernelError(f"kernels.{operation} is {asked!r}, which cannot run here ({reason}): use 'auto' or 'torch'")
    return asked
