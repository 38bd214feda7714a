"""Mamba-2 and the gated memory unit over its output, as the rest of the code knows them: counts, costs and names.

T: tokens of a micro-batch on the rank, W: channels on the rank, H: its heads; `a` is the bytes of an activation.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from sambalm.model.mixers.base import Ability, HFSide, HFTensor, Mixer
from sambalm.model.mixers.counts import (
    FORWARD_AND_BACKWARD,
    FP32_BYTES,
    Convolution,
    Kernel,
    MemoryPass,
    Message,
    Parameter,
    Share,
    Traffic,
    halo_message,
    input_and_output_messages,
)
from sambalm.model.mixers.mamba2.sizes import HeadShare, Mamba2Sizes, share_heads
from sambalm.parallel.shard import Place, Position

if TYPE_CHECKING:
    from torch import nn

    from sambalm.model.config import ModelConfig
    from sambalm.model.ops.registry import Kernels
    from sambalm.parallel.groups import TensorParallel

# A channel and state: the decay's product, the input's, their sum, C * h and the sum over states.
SSD_FLOPS = 5
SCAN_OUTPUT = "scan's output"  # the memory of a layer, before its gate
# A channel. In PyTorch the chunks' operations, about so many passes in fp32; mamba-ssm's five kernels forward and their
# backward's, estimated by what they read and write.
SSD = {"torch": Traffic(160, 480), "mamba-ssm": Traffic(16, 48, fused=True)}
GATED_NORM = {"torch": Traffic(40, 64), "compiled": Traffic(8, 12, fused=True)}


class Mamba2HF(HFSide):
    """Mamba-2 in the Hugging Face format. Only tensors of one shape are joined in one."""

    tensors: ClassVar = {
        "dt_bias": HFTensor(("dt_bias",), is_fp32=True),
        "A_log": HFTensor(("A_log",), is_fp32=True),
        "D": HFTensor(("D",), is_fp32=True),
        "in_proj.weight": HFTensor(("in_proj.z.weight", "in_proj.x.weight")),
        "bc_proj.weight": HFTensor(("in_proj.B.weight", "in_proj.C.weight")),
        "dt_proj.weight": HFTensor(("in_proj.dt.weight",)),
        "conv1d.weight": HFTensor(("conv.x.weight",), is_conv=True),
        "conv1d.bias": HFTensor(("conv.x.bias",)),
        "bc_conv1d.weight": HFTensor(("conv.B.weight", "conv.C.weight"), is_conv=True),
        "bc_conv1d.bias": HFTensor(("conv.B.bias", "conv.C.bias")),
        "norm.weight": HFTensor(("norm.weight",)),
        "out_proj.weight": HFTensor(("out_proj.weight",)),
    }
    module, layer = "sambalm.model.mixers.mamba2.hf", "SambaMamba2"
    cache_layer = "linear_attention"

    def describe(self, hf: Any) -> str:
        sizes = hf.sizes("mamba2")
        return (
            f"Mamba-2: {sizes['d_state']} states, heads of {sizes['head_dim']} channels in {sizes['groups']} groups, "
            f"inner width {sizes['expand'] * hf.hidden_size}, convolution over {sizes['d_conv']} tokens"
        )


class GatedMemoryUnitHF(HFSide):
    """The gated memory unit in the Hugging Face format."""

    tensors: ClassVar = {
        "in_proj.weight": HFTensor(("in_proj.gate.weight",)),
        "norm.weight": HFTensor(("norm.weight",)),
        "out_proj.weight": HFTensor(("out_proj.weight",)),
    }
    module, layer = "sambalm.model.mixers.mamba2.hf", "SambaGatedMemoryUnit"

    def describe(self, hf: Any) -> str:
        return "gated memory unit over the scan's output of the last `S` before"


class Mamba2(Mixer):
    """State space layer with one decay a head, computed in chunks, and a causal convolution before it."""

    letter, name = "S", "mamba2"
    title, abilities = "Mamba-2", frozenset(Ability)
    sizes: ClassVar[type[BaseModel] | None] = Mamba2Sizes
    hf: ClassVar[HFSide | None] = Mamba2HF()
    writes: ClassVar[str | None] = SCAN_OUTPUT

    def layer(self, config: "ModelConfig", *, tp: "TensorParallel", kernels: "Kernels") -> "nn.Module":
        from sambalm.model.mixers.mamba2.layer import Mamba2Layer

        return Mamba2Layer(config, self._sizes(config), tp=tp, kernels=kernels)

    def check(self, config: "ModelConfig", *, tensor_ranks: int) -> None:
        self._share(config, tensor_ranks)

    def shrunk(self, config: "ModelConfig", *, hidden_size: int, sequence_share: float) -> dict[str, Any]:
        """Gives each of the small model's groups two heads or more."""
        sizes = self._sizes(config)
        channels, rest = divmod(sizes.expand * hidden_size, sizes.groups)
        fitting = [size for size in range(2, min(sizes.head_dim, channels // 2) + 1) if channels % size == 0]
        return {"head_dim": fitting[-1]} if fitting and not rest else {}

    def kernel_needs(
        self, config: "ModelConfig", *, sequences: int, part_tokens: int, tp: Place, cp: Place
    ) -> dict[str, Any]:
        return {"d_conv": self._sizes(config).d_conv, "operations": ("ssd",)}

    def parameters(self, config: "ModelConfig", *, tensor_ranks: int) -> Sequence[Parameter]:
        width, share, taps = config.hidden_size, self._share(config, tensor_ranks), self._sizes(config).d_conv
        inner, heads, product = share.inner.length, share.heads.length, {"in_product": True, "matmul_only": True}
        features = inner + share.mixed + heads
        return (
            Parameter("dt_bias", (heads,)),
            Parameter("A_log", (heads,)),
            Parameter("D", (heads,)),
            Parameter("in_proj.weight", (features, width), **product, takes_fp8=True),
            Parameter("conv.weight", (share.mixed, taps)),
            Parameter("conv.bias", (share.mixed,)),
            Parameter("norm.weight", (inner,)),
            Parameter("out_proj.weight", (width, inner), **product, takes_fp8=True),
        )

    def mixing_flops(self, config: "ModelConfig", *, sequence_tokens: int) -> float:
        sizes = self._sizes(config)
        return FORWARD_AND_BACKWARD * float(SSD_FLOPS * sizes.expand * config.hidden_size * sizes.d_state)

    def messages(self, config: "ModelConfig", share: Share) -> Iterator[Message]:
        yield from input_and_output_messages(config.hidden_size, share)
        ranks = share.context_ranks
        if ranks == 1:
            return
        heads = self._share(config, share.tensor_ranks)
        sent = self._state_bytes(config, share) + FP32_BYTES * share.sequences * heads.heads.length  # and the decays
        yield Message("context", "all-gather", ranks, sent, times=share.forwards)
        yield Message("context", "reduce-scatter", ranks, ranks * sent)
        yield halo_message(heads.mixed, self._sizes(config).d_conv - 1, share)

    def kernels(self, config: "ModelConfig", share: Share) -> Iterator[Kernel]:
        heads = self._share(config, share.tensor_ranks)
        channels = share.tokens * heads.inner.length
        scans = 2 if share.context_ranks > 1 else 1  # as Mamba's
        yield Convolution(share.tokens * heads.mixed)
        yield MemoryPass(SSD[share.kernels.ssd or "torch"], channels * scans)
        yield MemoryPass(GATED_NORM[share.kernels.elementwise], channels)

    def saved_bytes(self, config: "ModelConfig", share: Share, *, inside: bool) -> int:
        a, T, heads = share.activation_bytes, share.tokens, self._share(config, share.tensor_ranks)
        W, H = heads.inner.length, heads.heads.length
        total = a * T * (W + heads.mixed + H)  # the projections in one piece
        total += a * T * heads.mixed * (2 if share.kernels.conv == "torch" else 1)  # the convolution's output, and sum
        if share.kernels.elementwise == "compiled" or not share.is_narrow:
            total += a * T * W  # the scan's output, which otherwise the norm has in fp32
        total += _gated_norm_bytes(share, heads)
        total += self._context_bytes(config, share, inside=inside)
        return total + (self._scan_bytes(config, share) if inside else 0)

    def _scan_bytes(self, config: "ModelConfig", share: Share) -> int:
        """Counts what a scan keeps for its backward besides its inputs and its output."""
        if share.kernels.ssd == "mamba-ssm":  # sums of the decays' exponents and the step sizes
            return 2 * FP32_BYTES * share.tokens * self._share(config, share.tensor_ranks).heads.length
        from sambalm.model.ops.reference.ssd_scan import CHUNK_TOKENS

        return math.ceil(share.part_tokens / CHUNK_TOKENS) * self._state_bytes(config, share)

    def _context_bytes(self, config: "ModelConfig", share: Share, *, inside: bool) -> int:
        """Counts what passing states over context-parallel ranks keeps."""
        ranks, state = share.context_ranks, self._state_bytes(config, share)
        total = 0
        if ranks > 1:  # all ranks' reached states; with a scan that is computed again the state that it starts from
            total += ranks * state + (0 if inside else state)
        if ranks > 2 and inside:  # a rank between others scans twice
            total += self._scan_bytes(config, share)
        return total

    def _state_bytes(self, config: "ModelConfig", share: Share) -> int:
        inner = self._share(config, share.tensor_ranks).inner.length
        return FP32_BYTES * share.sequences * inner * self._sizes(config).d_state

    def backward_bytes(self, config: "ModelConfig", share: Share) -> int:
        heads = self._share(config, share.tensor_ranks)
        total = _gated_norm_backward_bytes(share, heads)
        if share.kernels.ssd != "mamba-ssm":  # decays between tokens, weights of both, and their gradients
            from sambalm.model.ops.reference.ssd_scan import CHUNK_TOKENS

            tokens = min(CHUNK_TOKENS, share.part_tokens)
            total += 4 * FP32_BYTES * share.sequences * heads.heads.length * tokens**2
        return total

    def _sizes(self, config: "ModelConfig") -> Mamba2Sizes:
        return config.sizes_of(MIXER)

    def _share(self, config: "ModelConfig", tensor_ranks: int) -> HeadShare:
        return share_heads(self._sizes(config), config.hidden_size, Position(tensor_ranks))


class GatedMemoryUnit(Mamba2):
    """A gate over the scan's output of the last Mamba-2 layer before, with that layer's sizes."""

    letter, name = "U", "gmu"
    title, sizes, hf = "gated memory unit", None, GatedMemoryUnitHF()
    writes, reads = None, SCAN_OUTPUT

    def layer(self, config: "ModelConfig", *, tp: "TensorParallel", kernels: "Kernels") -> "nn.Module":
        from sambalm.model.mixers.mamba2.layer import GatedMemoryUnit as Layer

        return Layer(config, self._sizes(config), memory=SCAN_OUTPUT, tp=tp, kernels=kernels)

    def kernel_needs(
        self, config: "ModelConfig", *, sequences: int, part_tokens: int, tp: Place, cp: Place
    ) -> dict[str, Any]:
        return {}

    def parameters(self, config: "ModelConfig", *, tensor_ranks: int) -> Sequence[Parameter]:
        width, inner = config.hidden_size, self._share(config, tensor_ranks).inner.length
        product = {"in_product": True, "matmul_only": True, "takes_fp8": True}
        return (
            Parameter("in_proj.weight", (inner, width), **product),
            Parameter("norm.weight", (inner,)),
            Parameter("out_proj.weight", (width, inner), **product),
        )

    def mixing_flops(self, config: "ModelConfig", *, sequence_tokens: int) -> float:
        return 0.0

    def messages(self, config: "ModelConfig", share: Share) -> Iterator[Message]:
        return input_and_output_messages(config.hidden_size, share)

    def kernels(self, config: "ModelConfig", share: Share) -> Iterator[Kernel]:
        channels = share.tokens * self._share(config, share.tensor_ranks).inner.length
        yield MemoryPass(GATED_NORM[share.kernels.elementwise], channels)

    def saved_bytes(self, config: "ModelConfig", share: Share, *, inside: bool) -> int:
        """Counts the norm, and the gate where the norm has no copy of it; the memory is the other layer's."""
        heads = self._share(config, share.tensor_ranks)
        has_copy = share.is_narrow and share.kernels.elementwise == "torch"
        gate = 0 if has_copy else share.activation_bytes * share.tokens * heads.inner.length
        return gate + _gated_norm_bytes(share, heads)

    def backward_bytes(self, config: "ModelConfig", share: Share) -> int:
        return _gated_norm_backward_bytes(share, self._share(config, share.tensor_ranks))


def _gated_norm_bytes(share: Share, heads: HeadShare) -> int:
    """Counts what the gated norm keeps besides its inputs in their own precision, its output included."""
    T, W = share.tokens, heads.inner.length
    total = share.activation_bytes * T * W
    if share.kernels.elementwise == "compiled":
        return total
    # The inputs in fp32, SiLU of the gate, the product, its norm, and the groups' scales.
    return total + FP32_BYTES * T * (W * (5 if share.is_narrow else 3) + heads.groups)


def _gated_norm_backward_bytes(share: Share, heads: HeadShare) -> int:
    widths = 6 if share.kernels.elementwise == "compiled" else 13  # in single operations
    return share.tokens * FP32_BYTES * widths * heads.inner.length


MIXER, GMU = Mamba2(), GatedMemoryUnit()
