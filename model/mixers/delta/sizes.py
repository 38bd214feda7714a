"""The sections `model.mixers.gated_deltanet` and `model.mixers.kimi_delta`, and what a rank holds of their heads."""

from dataclasses import dataclass

from pydantic import ConfigDict, Field

from sambalm.model.mixers.step_sizes import StepSizes
from sambalm.parallel.shard import ALIGNMENT, Place, Shard, shard


class GatedDeltaNetSizes(StepSizes):
    """Heads, convolution and initial decays; defaults are flash-linear-attention's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_heads: int = Field(6, gt=0, description="Heads, each with a matrix as its state")
    head_dim: int = Field(256, gt=0, description="Channels of a head's queries and keys")
    expand_v: int = Field(2, gt=0, description="Channels of a head's values over head_dim")
    d_conv: int = Field(4, gt=1, description="Taps of the causal convolution of queries, keys and values")

    @property
    def value_dim(self) -> int:
        """Channels of a head's values."""
        return self.expand_v * self.head_dim


class KimiDeltaSizes(GatedDeltaNetSizes):
    """The same with the heads of Kimi Linear; its decays and gates come through `value_dim` channels."""

    num_heads: int = Field(16, gt=0, description="Heads, each with a matrix as its state")
    head_dim: int = Field(128, gt=0, description="Channels of a head's queries and keys")
    expand_v: int = Field(1, gt=0, description="Channels of a head's values over head_dim")


@dataclass(frozen=True)
class HeadShare:
    """One rank's share of the heads."""

    key: Shard  # of all heads' queries, and of their keys
    value: Shard  # of all heads' values
    heads: Shard
    numbers: Shard  # of what has a number a head, with zeros that keep the product with the rest aligned


def share_heads(sizes: GatedDeltaNetSizes, tp: Place) -> HeadShare:
    """Deals the heads to tensor-parallel ranks. Raises ValueError where there are fewer heads than ranks."""
    key = shard(sizes.num_heads * sizes.head_dim, tp, unit=sizes.head_dim)
    first, count = key.start // sizes.head_dim, key.length // sizes.head_dim
    value = Shard(sizes.num_heads * sizes.value_dim, first * sizes.value_dim, count * sizes.value_dim)
    return HeadShare(
        key,
        value,
        heads=Shard(sizes.num_heads, first, count),
        numbers=Shard(sizes.num_heads, first, count, padding=-count % ALIGNMENT),
    )
