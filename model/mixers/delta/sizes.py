"""The sections `model.mixers.gated_deltanet` and `model.mixers.kimi_delta`."""

from pydantic import Field

from sambalm.model.mixers.step_sizes import StepSizes
from sambalm.model.mixers.whole_heads import HeadSizes


class GatedDeltaNetSizes(HeadSizes, StepSizes):
    """Heads, convolution and initial decays; defaults are flash-linear-attention's."""

    num_heads: int = Field(6, gt=0, description="Heads, each with a matrix as its state")
    head_dim: int = Field(256, gt=0, description="Channels of a head's queries and keys")
    d_conv: int = Field(4, gt=1, description="Taps of the causal convolution of queries, keys and values")


class KimiDeltaSizes(GatedDeltaNetSizes):
    """The same with the heads of Kimi Linear; its decays and gates come through `value_dim` channels."""

    num_heads: int = Field(16, gt=0, description="Heads, each with a matrix as its state")
    head_dim: int = Field(128, gt=0, description="Channels of a head's queries and keys")
    expand_v: int = Field(1, gt=0, description="Channels of a head's values over head_dim")
