"""CUDA kernels of other packages behind the signatures of the PyTorch references. All are optional."""

import importlib
import re
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sambalm.model.ops.cuda.memory import EIGHT, filled_up
from sambalm.model.ops.documents import AttentionDocuments
from sambalm.model.ops.errors import KernelError
from sambalm.model.ops.implementations import IMPLEMENTATIONS


def _imported(operation: str, name: str, attribute: str) -> Any:
    """A function of the module that an implementation needs, which is imported when it is first called."""
    module = IMPLEMENTATIONS[operation][name].module
    assert module is not None, f"{operation}={name} is of no other package"
    return getattr(importlib.import_module(module), attribute)


def mamba_ssm_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor,
    initial_state: None = None,
    resets: None = None,
) -> tuple[Tensor, Tensor]:
    """mamba-ssm's fused scan, without initial state and resets; the final state has no gradient.

    It wants time innermost, so the inputs are copied. Raises KernelError for an initial state and for resets.
    """
    if initial_state is not None or resets is not None:
        raise KernelError("the scan 'mamba-ssm' takes neither an initial state nor resets: set kernels.scan to 'torch'")
    u, dt, B, C = (t.transpose(1, 2).contiguous() for t in (u, dt, B, C))
    z = None if z is None else z.transpose(1, 2).contiguous()
    y, state = _imported("scan", "mamba-ssm", "selective_scan_fn")(
        u, dt, A, B, C, D=D, z=z, delta_bias=dt_bias, delta_softplus=True, return_last_state=True
    )
    return y.transpose(1, 2), state


MAMBA_SSM_SSD_CHUNK_TOKENS = 256  # mamba-ssm's own default


def mamba_ssm_ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """mamba-ssm's scan of Mamba-2. It knows documents by numbers, of which 0 alone goes on from the initial state."""
    documents = None if resets is None else resets.cumsum(1, dtype=torch.int32)
    return _imported("ssd", "mamba-ssm", "mamba_chunk_scan_combined")(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=MAMBA_SSM_SSD_CHUNK_TOKENS,
        D=D,
        dt_bias=dt_bias,
        initial_states=initial_state,
        seq_idx=documents,
        dt_softplus=True,
        return_final_states=True,
    )


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor, *, resets: Tensor | None = None) -> Tensor:
    """causal-conv1d's fused convolution. It knows documents by numbers.

    It reads channels-last input as it is where channels, and the distances between tokens and rows, are multiples of
    eight; any other input is copied.
    """
    documents, channels = None if resets is None else resets.cumsum(1, dtype=torch.int32), x.shape[2]
    more = -channels % EIGHT
    x, weight, bias = filled_up(x, more), filled_up(weight, 0, more), filled_up(bias, more)
    if x.stride(0) % EIGHT or x.stride(1) % EIGHT:
        x = x.clone(memory_format=torch.contiguous_format)
    y = _imported("conv", "causal-conv1d", "causal_conv1d_fn")(
        x.transpose(1, 2), weight, bias, seq_idx=documents, activation="silu"
    )
    return y.transpose(1, 2)[..., :channels]


def flash_attn_window(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, documents: AttentionDocuments | None = None
) -> Tensor:
    """flash-attn's window attention."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    span = {"causal": True, "window_size": (window - 1, 0)}
    if documents is None:
        return _imported("attention", "flash-attn", "flash_attn_func")(q, k, v, **span).transpose(1, 2)
    lengths, joined = documents.variable_lengths, (t.flatten(0, 1) for t in (q, k, v))
    y = _imported("attention", "flash-attn", "flash_attn_varlen_func")(*joined, **vars(lengths), **span)
    return y.unflatten(0, q.shape[:2]).transpose(1, 2)


def torch_flash_window(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, documents: AttentionDocuments | None = None
) -> Tensor:
    """The flash kernel inside PyTorch's CUDA build, whose operator takes a window (SDPA does not pass one on)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    joined: Iterable[Tensor] = (q, k, v)
    lengths: Iterable[Any] = (None, None, q.shape[1], k.shape[1])
    if documents is not None:
        joined, lengths = (t.flatten(0, 1) for t in joined), vars(documents.variable_lengths).values()
    y, *_ = torch.ops.aten._flash_attention_forward(
        *joined, *lengths, 0.0, True, False, window_size_left=window - 1, window_size_right=0
    )
    return y.reshape(q.shape).transpose(1, 2)


def fla_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's chunked kernels, which take documents as one sequence of their own each."""
    if gate.dim() == 3 and not _fla_has_head_decays():  # the other kernel then decays all channels of a head alike
        channels = k.shape[-1]
        gate, dt_bias = (t.unsqueeze(-1).expand(*t.shape, channels) for t in (gate, dt_bias))
    name = "chunk_kda" if gate.dim() == 4 else "chunk_gated_delta_rule"
    return _by_document(
        _imported("delta_rule", "fla", name),
        {"q": q, "k": k, "v": v, "g": gate, "beta": beta},
        initial_state=initial_state,
        resets=resets,
        A_log=A_log,
        dt_bias=dt_bias.flatten(),
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
    )


HOPPER = 9  # the major number of its compute capability
FIRST_WRONG_TRITON, FIRST_RIGHT_TRITON = (3, 4, 0), (3, 7, 1)


def _fla_has_head_decays() -> bool:
    """Says whether the kernel of one decay a head takes this machine, which it says itself only at a run's backward.

    Triton compiles that backward wrongly on Hopper (fla/ops/common/chunk_o.py of fla-core 0.6.0, issue 640 there).
    """
    major, _ = torch.cuda.get_device_capability()
    triton = tuple(map(int, re.findall(r"\d+", version("triton"))[:3]))
    return major != HOPPER or not FIRST_WRONG_TRITON <= triton < FIRST_RIGHT_TRITON


def fla_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decays: Tensor,
    *,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's chunked kernels, which take documents as one sequence of their own each."""
    kernel = _imported("linear_attention", "fla", "chunk_gla" if log_decays.dim() == 4 else "chunk_simple_gla")
    sequences = {"q": q, "k": k, "v": v}
    if log_decays.dim() == 1:  # its chunk_retention takes the first heads' decays on every tensor-parallel rank
        return _by_document(kernel, sequences, initial_state=initial_state, resets=resets, g_gamma=log_decays)
    return _by_document(kernel, sequences | {"g": log_decays}, initial_state=initial_state, resets=resets)


def _by_document(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    sequences: dict[str, Tensor],
    *,
    initial_state: Tensor | None,
    resets: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Calls one of flash-linear-attention's kernels, with the documents of all rows in one row where there are some.

    Args:
        sequences: by the kernel's names, [batch, length, ...]; v among them.
    """
    like = sequences["v"]
    if resets is not None:
        begins = resets.clone()
        begins[:, 0] = True
        starts = begins.flatten().nonzero().flatten()
        first = begins.sum(1).cumsum(0) - begins.sum(1)  # number of each row's first document
        last = first + begins.sum(1) - 1
        if initial_state is not None:
            kept = initial_state.masked_fill(resets[:, 0, None, None, None], 0)
            initial_state = kept.new_zeros(len(starts), *kept.shape[1:]).index_copy(0, first, kept)
        sequences = {name: t.flatten(0, 1).unsqueeze(0) for name, t in sequences.items()}
        options["cu_seqlens"] = F.pad(starts, (0, 1), value=resets.numel())
    sequences = {name: t.contiguous() for name, t in sequences.items()}
    y, state = kernel(**sequences, initial_state=initial_state, output_final_state=True, **options)
    return (y, state) if resets is None else (y.view_as(like), state[last])


def apex_add_rms_norm(x: Tensor, branch: Tensor | None, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """NVIDIA apex's fused RMSNorm, after a sum of its own."""
    if branch is not None:
        x = x + branch
    return x, _imported("norm", "apex", "fused_rms_norm_affine")(x, weight.to(x.dtype), (x.shape[-1],), eps)
