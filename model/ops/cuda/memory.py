"""How activations lie in memory for our CUDA kernels: channels innermost, eight elements at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sambalm.model.ops.cuda.nvrtc import Stride

INPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # INPUT of source/elements.cuh
EIGHT = 8  # channels are a multiple of it


def filled_up(x: Tensor, *more: int) -> Tensor:
    """With that many zeros after the last, the last but one, ... dimension; no copy where there are none."""
    return F.pad(x, [n for size in more for n in (0, size)]) if any(more) else x


def aligned(x: Tensor) -> Tensor:
    """[batch, length, channels] with channels innermost and each token's at a multiple of 16 bytes."""
    rows = 16 // x.element_size()
    fits = x.stride(2) == 1 and not x.stride(0) % rows and not x.stride(1) % rows and not x.data_ptr() % 16
    # Not contiguous(), which keeps what is contiguous at any address.
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def dense(x: Tensor) -> Tensor:
    """[batch, length, channels] that lies in memory as `sequence_first` does."""
    if x.transpose(0, 1).is_contiguous() and not x.data_ptr() % 16:
        return x
    copy = sequence_first(x)
    return copy.copy_(x)


def dense_strides(x: Tensor) -> list[int]:
    """The strides of `sequence_first`, as the kernels take them."""
    batch, _, channels = x.shape
    return [Stride(channels), batch * channels]


def strides(*tensors: Tensor) -> list[int]:
    """The strides of batch and length, as the kernels take them."""
    return [stride for tensor in tensors for stride in (Stride(tensor.stride(0)), tensor.stride(1))]


def sequence_first(like: Tensor) -> Tensor:
    """An empty [batch, length, channels], a view of [length, batch, channels] as the layers' activations are."""
    batch, length, channels = like.shape
    return like.new_empty(length, batch, channels).transpose(0, 1)
