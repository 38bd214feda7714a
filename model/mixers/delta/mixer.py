"""Gated DeltaNet and Kimi Delta Attention as the rest of the code knows them: counts, costs and names.

T: tokens of a micro-batch on the rank, H: heads on the rank, K and V: channels of a key and a value; `a` is the bytes
of an activation.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sambalm.model.mixers.base import HFTensor
from sambalm.model.mixers.counts import (
    FP32_BYTES,
    Convolution,
    Kernel,
    Message,
    Parameter,
    Share,
    Traffic,
    gated_head_norm_bytes,
    halo_message,
)
from sambalm.model.mixers.delta.sizes import GatedDeltaNetSizes, KimiDeltaSizes
from sambalm.model.mixers.whole_heads import CHUNK_TOKENS, WholeHeadsHF, WholeHeadsMixer
from sambalm.parallel.shard import Place

if TYPE_CHECKING:
    from torch import nn

    from sambalm.model.config import ModelConfig
    from sambalm.model.ops.registry import Kernels
    from sambalm.parallel.groups import TensorParallel

# Of a value, as if memory bounded the rule: estimates from launches and products, which no GPU has been asked about.
RULE = {"torch": Traffic(800, 2400), "fla": Traffic(60, 180, fused=True)}


class GatedDeltaNetHF(WholeHeadsHF):
    """Gated DeltaNet in the Hugging Face format."""

    # Errors in the decays grow over the tokens that a state lives: their parameters are fp32, as Mamba's.
    tensors: ClassVar = {
        **WholeHeadsHF.tensors,
        "A_log": HFTensor(("A_log",), is_fp32=True),
        "dt_bias": HFTensor(("dt_bias",), is_fp32=True),
        "a_proj.weight": HFTensor(("in_proj.a.weight",)),
        "b_proj.weight": HFTensor(("in_proj.b.weight",)),
        "q_conv": HFTensor(("conv.q.weight",)),
        "k_conv": HFTensor(("conv.k.weight",)),
        "v_conv": HFTensor(("conv.v.weight",)),
    }
    module, layer = "sambalm.model.mixers.delta.hf", "SambaGatedDeltaNet"
    name, title = "gated_deltanet", "Gated DeltaNet"

    def describe(self, hf: Any) -> str:
        return f"{super().describe(hf)}, convolution over {hf.sizes(self.name)['d_conv']} tokens"


class KimiDeltaHF(GatedDeltaNetHF):
    """Kimi Delta Attention in the Hugging Face format."""

    tensors: ClassVar = {
        **{
            name: tensor
            for name, tensor in GatedDeltaNetHF.tensors.items()
            if name not in ("a_proj.weight", "g_proj.weight")
        },
        "f_down.weight": HFTensor(("in_proj.f_down.weight",)),
        "f_up.weight": HFTensor(("in_proj.f_up.weight",)),
        "g_down.weight": HFTensor(("in_proj.g_down.weight",)),
        "g_up.weight": HFTensor(("in_proj.g_up.weight",)),
    }
    layer = "SambaKimiDelta"
    name, title = "kimi_delta", "Kimi Delta Attention"


class GatedDeltaNet(WholeHeadsMixer):
    """A matrix as each head's state, which the delta rule writes and one number a token decays (arXiv 2412.06464)."""

    letter, name = "G", "gated_deltanet"
    title = "Gated DeltaNet"
    sizes: ClassVar = GatedDeltaNetSizes
    # The state decays, is read under the key, takes in a product of key and value, and is read by the query.
    state_flops = 7
    per_channel = False
    hf: ClassVar = GatedDeltaNetHF()

    def layer(self, config: "ModelConfig", *, tp: "TensorParallel", kernels: "Kernels") -> "nn.Module":
        from sambalm.model.mixers.delta.layer import DeltaLayer

        return DeltaLayer(config, config.sizes_of(self), per_channel=self.per_channel, tp=tp, kernels=kernels)

    def kernel_needs(
        self, config: "ModelConfig", *, sequences: int, part_tokens: int, tp: Place, cp: Place
    ) -> dict[str, Any]:
        sizes = config.sizes_of(self)
        return {"d_conv": sizes.d_conv, "operations": ("delta_rule",), "delta_key_dims": (sizes.head_dim,)}

    def parameters(self, config: "ModelConfig", *, tensor_ranks: int) -> Sequence[Parameter]:
        width, sizes, share = config.hidden_size, config.sizes_of(self), self._heads(config, tensor_ranks)
        key, value = share.key.length, share.value.length
        product = {"in_product": True, "matmul_only": True}
        return (
            Parameter("A_log", (share.heads.length,)),
            Parameter("dt_bias", (key if self.per_channel else share.heads.length,)),
            *self._input_parameters(config, tensor_ranks=tensor_ranks),
            Parameter("conv.weight", (2 * key + value, sizes.d_conv)),
            Parameter("norm.weight", (sizes.value_dim,)),
            Parameter("out_proj.weight", (width, value), **product, takes_fp8=True),
        )

    def _input_parameters(self, config: "ModelConfig", *, tensor_ranks: int) -> Iterator[Parameter]:
        width, share = config.hidden_size, self._heads(config, tensor_ranks)
        key, value, numbers = share.key.length, share.value.length, share.numbers
        product = {"in_product": True, "matmul_only": True}
        yield Parameter("in_proj.wide", (2 * key + 2 * value, width), **product, takes_fp8=True)
        zeros = 2 * numbers.padding * width
        yield Parameter("in_proj.numbers", (2 * numbers.held, width), **product, padding=zeros)

    def messages(self, config: "ModelConfig", share: Share) -> Iterator[Message]:
        yield from super().messages(config, share)
        if share.context_ranks > 1:
            heads = self._heads(config, share.tensor_ranks)
            yield halo_message(2 * heads.key.length + heads.value.length, config.sizes_of(self).d_conv - 1, share)

    def _decay_bytes(self, config: "ModelConfig", share: Share) -> int:
        """Counts a matrix [K, K] of each state, by which it is multiplied."""
        return self._state_bytes(config, share, columns=config.sizes_of(self).head_dim)

    def kernels(self, config: "ModelConfig", share: Share) -> Iterator[Kernel]:
        heads = self._heads(config, share.tensor_ranks)
        yield Convolution(share.tokens * (2 * heads.key.length + heads.value.length))
        assert share.kernels.delta_rule is not None, "kernel_needs says that there is one"
        yield from self._rule_and_norm(config, share, traffic=RULE[share.kernels.delta_rule])

    def saved_bytes(self, config: "ModelConfig", share: Share, *, inside: bool) -> int:
        a, T, sizes = share.activation_bytes, share.tokens, config.sizes_of(self)
        heads = self._heads(config, share.tensor_ranks)
        key, value = heads.key.length, heads.value.length
        total = a * T * (self._projected(config, share) + 2 * key + value)  # the projections, and conv's output
        if share.kernels.conv == "torch":
            total += a * T * (2 * key + value)  # the sum before SiLU
            total += a * (2 * key + value) * sizes.d_conv if share.is_narrow else 0  # the weights' copy
        total += self._norm_bytes(config, share) + a * T * value  # and out_proj's input
        total += self._context_bytes(config, share, inside=inside)
        return total + self._rule_bytes(config, share, columns=sizes.value_dim) if inside else total

    def _projected(self, config: "ModelConfig", share: Share) -> int:
        """Counts the features that one product makes of the stream, whose parts are views of it."""
        heads = self._heads(config, share.tensor_ranks)
        return 2 * heads.key.length + 2 * heads.value.length + 2 * heads.numbers.held

    def _norm_bytes(self, config: "ModelConfig", share: Share) -> int:
        heads = self._heads(config, share.tensor_ranks)
        elements, count = share.tokens * heads.value.length, share.tokens * heads.heads.length
        activation = "sigmoid" if self.per_channel else "silu"
        return gated_head_norm_bytes(share, elements=elements, heads=count, activation=activation)

    def _rule_bytes(self, config: "ModelConfig", share: Share, *, columns: int) -> int:
        """Counts what the rule keeps besides its inputs, of states with so many columns."""
        a, T, heads = share.activation_bytes, share.tokens, self._heads(config, share.tensor_ranks)
        if share.kernels.delta_rule == "torch":  # the states at the beginning of each chunk
            return self._chunk_state_bytes(config, share, columns=columns)
        # Both of length one, their lengths, sums of decays, beta, and a triangular matrix of each chunk for the system.
        count, decays = heads.heads.length, heads.key.length if self.per_channel else heads.heads.length
        total = 2 * a * T * heads.key.length + FP32_BYTES * T * (2 * count + decays) + a * T * count
        return total + (2 if self.per_channel else 1) * a * T * count * CHUNK_TOKENS

    def _context_bytes(self, config: "ModelConfig", share: Share, *, inside: bool) -> int:
        """Counts what passing states over context-parallel ranks keeps."""
        sizes, heads = config.sizes_of(self), self._heads(config, share.tensor_ranks).heads.length
        if share.context_ranks == 1:
            return 0
        columns = sizes.head_dim + sizes.value_dim
        states = self._state_bytes(config, share, columns=columns)
        total = share.context_ranks * states  # what all ranks sent
        if share.context_ranks == 2:
            return total + states  # zeros, which the ends of the sequence send
        total += share.activation_bytes * share.tokens * heads * columns  # the values with zeros beside them
        return total + self._rule_bytes(config, share, columns=columns) if inside else total


class KimiDelta(GatedDeltaNet):
    """The same with a decay of each channel of a key, and a sigmoid as the output's gate (arXiv 2510.26692)."""

    letter, name, title = "K", "kimi_delta", "Kimi Delta Attention"
    sizes: ClassVar = KimiDeltaSizes
    per_channel = True
    hf: ClassVar = KimiDeltaHF()

    def _input_parameters(self, config: "ModelConfig", *, tensor_ranks: int) -> Iterator[Parameter]:
        width, share = config.hidden_size, self._heads(config, tensor_ranks)
        rank, key, value = config.sizes_of(self).value_dim, share.key.length, share.value.length
        product = {"in_product": True, "matmul_only": True}
        yield Parameter("in_proj.wide", (2 * key + value, width), **product, takes_fp8=True)
        zeros = share.numbers.padding * width
        yield Parameter("in_proj.numbers", (share.numbers.held, width), **product, padding=zeros)
        alone = tensor_ranks == 1  # several ranks' gradients are summed before they meet the optimizer
        yield Parameter("in_proj.down", (2 * rank, width), in_product=True, matmul_only=alone)
        yield Parameter("in_proj.f_up", (key, rank), **product)
        yield Parameter("in_proj.g_up", (value, rank), **product)

    def _shared_weights(self, config: "ModelConfig") -> int:
        rank = config.sizes_of(self).value_dim
        return rank + 2 * rank * config.hidden_size

    def _projected(self, config: "ModelConfig", share: Share) -> int:
        heads, rank = self._heads(config, share.tensor_ranks), config.sizes_of(self).value_dim
        one_product = 2 * heads.key.length + heads.value.length + heads.numbers.held + 2 * rank
        gate = heads.value.length if share.kernels.elementwise == "compiled" else 0  # a sigmoid keeps its result
        return one_product + heads.key.length + gate


MIXER, KIMI = GatedDeltaNet(), KimiDelta()
