"""Mamba's causal depthwise convolution, with its SiLU and without, in plain PyTorch."""

from collections.abc import Iterator
from typing import Any

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
    """SiLU of `causal_conv`, with the same arguments and shapes."""
    return F.silu(causal_conv(x, weight, bias, initial_state, resets=resets))


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial_state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution in which each output sees its own input and the d_conv - 1 before it.

    Args:
        x: [batch, length, channels].
        weight: [channels, d_conv], the last tap for the current token. bias: [channels].
        initial_state: the d_conv - 1 inputs before x, [batch, d_conv - 1, channels]; zeros when None.
        resets: bool [batch, length], True for tokens that do not see what is before them; none when None.

    Returns:
        [batch, length, channels] in x's dtype.
    """
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if initial_state is None:
        return _CausalConv.apply(x, weight, bias, resets)
    reach = initial_state.shape[1]
    whole = torch.cat((initial_state.to(x.dtype), x), dim=1)
    return _CausalConv.apply(whole, weight, bias, None if resets is None else F.pad(resets, (reach, 0)))[:, reach:]


class _CausalConv(torch.autograd.Function):
    """A sum of shifted products: on a CPU, with channels innermost, twice as fast as a grouped conv1d.

    Inside, time comes first, so that a shift is a slice of memory without gaps. Autograd would make of each slice's
    gradient a tensor of zeros of the whole length, and then add those up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, resets: Tensor | None) -> Tensor:
        x_LBD = _time_first(x)
        sums = bias.expand_as(x_LBD).clone(memory_format=torch.contiguous_format)
        for tap, span, seen in _seen(x_LBD, weight, resets):
            sums[span].addcmul_(seen, weight[:, tap])
        ctx.save_for_backward(x, weight, resets)
        return sums.transpose(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, resets = ctx.saved_tensors
        x_LBD, grad_sums = _time_first(x), _time_first(grad_output)
        grad_x, grad_weight = torch.zeros_like(x_LBD), torch.zeros_like(weight)
        for tap, span, seen in _seen(x_LBD, weight, resets):
            grad_seen = grad_sums[span]
            grad_weight[:, tap] = (grad_seen * seen).sum((0, 1))
            if resets is not None:
                back = span.start
                grad_seen = grad_seen.masked_fill(_resets_within(resets, back).t()[span].unsqueeze(-1), 0)
            grad_x[: len(seen)].addcmul_(grad_seen, weight[:, tap])
        return grad_x.transpose(0, 1), grad_weight, grad_sums.sum((0, 1)), None


def _time_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


def _seen(x_LBD: Tensor, weight: Tensor, resets: Tensor | None) -> Iterator[tuple[int, slice, Tensor]]:
    """Each tap, the outputs that see something through it, and what each of those sees."""
    length, taps = len(x_LBD), weight.shape[1]
    for tap in range(max(0, taps - length), taps):
        back = taps - 1 - tap
        span, seen = slice(back, length), x_LBD[: length - back]
        if resets is not None:
            seen = seen.masked_fill(_resets_within(resets, back).t()[span].unsqueeze(-1), 0)
        yield tap, span, seen


def _resets_within(resets: Tensor, tokens: int) -> Tensor:
    """Whether any of so many tokens up to each one is a reset; bool [batch, length]."""
    found = torch.zeros_like(resets)
    for back in range(min(tokens, resets.shape[1])):
        found[:, back:] |= resets[:, : resets.shape[1] - back]
    return found
