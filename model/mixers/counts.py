"""What a mixer says of itself to whoever counts: parameters, operations, bytes, messages and kernels of one layer.

Counts stand here and seconds do not: only the planner knows hardware. Nothing here needs torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

FP32_BYTES = 4
FORWARD_AND_BACKWARD = 3  # of a forward's operations: a backward has twice as many

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class KernelNames:
    """Names the implementation of each operation, as the keys of `kernels` in a config do; None: the model has none."""

    scan: str
    conv: str
    attention: str
    norm: str
    elementwise: str
    delta_rule: str | None = None  # this and the next two where a layer of the model computes it
    linear_attention: str | None = None
    ssd: str | None = None
    device: str = "cuda"

    def __str__(self) -> str:
        """The names as the start line of a run has them, as in 'scan=cuda conv=cuda ...'."""
        named = {key.name: getattr(self, key.name) for key in fields(self) if key.name != "device"}
        return " ".join(f"{operation}={name}" for operation, name in named.items() if name is not None)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a layer as the first tensor-parallel rank holds it, whose shares are the largest."""

    name: str  # below the mixer, as `named_parameters` gives it
    shape: tuple[int, ...]
    in_product: bool = False  # whether a matrix product takes it, in the activations' dtype
    matmul_only: bool = False  # whether nothing else reads it
    takes_fp8: bool = False  # whether that product may be in FP8
    weight_decay: bool | None = None  # whether AdamW decays it; None: a matrix, yes, and a vector, no
    padding: int = 0  # elements of the shape that are zeros (parallel/shard.py), which no count of parameters has

    @property
    def elements(self) -> int:
        """Elements that the rank holds, zeros included."""
        return math.prod(self.shape)

    @property
    def counted(self) -> int:
        """Elements that learn."""
        return self.elements - self.padding

    @property
    def decays(self) -> bool:
        return len(self.shape) > 1 if self.weight_decay is None else self.weight_decay


@dataclass(frozen=True)
class Share:
    """The work of one rank on one micro-batch, as far as counts depend on it."""

    tensor_ranks: int
    sequence_parallel: bool
    context_ranks: int
    sequences: int  # of a micro-batch
    sequence_tokens: int  # of a whole sequence
    activation_bytes: int  # of one element
    recompute: Recompute
    kernels: KernelNames
    fp8: bool = False  # whether products that may be are in FP8

    @property
    def part_tokens(self) -> int:
        """Tokens of each sequence on one context-parallel rank."""
        return self.sequence_tokens // self.context_ranks

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank; tensor-parallel ranks work on the same ones."""
        return self.sequences * self.part_tokens

    @property
    def is_narrow(self) -> bool:
        """Whether activations have fewer bytes than fp32."""
        return self.activation_bytes < FP32_BYTES

    @property
    def forwards(self) -> int:
        """How often a micro-batch runs a layer's forward."""
        return 2 if self.recompute == "full" else 1


@dataclass(frozen=True)
class Message:
    """What one rank hands to a collective, or sends to another rank, in one micro-batch and layer.

    `handed_bytes` is the input tensor: whole for an all-reduce and a reduce-scatter, the rank's own share for an
    all-gather, what is sent for a send.
    """

    dimension: Literal["tensor", "context"]
    operation: Literal["all-reduce", "reduce-scatter", "all-gather", "send"]
    ranks: int
    handed_bytes: float
    times: int = 1


@dataclass(frozen=True)
class Traffic:
    """Bytes that move between a device and its memory for each element, and whether one fused kernel moves them.

    By the list of kernels that PyTorch launches for activations in bf16: a cast to fp32, say, reads 2 and writes 4.
    """

    forward: float
    backward: float
    fused: bool = False


@dataclass(frozen=True)
class MemoryPass:
    """A kernel, or several, that memory bounds."""

    traffic: Traffic
    elements: float


@dataclass(frozen=True)
class Convolution:
    """Mamba's convolution."""

    elements: float  # tokens times channels


@dataclass(frozen=True)
class Scan:
    """Mamba's scan."""

    sequences: int
    channels: int
    tokens: int
    states: int
    scans: int  # how often a forward scans: twice between other context-parallel ranks


@dataclass(frozen=True)
class Attention:
    """Window attention inside its kernel."""

    flops: float  # forward and backward


# What the planner can turn into seconds. A mixer's own operation is products, which its parameters count, and
# `MemoryPass`es with the bytes that its PyTorch operations move; the other three are kernels that were measured.
Kernel = MemoryPass | Convolution | Scan | Attention

# Counts that several mixers share ------------------------------------------------------------------------------------

# Of an element of a norm of heads with a gate: casts, norm, activation, product.
NORM_AND_GATE = {"torch": Traffic(48, 80), "compiled": Traffic(6, 10, fused=True)}


def gated_head_norm_bytes(share: Share, *, elements: int, heads: int, activation: str) -> int:
    """Returns what a norm of heads with a gate keeps: its input alone where it is one kernel, else all factors in fp32.

    Args:
        elements: of the input. heads: of all tokens.
        activation: silu or sigmoid.
    """
    statistics = FP32_BYTES * heads
    if share.kernels.elementwise == "compiled":
        return share.activation_bytes * elements + statistics
    factors = 3  # input, norm, activation
    factors += share.kernels.device == "cpu"  # the input times its statistics
    factors += share.is_narrow and activation == "silu"  # which keeps its input, a copy
    return FP32_BYTES * factors * elements + statistics


def mean_keys(length: int, window: int) -> float:
    """Returns the keys that a query sees, on average over a sequence: position t, from 1, sees min(t, window)."""
    ramp = min(length, window)
    return (ramp * (ramp + 1) / 2 + (length - ramp) * window) / length


def input_and_output_messages(hidden_size: int, share: Share) -> Iterator[Message]:
    """Yields what a column-parallel input and a row-parallel output send, as every mixer has them."""
    ranks, whole = share.tensor_ranks, share.tokens * hidden_size * share.activation_bytes
    if share.sequence_parallel:
        # The input is gathered forward and again backward, its gradient scattered; the output is scattered and its
        # gradient gathered. A layer that runs again runs up to its last saved tensor: all but its output's reduction.
        yield Message("tensor", "all-gather", ranks, whole / ranks, times=share.forwards + 2)
        yield Message("tensor", "reduce-scatter", ranks, whole, times=2)
    else:
        yield Message("tensor", "all-reduce", ranks, whole, times=2)


def halo_message(width: int, halo: int, share: Share) -> Message:
    """Returns what the busiest rank sends so that each sees the `halo` tokens before its part of a sequence.

    Forward it sends tokens to the ranks after it, backward their gradients to those before.
    """
    ranks, part_tokens = share.context_ranks, share.part_tokens
    hops = min(math.ceil(halo / part_tokens), ranks - 1)
    sent = [min(part_tokens, halo - (hop - 1) * part_tokens) for hop in range(1, hops + 1)]
    tokens = max(share.forwards * sum(sent[: ranks - 1 - rank]) + sum(sent[:rank]) for rank in range(ranks))
    return Message("context", "send", ranks, share.activation_bytes * share.sequences * width * tokens)
