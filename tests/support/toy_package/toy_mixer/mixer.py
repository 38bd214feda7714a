"""The token shift as sambalm knows it."""

from typing import ClassVar

from pydantic import BaseModel, Field

from sambalm.model.mixers.base import Ability, HFSide, HFTensor, Mixer
from sambalm.model.mixers.counts import (
    FORWARD_AND_BACKWARD,
    FP32_BYTES,
    MemoryPass,
    Parameter,
    Traffic,
    halo_message,
    input_and_output_messages,
)
from sambalm.parallel.shard import Position, shard

GATE_AND_SHIFT = Traffic(14, 30)


class TokenShiftSizes(BaseModel, extra="forbid", frozen=True):
    """The section `model.mixers.token_shift`."""

    channels: int = Field(32, gt=0, description="Channels that are shifted")


class TokenShiftHF(HFSide):
    tensors: ClassVar = {
        "in_proj.weight": HFTensor(("in_proj.gate.weight", "in_proj.value.weight")),
        "mix.weight": HFTensor(("mix.weight",), is_fp32=True),
        "out_proj.weight": HFTensor(("out_proj.weight",)),
    }
    module, layer = "toy_mixer.hf", "TokenShift"
    cache_layer = "linear_attention"

    def describe(self, hf):
        return f"shift by a token: {hf.sizes('token_shift')['channels']} channels"


class TokenShift(Mixer):
    letter, name = "T", "token_shift"
    title, abilities = "token shift", frozenset(Ability)
    sizes = TokenShiftSizes
    hf = TokenShiftHF()

    def layer(self, config, *, tp, kernels):
        from toy_mixer.layer import TokenShiftLayer

        return TokenShiftLayer(config, self.sizes_of(config), tp=tp)

    def check(self, config, *, tensor_ranks):
        channels = self.sizes_of(config).channels
        if channels < tensor_ranks:
            raise ValueError(
                f"model.mixers.token_shift.channels is {channels}, less than parallel.tensor {tensor_ranks}: raise it"
            )

    def parameters(self, config, *, tensor_ranks):
        width, channels = config.hidden_size, self._channels(config, tensor_ranks)
        return (
            Parameter("in_proj.weight", (2 * channels, width), in_product=True, matmul_only=True, takes_fp8=True),
            Parameter("mix.weight", (channels, 2)),
            Parameter("out_proj.weight", (width, channels), in_product=True, matmul_only=True, takes_fp8=True),
        )

    def mixing_flops(self, config, *, sequence_tokens):
        return FORWARD_AND_BACKWARD * 4.0 * self.sizes_of(config).channels

    def messages(self, config, share):
        yield from input_and_output_messages(config.hidden_size, share)
        if share.context_ranks > 1:
            yield halo_message(self._channels(config, share.tensor_ranks), 1, share)

    def kernels(self, config, share):
        yield MemoryPass(GATE_AND_SHIFT, share.tokens * self._channels(config, share.tensor_ranks))

    def saved_bytes(self, config, share, *, inside):
        """Counts gate and value in one tensor, the tokens before, the mixture, SiLU of the gate and the product."""
        return 6 * share.activation_bytes * share.tokens * self._channels(config, share.tensor_ranks)

    def backward_bytes(self, config, share):
        return 4 * FP32_BYTES * share.tokens * self._channels(config, share.tensor_ranks)

    def sizes_of(self, config) -> TokenShiftSizes:
        return config.sizes_of(self)

    def _channels(self, config, tensor_ranks: int) -> int:
        return shard(self.sizes_of(config).channels, Position(tensor_ranks)).length


MIXER = TokenShift()
