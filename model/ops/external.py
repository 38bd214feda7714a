"""CUDA kernels of other packages behind the signatures of the PyTorch references. All are optional."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sambalm.model.ops.cuda.conv import MAX_TAPS
from sambalm.model.ops.cuda.scan_sizes import why_too_large
from sambalm.model.ops.documents import AttentionDocuments
from sambalm.model.ops.reference.elementwise import why_not_compiled

_MODULES = {
    "mamba-ssm": "mamba_ssm.ops.selective_scan_interface",
    "causal-conv1d": "causal_conv1d",
    "flash-attn": "flash_attn",
    # PyPI's `apex` is another project; NVIDIA's is the one with this module.
    "apex": "apex.normalization.fused_layer_norm",
    "cuda": "cuda.bindings.nvrtc",
    "cudnn": "cudnn",  # nvidia-cudnn-frontend
}
_HALF_ONLY = ("cudnn", "flash-attn", "torch-flash", "flex")
# Of a convolution, at most; causal-conv1d (csrc/causal_conv1d.cpp) raises an error for more.
_TAPS = {"cuda": MAX_TAPS, "causal-conv1d": 4}
_COMPILED = ("compiled", "cudnn", "flex")  # cudnn for the shapes that it leaves to flex


class KernelError(Exception):
    """A kernel that cannot run here; the message is one sentence for the user."""

    exit_code = 2


@dataclass(frozen=True)
class KernelRequirements:
    """What a kernel has to cope with."""

    device: torch.device
    dtype: torch.dtype  # of activations
    d_state: int = 16  # states of a channel that the scan holds
    d_conv: int = 4  # taps of the convolution
    initial_states: bool = False  # whether the scan must start from given states
    resets: bool = False  # whether states must be dropped at the beginnings of documents


def why_unavailable(operation: str, name: str, where: KernelRequirements) -> str | None:
    """Why the named implementation of an operation cannot run in these circumstances; None when it can."""
    if name == "torch":
        return None
    if where.device.type != "cuda":
        return f"it needs a CUDA device and this run is on {where.device.type}"
    if name in _HALF_ONLY and where.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, not {str(where.dtype).removeprefix('torch.')}"
    if name == "mamba-ssm" and where.initial_states:
        return "it takes no initial state, which context parallelism needs"
    if name == "mamba-ssm" and where.resets:
        return "it cannot drop its state inside a sequence, which data.reset_at_document needs"
    if operation == "conv" and name in _TAPS and where.d_conv > _TAPS[name]:
        return f"model.d_conv is {where.d_conv} and it holds at most {_TAPS[name]} taps"
    if (operation, name) == ("scan", "cuda"):
        block_memory_bytes = torch.cuda.get_device_properties(where.device).shared_memory_per_block_optin
        reason = why_too_large(where.dtype, where.d_state, block_memory_bytes=block_memory_bytes)
        if reason:
            return reason
    if name in _COMPILED and (reason := why_not_compiled()):
        return reason
    if name in _MODULES:
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            return f"import failed: {error}"
    return None


def _function(name: str, attribute: str) -> Callable:
    return getattr(importlib.import_module(_MODULES[name]), attribute)


def mamba_ssm_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    initial_state: None = None,
    resets: None = None,
) -> tuple[Tensor, Tensor]:
    """mamba-ssm's fused scan, without initial state and resets (`why_unavailable`); the final state has no gradient.

    It wants time innermost, so the inputs are copied.
    """
    u, dt, B, C, z = (t.transpose(1, 2).contiguous() for t in (u, dt, B, C, z))
    y, state = _function("mamba-ssm", "selective_scan_fn")(
        u, dt, A, B, C, D=D, z=z, delta_bias=dt_bias, delta_softplus=True, return_last_state=True
    )
    return y.transpose(1, 2), state


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor, *, resets: Tensor | None = None) -> Tensor:
    """causal-conv1d's fused convolution, which reads channels-last input as it is. It knows documents by numbers."""
    documents = None if resets is None else resets.cumsum(1, dtype=torch.int32)
    y = _function("causal-conv1d", "causal_conv1d_fn")(
        x.transpose(1, 2), weight, bias, seq_idx=documents, activation="silu"
    )
    return y.transpose(1, 2)


def flash_attn_window(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, documents: AttentionDocuments | None = None
) -> Tensor:
    """flash-attn's window attention."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    span = {"causal": True, "window_size": (window - 1, 0)}
    if documents is None:
        return _function("flash-attn", "flash_attn_func")(q, k, v, **span).transpose(1, 2)
    lengths, joined = documents.variable_lengths, (t.flatten(0, 1) for t in (q, k, v))
    y = _function("flash-attn", "flash_attn_varlen_func")(*joined, **vars(lengths), **span)
    return y.unflatten(0, q.shape[:2]).transpose(1, 2)


def torch_flash_window(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, documents: AttentionDocuments | None = None
) -> Tensor:
    """The flash kernel inside PyTorch's CUDA build, whose operator takes a window (SDPA does not pass one on)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    joined, lengths = (q, k, v), (None, None, q.shape[1], k.shape[1])
    if documents is not None:
        joined, lengths = (t.flatten(0, 1) for t in joined), vars(documents.variable_lengths).values()
    y, *_ = torch.ops.aten._flash_attention_forward(
        *joined, *lengths, 0.0, True, False, window_size_left=window - 1, window_size_right=0
    )
    return y.reshape(q.shape).transpose(1, 2)


def apex_add_rms_norm(x: Tensor, branch: Tensor | None, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """NVIDIA apex's fused RMSNorm, after a sum of its own."""
    if branch is not None:
        x = x + branch
    return x, _function("apex", "fused_rms_norm_affine")(x, weight.to(x.dtype), (x.shape[-1],), eps)
