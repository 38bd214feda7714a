"""The operations of a GPU, by the registry of kernels that training has too.

An exported folder has another file of this name, by which every device computes in PyTorch alone.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from sambalm.model.ops.reference.causal_conv import causal_conv_silu
from sambalm.model.ops.reference.delta_rule import gated_delta_rule
from sambalm.model.ops.reference.linear_attention import linear_attention
from sambalm.model.ops.reference.window_attention import window_attention

from .configuration_samba import SambaConfig
from .operations import IN_TORCH, Operations

Precision = Literal["bf16", "fp16", "fp32"]
_PRECISIONS: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FEW_TOKENS = 8  # of a call of the delta rule or of linear attention
WHOLE_QUERIES = 1024  # cuDNN compiles a graph for each length; multiples of this are few


def operations_for(x: Tensor, config: SambaConfig) -> Operations:
    """Returns what computes on the device and in the dtype of x: kernels on a GPU, and PyTorch while it is compiled."""
    if not has_kernels(x.device) or x.dtype not in _PRECISIONS or torch.compiler.is_compiling():
        return IN_TORCH
    return _of_device(x.device.index, _PRECISIONS[x.dtype], int(config.state_size), int(config.conv_kernel))


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels run there: on NVIDIA's GPUs from Ampere on, the first with bf16."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _of_device(index: int, precision: Precision, d_state: int, d_conv: int) -> Operations:
    # Of a CPU's model none of it is needed.
    from sambalm.model.ops.config import KernelConfig
    from sambalm.model.ops.implementations import FLA_MAX_KEY_DIM, KernelRequirements
    from sambalm.model.ops.registry import build_kernels

    needs = KernelRequirements(
        "cuda",
        precision,
        d_state=d_state,
        d_conv=d_conv,
        initial_states=True,
        operations=("delta_rule", "linear_attention"),
    )
    with torch.cuda.device(index):
        best = build_kernels(KernelConfig(), needs)
        any_length = build_kernels(KernelConfig(attention="torch" if precision == "fp32" else "torch-flash"), needs)
    return Operations(
        rms_norm=lambda x, weight, *, eps: best.norm(x, None, weight, eps=eps)[1],
        causal_conv_silu=partial(_continued_conv, best.conv),
        gated_selective_scan=partial(_scan, best.scan),
        window_attention=partial(_attention, best.attention, any_length.attention),
        rotary=best.elementwise.rotary,
        swiglu=best.elementwise.swiglu,
        delta_rule=partial(_delta_rule, best.delta_rule, FLA_MAX_KEY_DIM),
        linear_attention=partial(_linear_attention, best.linear_attention),
    )


def _continued_conv(
    kernel: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial_state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
) -> Tensor:
    """A kernel that starts from zero; the few tokens that see the state are computed with it a second time."""
    y = kernel(x, weight, bias, resets=resets)
    if initial_state is None:
        return y
    reach = initial_state.shape[1]
    seen_resets = None if resets is None else resets[:, :reach]
    start = causal_conv_silu(x[:, :reach], weight, bias, initial_state, resets=seen_resets)
    if y.requires_grad:
        return torch.cat((start, y[:, reach:]), dim=1)
    y[:, :reach] = start
    return y


def _scan(
    kernel: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor, dt_bias: Tensor | None, **options: Any
) -> Any:
    """A kernel that adds the bias itself, where the step sizes have theirs already."""
    if dt_bias is None:
        dt_bias = torch.zeros_like(options["D"])
    return kernel(*tensors, dt_bias=dt_bias, **options)


def _delta_rule(
    kernel: Callable[..., tuple[Tensor, Tensor]], max_key_dim: int, q: Tensor, *tensors: Tensor, **options: Any
) -> Any:
    """A kernel for many tokens, and PyTorch for the few of a generation, which do not fill a chunk."""
    _, tokens, _, key_dim = q.shape
    fits = tokens > FEW_TOKENS and key_dim <= max_key_dim
    return (kernel if fits else gated_delta_rule)(q, *tensors, **options)


def _linear_attention(kernel: Callable[..., tuple[Tensor, Tensor]], q: Tensor, *tensors: Tensor, **options: Any) -> Any:
    """A kernel for many tokens, and PyTorch for the few of a generation, which do not fill a chunk."""
    return (kernel if q.shape[1] > FEW_TOKENS else linear_attention)(q, *tensors, **options)


def _attention(
    whole: Callable[..., Tensor],
    any_length: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    documents: Any = None,
    real_keys: Tensor | None = None,
) -> Tensor:
    """The best kernel for lengths that are few, another for the rest, and PyTorch for documents and padding."""
    head_dim = q.shape[3]
    if documents is not None or real_keys is not None or head_dim % 8 or head_dim > 256:
        return window_attention(q, k, v, window=window, documents=documents, real_keys=real_keys)
    # Full attention meets as many lengths of keys as there are pieces of a text.
    are_many = q.shape[2] % WHOLE_QUERIES or q.shape[2] < k.shape[2] <= window
    kernel = any_length if are_many else whole
    return kernel(q, k[:, :, -(q.shape[2] + window - 1) :], v[:, :, -(q.shape[2] + window - 1) :], window=window)
