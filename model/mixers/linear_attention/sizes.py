"""The sections `model.mixers.gla` and `model.mixers.retnet`, and what a rank holds of their heads."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from sambalm.parallel.shard import Place, Shard, shard


class LinearAttentionSizes(BaseModel):
    """Heads; defaults are flash-linear-attention's at a width of 1,024."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_heads: int = Field(4, gt=0, description="Heads, each with a matrix as its state")
    head_dim: int = Field(128, gt=0, multiple_of=2, description="Channels of a head's queries and keys")
    expand_v: int = Field(2, gt=0, description="Channels of a head's values over head_dim")

    @property
    def value_dim(self) -> int:
        """Channels of a head's values."""
        return self.expand_v * self.head_dim


class GLASizes(LinearAttentionSizes):
    """Heads and the way to their decays."""

    gate_rank: int = Field(16, gt=0, description="Channels through which the decays of keys' channels come")


class RetNetSizes(LinearAttentionSizes):
    """Heads and their positions."""

    num_heads: int = Field(8, gt=0, description="Heads, each with a matrix as its state")
    rope_base: float = Field(10_000.0, gt=0, description="Base of the rotary positions of queries and keys")


@dataclass(frozen=True)
class HeadShare:
    """One rank's share of the heads."""

    key: Shard  # of all heads' queries, and of their keys
    value: Shard  # of all heads' values
    heads: Shard


def share_heads(sizes: LinearAttentionSizes, tp: Place) -> HeadShare:
    """Deals the heads to tensor-parallel ranks. Raises ValueError where there are fewer heads than ranks."""
    key = shard(sizes.num_heads * sizes.head_dim, tp, unit=sizes.head_dim)
    first, count = key.start // sizes.head_dim, key.length // sizes.head_dim
    value = Shard(sizes.num_heads * sizes.value_dim, first * sizes.value_dim, count * sizes.value_dim)
    return HeadShare(key, value, heads=Shard(sizes.num_heads, first, count))
