"""Mamba-1 as the rest of the code knows it: parameters, operations, memory, messages and names.

T: tokens of a micro-batch on the rank, D: channels on the rank, N: states, R: the rank of the step sizes; `a` is the
bytes of an activation.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sambalm.model.mixers.base import Ability, HFSide, HFTensor, Mixer
from sambalm.model.mixers.counts import (
    FORWARD_AND_BACKWARD,
    FP32_BYTES,
    Convolution,
    Kernel,
    Message,
    Parameter,
    Scan,
    Share,
    input_and_output_messages,
)
from sambalm.model.mixers.scan_counts import SCAN_FLOPS, ScanCounts
from sambalm.parallel.shard import Place, Position, shard

if TYPE_CHECKING:
    from torch import nn

    from sambalm.model.config import ModelConfig
    from sambalm.model.ops.registry import Kernels
    from sambalm.parallel.groups import TensorParallel


class MambaHF(HFSide):
    """Mamba in the Hugging Face format, by the names of flash-linear-attention."""

    # An error in the decay rates or step sizes grows over the tokens that a state lives: those are fp32.
    tensors: ClassVar = {
        "A_log": HFTensor(("A_log",), is_fp32=True),
        "D": HFTensor(("D",), is_fp32=True),
        "in_proj.weight": HFTensor(("in_proj.x.weight", "in_proj.z.weight")),
        "conv1d.weight": HFTensor(("conv.weight",), is_conv=True),
        "conv1d.bias": HFTensor(("conv.bias",)),
        "x_proj.weight": HFTensor(("x_proj.weight",)),
        "dt_proj.weight": HFTensor(("dt_proj.weight",)),
        "dt_proj.bias": HFTensor(("dt_proj.bias",), is_fp32=True),
        "out_proj.weight": HFTensor(("out_proj.weight",)),
    }
    module, layer = "sambalm.model.mixers.mamba.hf", "SambaMamba"
    step = "sambalm.model.mixers.mamba.step:MambaStep"
    cache_layer = "linear_attention"

    def to_config(self, config: "ModelConfig") -> dict[str, Any]:
        return {
            "state_size": config.d_state,
            "expand": config.expand,
            "conv_kernel": config.d_conv,
            "time_step_rank": config.dt_rank_size,
            "time_step_min": config.dt_min,
            "time_step_max": config.dt_max,
            "time_step_floor": config.dt_floor,
        }

    def from_config(self, hf: Any) -> dict[str, Any]:
        return {
            "d_state": hf.state_size,
            "expand": hf.expand,
            "d_conv": hf.conv_kernel,
            "dt_rank": hf.time_step_rank,
            "dt_min": hf.time_step_min,
            "dt_max": hf.time_step_max,
            "dt_floor": hf.time_step_floor,
        }

    def describe(self, hf: Any) -> str:
        return (
            f"Mamba-1: {hf.state_size} states, inner width {hf.intermediate_size}, convolution over {hf.conv_kernel} "
            f"tokens, step rank {hf.time_step_rank}"
        )


class Mamba(Mixer):
    """Selective state space layer with a causal convolution."""

    letter, name = "M", "mamba"
    title, abilities = "Mamba", frozenset(Ability)
    hf = MambaHF()

    def layer(self, config: "ModelConfig", *, tp: "TensorParallel", kernels: "Kernels") -> "nn.Module":
        from sambalm.model.mixers.mamba.layer import MambaLayer

        return MambaLayer(config, tp=tp, kernels=kernels)

    def check(self, config: "ModelConfig", *, tensor_ranks: int) -> None:
        if config.inner_size < tensor_ranks:
            raise ValueError(
                f"model.expand x model.hidden_size is {config.inner_size}, less than parallel.tensor {tensor_ranks}: "
                "lower parallel.tensor"
            )

    def kernel_needs(
        self, config: "ModelConfig", *, sequences: int, part_tokens: int, tp: Place, cp: Place
    ) -> dict[str, Any]:
        return {"d_state": config.d_state, "d_conv": config.d_conv}

    def parameters(self, config: "ModelConfig", *, tensor_ranks: int) -> Sequence[Parameter]:
        width, rank, states = config.hidden_size, config.dt_rank_size, config.d_state
        share = shard(config.inner_size, Position(tensor_ranks))
        channels, zeros, product = share.held, share.padding, {"in_product": True, "matmul_only": True}
        return (
            Parameter("in_proj.weight", (2 * channels, width), **product, takes_fp8=True, padding=2 * zeros * width),
            Parameter("conv.weight", (channels, config.d_conv), padding=zeros * config.d_conv),
            Parameter("conv.bias", (channels,), padding=zeros),
            Parameter("x_proj.weight", (rank + 2 * states, channels), **product, padding=zeros * (rank + 2 * states)),
            Parameter("dt_proj.weight", (channels, rank), **product, padding=zeros * rank),
            Parameter("dt_proj.bias", (channels,), padding=zeros),
            # A rate, not a projection.
            Parameter("A_log", (channels, states), weight_decay=False, padding=zeros * states),
            Parameter("D", (channels,), padding=zeros),
            Parameter("out_proj.weight", (width, channels), **product, takes_fp8=True, padding=zeros * width),
        )

    def mixing_flops(self, config: "ModelConfig", *, sequence_tokens: int) -> float:
        return FORWARD_AND_BACKWARD * float(SCAN_FLOPS * config.inner_size * config.d_state)

    def messages(self, config: "ModelConfig", share: Share) -> Iterator[Message]:
        yield from input_and_output_messages(config.hidden_size, share)
        projected = share.activation_bytes * share.tokens * (config.dt_rank_size + 2 * config.d_state)
        yield Message("tensor", "all-reduce", share.tensor_ranks, projected, times=share.forwards + 1)
        yield from self._scan(config, share).messages(d_conv=config.d_conv)

    def kernels(self, config: "ModelConfig", share: Share) -> Iterator[Kernel]:
        channels = self._channels(config, share.tensor_ranks)
        yield Convolution(channels * share.tokens)
        # A rank between others scans for the state that it reaches and from the state that it starts at; at the ends of
        # the sequence one rank waits for the other's scan instead.
        scans = 2 if share.context_ranks > 1 else 1
        yield Scan(share.sequences, channels, share.part_tokens, states=config.d_state, scans=scans)

    def saved_bytes(self, config: "ModelConfig", share: Share, *, inside: bool) -> int:
        a, T, D = share.activation_bytes, share.tokens, self._channels(config, share.tensor_ranks)
        N, R, kernels = config.d_state, config.dt_rank_size, share.kernels
        total = 2 * D * N * FP32_BYTES  # A's exponential and its negative
        total += a * T * D * 2 + a * T * (R + 2 * N)  # the outputs of conv and scan, x_proj's output
        joins_halo = kernels.conv == "torch" and share.context_ranks > 1
        if kernels.conv == "torch":
            total += a * T * D  # the sum before SiLU
        if joins_halo:  # the input with what precedes
            total += a * (T + share.sequences * (config.d_conv - 1)) * D
        scan = self._scan(config, share)
        total += scan.context_bytes(inside=inside)
        # x and z are one tensor: it stays whole for a kernel that keeps either.
        keeps_z = kernels.scan == "cuda" or (kernels.scan == "torch" and not share.is_narrow) or not inside
        total += a * T * 2 * D if keeps_z or not joins_halo else 0
        if not inside:
            return total + a * T * D  # dt
        return total + scan.inside_bytes()

    def backward_bytes(self, config: "ModelConfig", share: Share) -> int:
        scan = self._scan(config, share)
        # Of a chunk decays, states, gradients and a product of theirs.
        return share.tokens * FP32_BYTES * 4 * scan.channels + 4 * scan.chunk_bytes()

    def _scan(self, config: "ModelConfig", share: Share) -> ScanCounts:
        return ScanCounts(self._channels(config, share.tensor_ranks), config.d_state, share)

    @staticmethod
    def _channels(config: "ModelConfig", tensor_ranks: int) -> int:
        return shard(config.inner_size, Position(tensor_ranks)).held


MIXER = Mamba()
