"""What the layers of all mixers in the Hugging Face format share: their interface, the norm, padding and cached states.

B: batch, S: sequence.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from sambalm.model.ops.reference.elementwise import norm_and_gate

from .configuration_samba import SambaConfig
from .operations import IN_TORCH, Operations

# The attention implementations in whose place window_attention runs.
DENSE_ATTENTION = (None, "eager", "sdpa")

BEFORE_ALL_TOKENS = -(1 << 40)  # a place that no sequence reaches back to


class Padding(NamedTuple):
    """How to bring each row's real tokens to its front, where convolution and scan meet nothing else before them."""

    order: Tensor  # int64 [B, S]: the token that comes to each place
    inverse: Tensor  # int64 [B, S]: the place of each token
    counts: Tensor  # int64 [B]: real tokens of each row

    @classmethod
    def of(cls, real: Tensor) -> "Padding":
        """Makes it of a mask of the real tokens, bool [B, S]."""
        order = real.int().argsort(dim=1, descending=True, stable=True)
        return cls(order, order.argsort(dim=1), real.sum(dim=1))

    def front(self, x: Tensor) -> Tensor:
        """Returns x [B, S, width] with real tokens first; what was padding becomes zero."""
        return x.take_along_dim(self.order[..., None], dim=1).masked_fill(~self.real[..., None], 0)

    def back(self, x: Tensor) -> Tensor:
        """Returns x [B, S, width] in its own order. The inverse of `front`."""
        return x.take_along_dim(self.inverse[..., None], dim=1)

    @property
    def real(self) -> Tensor:
        """bool [B, S], in the order of `front`."""
        return torch.arange(self.order.shape[1], device=self.order.device) < self.counts[:, None]


class PackedDocuments(NamedTuple):
    """Where the documents of packed rows begin; none of them sees another."""

    resets: Tensor  # bool [B, S]: the first token of each document, in the order of `Padding.front`
    numbers: Tensor  # int64 [B, S]: of each token's document in its row, from 0, in the tokens' own order
    first_tokens: Tensor  # int64 [B, S]: place of the first token of each token's document, far below 0 before a reset

    @classmethod
    def of(cls, positions: Tensor, padding: Padding | None) -> "PackedDocuments":
        """Makes it of positions [B, S]: a token begins a document where its own does not follow the one before."""
        if padding:
            positions = positions.take_along_dim(padding.order, dim=1)
        resets = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0))
        if padding:
            resets = resets & padding.real
        starts = resets.take_along_dim(padding.inverse, dim=1) if padding else resets
        places = torch.arange(starts.shape[1], device=starts.device)
        first_tokens = torch.where(starts, places, BEFORE_ALL_TOKENS).cummax(dim=1).values
        return cls(resets, starts.cumsum(dim=1), first_tokens)


class AttentionMasks(NamedTuple):
    """What transformers' attention takes: for layers with the window, and for those that see everything before."""

    window: Any = None
    full: Any = None


class SequenceContext(NamedTuple):
    """What the layers need to know of a batch besides its activations."""

    cache: Cache | None
    padding: Padding | None  # None when there is no padding
    attention_masks: AttentionMasks | None  # None where window_attention runs
    rotary: (
        tuple[Tensor, Tensor] | None
    )  # cosines and sines, fp32 [B or 1, S, 1, d / 2]; None without attention or its positions
    documents: PackedDocuments | None = None  # None where each row is one document
    real_keys: Tensor | None = None  # bool [B, past + S], False for padding; None when every key in the window counts
    operations: Operations = IN_TORCH
    positions: Tensor | None = None  # int64 [B or 1, S]: of each token in its document
    memories: dict[int, Any] | None = None  # what layers of this call have written, by the numbers of their blocks

    @property
    def resets(self) -> Tensor | None:
        """Marks the tokens before which a layer forgets, bool [B, S] in the order of `Padding.front`."""
        return self.documents.resets if self.documents else None


class SambaLayer(nn.Module):
    """A mixer's layer, between the norm and the residual sum.

    A subclass is made with (config, layer_idx), and `layer_idx` is the number of its block in the cache.
    """

    isolates_documents: ClassVar[bool] = False
    """Whether no token sees those before its document's first token, where the context has `documents`. Packed rows are
    refused in a model that has a layer which does not."""

    writes: ClassVar[str | None] = None
    """The name of what the layer leaves to layers after it, which it calls `written` with; None: nothing."""

    reads: ClassVar[str | None] = None
    """The name of what the layer takes by `memory`, of the last layer before it that writes it; None: nothing."""

    takes_stream: ClassVar[bool] = False
    """Whether its forward takes the stream itself, of hidden_states' shape, as a third argument."""

    source_idx: int | None = None
    """The number of the block of that layer, which the model sets."""

    def __init__(self, config: SambaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx

    def written(self, memory: Any, context: SequenceContext) -> None:
        """Leaves the memory of the call's tokens to the layers that read it."""
        if context.memories is not None:
            context.memories[self.layer_idx] = memory

    def memory(self, context: SequenceContext) -> Any:
        """Returns what the layer's source has written in this call."""
        assert context.memories is not None, "the model makes room for what its layers write"
        assert self.source_idx is not None, "the model tells a layer what it reads"
        return context.memories[self.source_idx]

    def forward(self, hidden_states: Tensor, context: SequenceContext) -> Tensor | tuple[Tensor, Tensor | None]:
        """Maps hidden_states [B, S, width] to the same; continues from and updates the context's cache.

        Between calls a layer keeps in the cache what the next tokens need, so that a sequence in pieces of any length
        gives the result of the whole. Where the context has padding, the padding changes no other token's result.
        """
        raise NotImplementedError

    def init_weights(self) -> None:
        """Fills the parameters that are not those of an nn.Linear, by functions of transformers.initialization."""


class AttentionWeightsLayer(SambaLayer):
    """A layer that returns its output and attention weights, or None where the implementation gives none."""


class SambaRMSNorm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, config: SambaConfig) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.hidden_size)), config.norm_eps

    def forward(self, x: Tensor, operations: Operations = IN_TORCH) -> Tensor:
        return operations.rms_norm(x, self.weight, eps=self.eps)


class SambaResidualLinear(nn.Linear):
    """A projection that writes the residual stream, which has smaller initial weights."""


class SambaWholeHeadsLayer(SambaLayer):
    """A layer of heads with a matrix as each one's state, which norms and gates what every head gives."""

    isolates_documents = True

    name: ClassVar[str]
    """The section of the configuration that has its sizes."""

    activation: ClassVar[str] = "silu"
    """The output's gate: silu or sigmoid."""

    def __init__(self, config: SambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        sizes, width = config.sizes(self.name), config.hidden_size
        self.sizes, self.head_dim = sizes, sizes["head_dim"]
        self.value_dim = sizes["expand_v"] * self.head_dim
        self.key_width, self.value_width = (sizes["num_heads"] * size for size in (self.head_dim, self.value_dim))
        self.q_proj, self.k_proj = (nn.Linear(width, self.key_width, bias=False) for _ in range(2))
        self.v_proj = nn.Linear(width, self.value_width, bias=False)
        self.o_norm = nn.Parameter(torch.ones(self.value_dim))
        self.o_proj = SambaResidualLinear(self.value_width, width, bias=False)

    def per_head(self, *tensors: Tensor) -> Iterator[Tensor]:
        """Yields queries, keys and values [B, S, channels] as [B, S, H, channels of a head]."""
        sizes = (self.head_dim, self.head_dim, self.value_dim)
        return (tensor.unflatten(-1, (-1, size)) for tensor, size in zip(tensors, sizes, strict=True))

    def output(self, y: Tensor, gate: Tensor, context: SequenceContext) -> Tensor:
        """Maps what the heads give [B, S, H, channels] and the gate [B, S, H * channels] to the stream's width."""
        gate = gate.unflatten(-1, (-1, self.value_dim))
        y = norm_and_gate(y, self.o_norm, gate, eps=self.config.norm_eps, activation=self.activation)
        output = self.o_proj(y.flatten(2))
        return context.padding.back(output) if context.padding else output


def are_plain(*modules: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether modules are exactly of these classes and have no hook: their weights can be read without calling them.

    Adapters take a module's place, and offloading brings its weights by a hook when it is called.
    """
    return all(type(module) in kinds and not has_hooks(module) for module in modules)


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs when a module is called that would not if its weights were read."""
    return hasattr(module, "_hf_hook") or bool(module._forward_hooks or module._forward_pre_hooks)


def init_step_bias(bias: nn.Parameter, *, smallest: float, largest: float, floor: float) -> None:
    """Fills the bias of step sizes, which softplus makes log-uniform from `smallest` to `largest`, at least `floor`."""
    dt = torch.empty(bias.shape).uniform_(math.log(smallest), math.log(largest)).exp().clamp(min=floor)
    init.copy_(bias, dt + torch.log(-torch.expm1(-dt)))


def carried_states(cache: Cache | None, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
    """Returns a layer's convolution state [B, channels, tokens] and its recurrent state; None before its first token.

    They are the cache's own tensors, which its update overwrites: a layer updates the cache after it has used them.
    Versions of transformers differ in whether a layer has one state or several, of which this model uses the first.
    """
    if cache is None or not cache.has_previous_state(layer_idx):
        return None, None
    layer = cache.layers[layer_idx]
    states = (layer.conv_states, layer.recurrent_states)
    conv, recurrent = (s if s is None or isinstance(s, Tensor) else s[0] for s in states)
    return conv, recurrent


def convolve(
    x_BSD: Tensor, state_BDT: Tensor | None, *, weight: Tensor, bias: Tensor, context: SequenceContext
) -> tuple[Tensor, Tensor]:
    """Runs a layer's causal convolution with its SiLU over new tokens.

    Args:
        x_BSD: inputs, [B, S, channels].
        state_BDT: the inputs before them, [B, channels, taps - 1]; None at the start of a sequence.
        weight: [channels, taps].
        bias: [channels].

    Returns:
        Outputs [B, S, channels], and the last real inputs [B, taps - 1, channels].
    """
    before = None if state_BDT is None else state_BDT.transpose(1, 2).to(x_BSD.dtype)
    resets = None if context.resets is None else context.resets.expand(len(x_BSD), -1)
    y_BSD = context.operations.causal_conv_silu(x_BSD, weight, bias, before, resets=resets)
    return y_BSD, last_tokens(before, x_BSD, context.padding, count=weight.shape[1] - 1)


def last_tokens(before: Tensor | None, x: Tensor, padding: Padding | None, *, count: int) -> Tensor:
    """Returns the last real tokens of each row, [B, count, width], with zeros in the place of missing ones.

    Args:
        before: the tokens [B, count, width] that came before those of x; None at the start of a sequence.
        x: [B, S, width], with the real tokens first.
    """
    if before is None:
        before = x.new_zeros(x.shape[0], count, x.shape[2])
    if padding:
        places = padding.counts[:, None] + torch.arange(count, device=x.device)
        return torch.cat((before, x), dim=1).take_along_dim(places[..., None], dim=1)
    return torch.cat((before, x[:, -count:]), dim=1)[:, -count:]
