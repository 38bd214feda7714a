"""Mamba-1 on a CPU in vLLM, whose own kernels there are for Mamba-2: the convolution is vLLM's, the scan is ours.

T: tokens, those of requests that decode before those of prompts. D: channels of this rank.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_fn_cpu, causal_conv1d_update_cpu

from sambalm.model.ops.reference.selective_scan import gated_selective_scan


def mix_on_cpu(layer: Any, x_TD: Tensor, z_TD: Tensor, metadata: Any) -> Tensor:
    """Returns the gated output of convolution and scan, [T, D], and leaves the states in the layer's cache.

    Args:
        layer: vLLM's MambaMixer, for its weights and its cache.
        x_TD, z_TD: what the input projection gives.
        metadata: which tokens are whose, as vLLM's Mamba-1 backend has it.
    """
    decoded = metadata.num_decode_tokens
    outputs = []
    if decoded:
        outputs.append(_decode(layer, x_TD[:decoded], z_TD[:decoded], metadata))
    if metadata.num_prefill_tokens:
        span = slice(decoded, decoded + metadata.num_prefill_tokens)
        outputs.append(_prefill(layer, x_TD[span], z_TD[span], metadata))
    return torch.cat(outputs)


def _conv_state(layer: Any) -> Tensor:
    state = layer.kv_cache[0]
    return state if is_conv_state_dim_first() else state.transpose(-1, -2)


def _steps(layer: Any, u_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the step sizes before bias and softplus [T, D], and B and C [T, d_state]."""
    sizes = [layer.time_step_rank, layer.ssm_state_size, layer.ssm_state_size]
    dt, B, C = layer.x_proj(u_TD)[0].split(sizes, dim=-1)
    return layer.dt_proj(dt.contiguous())[0], B, C


def _decode(layer: Any, x_TD: Tensor, z_TD: Tensor, metadata: Any) -> Tensor:
    """Reads a token of every request that decodes."""
    places = metadata.state_indices_tensor_d[:, 0].contiguous()
    weight, bias = layer.conv1d.weight.squeeze(1), layer.conv1d.bias
    u_TD = causal_conv1d_update_cpu(
        x_TD.contiguous(), _conv_state(layer), weight, bias, layer.activation, conv_state_indices=places
    )
    states, rows = layer.kv_cache[1], places.long()
    y, state = _scan(layer, *(t[:, None] for t in (u_TD, *_steps(layer, u_TD), z_TD)), initial_state=states[rows])
    states[rows] = state
    return y[:, 0]


def _prefill(layer: Any, x_TD: Tensor, z_TD: Tensor, metadata: Any) -> Tensor:
    """Reads the prompts' tokens, which lie one after the other; a prompt's earlier tokens may be in its state."""
    places, continued = metadata.state_indices_tensor_p, metadata.has_initial_states_p
    u_TD = causal_conv1d_fn_cpu(
        x_TD.t(),
        layer.conv1d.weight.squeeze(1),
        layer.conv1d.bias,
        _conv_state(layer),
        metadata.query_start_loc_p,
        cache_indices=places,
        has_initial_state=continued,
        activation=layer.activation,
    ).t()
    u_TD = u_TD.contiguous()
    steps = _steps(layer, u_TD)
    states, outputs = layer.kv_cache[1], []
    starts = metadata.query_start_loc_p.tolist()
    for number, (place, goes_on) in enumerate(zip(places.tolist(), continued.tolist(), strict=True)):
        span = slice(starts[number], starts[number + 1])
        before = states[place : place + 1] if goes_on else None
        y, state = _scan(layer, *(t[None, span] for t in (u_TD, *steps, z_TD)), initial_state=before)
        states[place].copy_(state[0])
        outputs.append(y[0])
    return torch.cat(outputs)


def _scan(
    layer: Any, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, *, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    bias = layer.dt_proj.bias
    return gated_selective_scan(u, dt, layer.A, B, C, D=layer.D, z=z, dt_bias=bias, initial_state=initial_state)
