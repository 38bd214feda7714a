"""The one place where an operation's implementation is chosen: `build_kernels` gives the `Kernels` of a run."""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sambalm.model.ops import external
from sambalm.model.ops.attention import cudnn
from sambalm.model.ops.attention.flex import flex_window
from sambalm.model.ops.compiled import compiled, compiled_elementwise
from sambalm.model.ops.config import KernelConfig
from sambalm.model.ops.cuda.adamw import CudaAdamW
from sambalm.model.ops.cuda.conv import cuda_causal_conv_silu
from sambalm.model.ops.cuda.scan import cuda_selective_scan
from sambalm.model.ops.cuda.scan_sizes import why_too_large
from sambalm.model.ops.errors import DeclinedError
from sambalm.model.ops.implementations import (
    BY_MIXERS,
    IMPLEMENTATIONS,
    KernelRequirements,
    choose,
    reads_documents,
    why_unasked,
)
from sambalm.model.ops.reference.causal_conv import causal_conv_silu
from sambalm.model.ops.reference.delta_rule import gated_delta_rule
from sambalm.model.ops.reference.elementwise import Elementwise, why_not_compiled
from sambalm.model.ops.reference.linear_attention import linear_attention
from sambalm.model.ops.reference.rms_norm import add_rms_norm
from sambalm.model.ops.reference.selective_scan import gated_selective_scan
from sambalm.model.ops.reference.ssd_scan import ssd_scan
from sambalm.model.ops.reference.window_attention import window_attention
from sambalm.parallel.environment import is_main_process
from sambalm.parallel.layers.recompute import recomputed

# Arguments, shapes and dtypes of a kernel are those of its PyTorch reference.
ScanKernel = Callable[..., tuple[Tensor, Tensor]]  # selective_scan.gated_selective_scan
ConvKernel = Callable[..., Tensor]  # causal_conv.causal_conv_silu, without initial_state
AttentionKernel = Callable[..., Tensor]  # window_attention.window_attention; documents: documents.AttentionDocuments
DeltaRuleKernel = Callable[..., tuple[Tensor, Tensor]]  # delta_rule.gated_delta_rule
LinearAttentionKernel = Callable[..., tuple[Tensor, Tensor]]  # linear_attention.linear_attention
SSDKernel = Callable[..., tuple[Tensor, Tensor]]  # ssd_scan.ssd_scan
NormKernel = Callable[..., tuple[Tensor, Tensor]]  # rms_norm.add_rms_norm


@dataclass(frozen=True)
class Kernels:
    """The implementations that a run computes with."""

    scan: ScanKernel
    conv: ConvKernel
    attention: AttentionKernel
    norm: NormKernel
    elementwise: Elementwise
    delta_rule: DeltaRuleKernel
    linear_attention: LinearAttentionKernel
    ssd: SSDKernel
    optimizer: type[torch.optim.AdamW]
    names: tuple[str, ...]  # operation=implementation of each that the model has, as it runs in training, for the log
    captures_documents: bool = True  # whether none reads the documents of a micro-batch on the host

    def recomputing(self) -> "Kernels":
        """The same with the insides of scans, attention and delta rule computed again in the backward, not kept."""
        names = ("scan", "ssd", "attention", "delta_rule", "linear_attention")
        again: dict[str, Any] = {name: partial(recomputed, getattr(self, name)) for name in names}
        return replace(self, **again)


class Fallbacks:
    """A kernel, and the next ones for the calls that it declines.

    What a training step calls is known when a run is built, and a kernel that declines it is not chosen. Only other
    calls, such as validation at other lengths, come to the next kernels; the main rank says so once for each shape.
    """

    def __init__(self, operation: str, kernels: Mapping[str, Callable[..., Tensor]]) -> None:
        """
        Args:
            kernels: by name, in the order in which they are tried; the last declines nothing.
        """
        self.operation, self.kernels = operation, list(kernels.items())
        self._said: set[str] = set()

    def __call__(self, *tensors: Tensor, **options: Any) -> Tensor:
        for number, (name, kernel) in enumerate(self.kernels[:-1]):
            try:
                return kernel(*tensors, **options)
            except DeclinedError as declined:
                self._say(f"{self.operation}={self.kernels[number + 1][0]} in place of {name}: {declined}")
        return self.kernels[-1][1](*tensors, **options)

    def _say(self, line: str) -> None:
        if is_main_process() and line not in self._said:
            print(line, file=sys.stderr)
        self._said.add(line)


def build_kernels(config: KernelConfig, requirements: KernelRequirements) -> Kernels:
    """The implementations that a run's configuration asks for, or the best ones, on the current device.

    Raises:
        KernelError: a kernel is asked for that cannot run here.
    """
    asked = dict.fromkeys(IMPLEMENTATIONS, "auto") | config.model_dump()
    chosen = {
        operation: choose(operation, asked[operation], partial(why_unavailable, operation, requirements=requirements))
        for operation in IMPLEMENTATIONS
    }
    kernels = {operation: _function_of(operation, name) for operation, name in chosen.items()}
    kernels["attention"] = _with_fallbacks("attention", chosen["attention"], requirements)
    return Kernels(
        **kernels,
        names=tuple(
            f"{operation}={name}"
            for operation, name in chosen.items()
            if operation not in BY_MIXERS.difference(requirements.operations)
        ),
        captures_documents=not reads_documents(chosen),
    )


def why_unavailable(operation: str, name: str, requirements: KernelRequirements) -> str | None:
    """Why the named implementation of an operation cannot do what is required here; None when it can."""
    implementation = IMPLEMENTATIONS[operation][name]
    if reason := why_unasked(operation, name, requirements):
        return reason
    if requirements.device != "cuda" and not implementation.runs_on_cpu:
        return f"it needs a CUDA device and this run is on {requirements.device}"
    if reason := implementation.declines(requirements):
        return reason
    if (operation, name) == ("scan", "cuda"):
        properties: Any = torch.cuda.get_device_properties(requirements.device)
        memory_bytes = properties.shared_memory_per_block_optin
        if reason := why_too_large(requirements.d_state, block_memory_bytes=memory_bytes):
            return reason
    if implementation.is_compiled and (reason := why_not_compiled()):
        return reason
    if implementation.module:
        try:
            importlib.import_module(implementation.module)
        except ImportError as error:
            return f"import failed: {error}"
    if (operation, name) == ("attention", "cudnn"):
        calls, precision = requirements.attention_calls, requirements.precision
        reasons = (cudnn.declines(call, precision=precision) for call in calls)
        return next(filter(None, reasons), None)
    return None


# By operation and name, as IMPLEMENTATIONS.
_FUNCTIONS: dict[str, dict[str, Any]] = {
    "scan": {"cuda": cuda_selective_scan, "mamba-ssm": external.mamba_ssm_scan, "torch": gated_selective_scan},
    "conv": {"causal-conv1d": external.causal_conv1d_silu, "cuda": cuda_causal_conv_silu, "torch": causal_conv_silu},
    "attention": {
        "cudnn": cudnn.cudnn_window,
        "flex": flex_window,
        "torch-flash": external.torch_flash_window,
        "flash-attn": external.flash_attn_window,
        "torch": window_attention,
    },
    "norm": {
        "compiled": partial(compiled, add_rms_norm),
        "apex": external.apex_add_rms_norm,
        "torch": add_rms_norm,
    },
    "elementwise": {"compiled": compiled_elementwise, "torch": Elementwise()},
    "delta_rule": {"fla": external.fla_delta_rule, "torch": gated_delta_rule},
    "linear_attention": {"fla": external.fla_linear_attention, "torch": linear_attention},
    "ssd": {"mamba-ssm": external.mamba_ssm_ssd_scan, "torch": ssd_scan},
    "optimizer": {"cuda": CudaAdamW, "torch-fused": torch.optim.AdamW},
}

TORCH_KERNELS = Kernels(
    scan=gated_selective_scan,
    conv=causal_conv_silu,
    attention=window_attention,
    norm=add_rms_norm,
    elementwise=Elementwise(),
    delta_rule=gated_delta_rule,
    linear_attention=linear_attention,
    ssd=ssd_scan,
    optimizer=torch.optim.AdamW,
    names=("torch",),
)


def _function_of(operation: str, name: str) -> Any:
    function = _FUNCTIONS[operation][name]
    return function() if name == "compiled" else function  # compiled when asked for, not at import


def _with_fallbacks(operation: str, name: str, requirements: KernelRequirements) -> Callable[..., Tensor]:
    """The named kernel and, where it may decline calls, those after it that can do what is required."""
    names, kernels = list(IMPLEMENTATIONS[operation]), {name: _function_of(operation, name)}
    while IMPLEMENTATIONS[operation][name].may_decline:
        following = names[names.index(name) + 1 :]
        name = next(other for other in following if not why_unavailable(operation, other, requirements))
        kernels[name] = _function_of(operation, name)
    return Fallbacks(operation, kernels) if len(kernels) > 1 else kernels[name]
