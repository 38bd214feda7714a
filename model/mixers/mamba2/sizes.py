"""The section `model.mixers.mamba2`, and how a layer's groups of heads are dealt to ranks."""

from dataclasses import dataclass

from pydantic import ConfigDict, Field

from sambalm.model.mixers.step_sizes import StepSizes
from sambalm.parallel.shard import Place, Shard, shard


class Mamba2Sizes(StepSizes):
    """Sizes and initial step sizes of Mamba-2 (arXiv 2405.21060); the defaults are its code's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    d_state: int = Field(128, gt=0, description="States per channel")
    head_dim: int = Field(64, gt=1, description="Channels of a head, which share one decay rate and step size")
    groups: int = Field(
        1,
        gt=0,
        description="Groups of heads, each with B, C and a norm of its own; at least as many as parallel.tensor",
    )
    d_conv: int = Field(4, gt=1, description="Taps of the causal convolution")
    expand: int = Field(2, gt=0, description="The inner width over hidden_size")


@dataclass(frozen=True)
class HeadShare:
    """One rank's whole groups of heads, as its shares of each width of the layer."""

    inner: Shard  # the heads' channels
    states: Shard  # of B, and of C, for all groups
    heads: Shard
    groups: int

    @property
    def mixed(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner.length + 2 * self.states.length


def share_heads(sizes: Mamba2Sizes, hidden_size: int, place: Place) -> HeadShare:
    """Deals whole groups of heads to tensor-parallel ranks, earlier ranks getting one more where they do not divide.

    Raises:
        ValueError: heads do not divide the inner width, groups not the heads, or ranks are more than groups.
    """
    inner = sizes.expand * hidden_size
    if inner % (sizes.head_dim * sizes.groups):
        raise ValueError(
            f"model.mixers.mamba2.expand x model.hidden_size is {inner}, which is no multiple of head_dim "
            f"{sizes.head_dim} x groups {sizes.groups}: choose divisors of it"
        )
    if sizes.groups < place.size:
        raise ValueError(
            f"model.mixers.mamba2.groups is {sizes.groups}, less than parallel.tensor {place.size}: raise it or lower "
            "parallel.tensor"
        )
    width = inner // sizes.groups
    channels = shard(inner, place, unit=width)
    first, groups = channels.start // width, channels.length // width

    def of_each(unit: int) -> Shard:
        return Shard(sizes.groups * unit, first * unit, groups * unit)

    return HeadShare(channels, of_each(sizes.d_state), of_each(width // sizes.head_dim), groups)
