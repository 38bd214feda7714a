"""The sections `model.mixers.gla` and `model.mixers.retnet`."""

from pydantic import Field

from sambalm.model.mixers.whole_heads import HeadSizes


class LinearAttentionSizes(HeadSizes):
    """Heads of whose channels rotary positions may turn pairs."""

    head_dim: int = Field(128, gt=0, multiple_of=2, description="Channels of a head's queries and keys")


class GLASizes(LinearAttentionSizes):
    """Heads and the way to their decays."""

    gate_rank: int = Field(16, gt=0, description="Channels through which the decays of keys' channels come")


class RetNetSizes(LinearAttentionSizes):
    """Heads and their positions."""

    num_heads: int = Field(8, gt=0, description="Heads, each with a matrix as its state")
    rope_base: float = Field(10_000.0, gt=0, description="Base of the rotary positions of queries and keys")
