"""What mixers share that deal whole heads, each with a matrix as its state, to tensor-parallel ranks. Imports no torch.

K and V: channels of a key and a value.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from sambalm.model.mixers.base import Ability, HFSide, HFTensor, Mixer
from sambalm.model.mixers.counts import (
    FORWARD_AND_BACKWARD,
    FP32_BYTES,
    NORM_AND_GATE,
    Kernel,
    MemoryPass,
    Message,
    Share,
    Traffic,
    input_and_output_messages,
)
from sambalm.parallel.shard import ALIGNMENT, Place, Position, Shard, shard

if TYPE_CHECKING:
    from sambalm.model.config import ModelConfig

CHUNK_TOKENS = 64  # of the kernels, here and there


class HeadSizes(BaseModel):
    """Heads and their channels; defaults are flash-linear-attention's of linear attention at a width of 1,024."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_heads: int = Field(4, gt=0, description="Heads, each with a matrix as its state")
    head_dim: int = Field(128, gt=0, description="Channels of a head's queries and keys")
    expand_v: int = Field(2, gt=0, description="Channels of a head's values over head_dim")

    @property
    def value_dim(self) -> int:
        """Channels of a head's values."""
        return self.expand_v * self.head_dim


@dataclass(frozen=True)
class HeadShare:
    """One rank's share of the heads."""

    key: Shard  # of all heads' queries, and of their keys
    value: Shard  # of all heads' values
    heads: Shard

    @property
    def numbers(self) -> Shard:
        """The heads with zeros behind them, for what has a number a head: its product with the rest stays aligned."""
        heads = self.heads
        return Shard(heads.size, heads.start, heads.length, padding=-heads.length % ALIGNMENT)


def share_heads(sizes: HeadSizes, tp: Place) -> HeadShare:
    """Deals the heads to tensor-parallel ranks. Raises ValueError where there are fewer heads than ranks."""
    key = shard(sizes.num_heads * sizes.head_dim, tp, unit=sizes.head_dim)
    first, count = key.start // sizes.head_dim, key.length // sizes.head_dim
    value = Shard(sizes.num_heads * sizes.value_dim, first * sizes.value_dim, count * sizes.value_dim)
    return HeadShare(key, value, heads=Shard(sizes.num_heads, first, count))


class WholeHeadsHF(HFSide):
    """Such a mixer in the Hugging Face format; a subclass adds its tensors to these."""

    tensors: ClassVar = {
        "q_proj.weight": HFTensor(("in_proj.q.weight",)),
        "k_proj.weight": HFTensor(("in_proj.k.weight",)),
        "v_proj.weight": HFTensor(("in_proj.v.weight",)),
        "g_proj.weight": HFTensor(("in_proj.g.weight",)),
        "o_norm": HFTensor(("norm.weight",)),
        "o_proj.weight": HFTensor(("out_proj.weight",)),
    }
    cache_layer = "linear_attention"
    name: ClassVar[str]
    title: ClassVar[str]

    def describe(self, hf: Any) -> str:
        sizes = hf.sizes(self.name)
        return (
            f"{self.title}: {sizes['num_heads']} heads, keys of {sizes['head_dim']} and values of "
            f"{sizes['expand_v'] * sizes['head_dim']} channels"
        )


class WholeHeadsMixer(Mixer):
    """A mixer whose layer projects queries, keys, values and a gate, and norms each head's output.

    The sizes of a subclass derive from `HeadSizes`.
    """

    abilities = frozenset(Ability)
    state_flops: ClassVar[int]
    """Operations a token and element of a state, forward."""

    def check(self, config: "ModelConfig", *, tensor_ranks: int) -> None:
        heads = config.sizes_of(self).num_heads
        if heads < tensor_ranks:
            raise ValueError(
                f"model.mixers.{self.name}.num_heads is {heads}, less than parallel.tensor {tensor_ranks}: lower "
                "parallel.tensor"
            )

    def mixing_flops(self, config: "ModelConfig", *, sequence_tokens: int) -> float:
        sizes = config.sizes_of(self)
        states = sizes.num_heads * sizes.head_dim * sizes.value_dim
        return FORWARD_AND_BACKWARD * float(self.state_flops * states)

    def messages(self, config: "ModelConfig", share: Share) -> Iterator[Message]:
        yield from input_and_output_messages(config.hidden_size, share)
        yield Message("tensor", "all-reduce", share.tensor_ranks, FP32_BYTES * self._shared_weights(config))
        if share.context_ranks == 1:
            return
        sent = self._state_bytes(config, share) + self._decay_bytes(config, share)
        yield Message("context", "all-gather", share.context_ranks, sent, times=share.forwards)
        yield Message("context", "reduce-scatter", share.context_ranks, share.context_ranks * sent)

    def _shared_weights(self, config: "ModelConfig") -> int:
        """Counts weights that every tensor-parallel rank has whole and uses for its own heads."""
        return config.sizes_of(self).value_dim

    def _decay_bytes(self, config: "ModelConfig", share: Share) -> int:
        """Counts what says how much is left of the rank's states over its part of the sequences."""
        raise NotImplementedError

    def _rule_and_norm(self, config: "ModelConfig", share: Share, *, traffic: Traffic) -> Iterator[Kernel]:
        """Yields the kernel of the states, as often as a rank between others runs it, and the norm with its gate."""
        values = share.tokens * self._heads(config, share.tensor_ranks).value.length
        yield from [MemoryPass(traffic, values)] * (2 if share.context_ranks > 1 else 1)
        yield MemoryPass(NORM_AND_GATE[share.kernels.elementwise], values)

    def _state_bytes(self, config: "ModelConfig", share: Share, *, columns: int | None = None) -> int:
        """Counts a matrix [K, columns] of each of the rank's heads and sequences; by default the state, [K, V]."""
        keys = self._heads(config, share.tensor_ranks).key.length
        return FP32_BYTES * share.sequences * keys * (columns or config.sizes_of(self).value_dim)

    def _chunk_state_bytes(self, config: "ModelConfig", share: Share, *, columns: int | None = None) -> int:
        """Counts such matrices at the beginning of each chunk of the rank's part, which PyTorch keeps."""
        return math.ceil(share.part_tokens / CHUNK_TOKENS) * self._state_bytes(config, share, columns=columns)

    def backward_bytes(self, config: "ModelConfig", share: Share) -> int:
        heads = self._heads(config, share.tensor_ranks)
        return share.tokens * FP32_BYTES * 2 * (2 * heads.key.length + 2 * heads.value.length)

    def _heads(self, config: "ModelConfig", tensor_ranks: int) -> HeadShare:
        return share_heads(config.sizes_of(self), Position(tensor_ranks))
