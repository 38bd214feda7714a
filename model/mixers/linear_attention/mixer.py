"""Gated linear attention and retention as the rest of the code knows them: counts, costs and names.

T: tokens of a micro-batch on the rank, H: heads on the rank, K and V: channels of a key and a value; `a` is the bytes
of an activation.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from sambalm.model.mixers.base import HFSide, HFTensor
from sambalm.model.mixers.counts import (
    FP32_BYTES,
    Kernel,
    MemoryPass,
    Parameter,
    Share,
    Traffic,
    gated_head_norm_bytes,
)
from sambalm.model.mixers.linear_attention.sizes import GLASizes, RetNetSizes
from sambalm.model.mixers.whole_heads import CHUNK_TOKENS, WholeHeadsHF, WholeHeadsMixer
from sambalm.parallel.shard import Place

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sambalm.model.config import ModelConfig
    from sambalm.model.ops.registry import Kernels
    from sambalm.parallel.groups import TensorParallel

# Of a value, as if memory bounded the kernel: estimates from launches and products, which no GPU has been asked about.
ATTENTION = {"torch": Traffic(500, 1500), "fla": Traffic(30, 90, fused=True)}
DECAYS = Traffic(30, 30)  # of a key's channel: cast, bias, log-sigmoid and quotient in fp32
ROTARY = {"torch": Traffic(28, 28), "compiled": Traffic(4, 4, fused=True)}  # of a query's or a key's channel


class GLAHF(WholeHeadsHF):
    """Gated linear attention in the Hugging Face format."""

    tensors: ClassVar = {
        **WholeHeadsHF.tensors,
        "decay_down.weight": HFTensor(("in_proj.decay_down.weight",)),
        "decay_up.weight": HFTensor(("in_proj.decay_up.weight",)),
        # Errors in the decays grow over the tokens that a state lives.
        "decay_bias": HFTensor(("in_proj.decay_up.bias",), is_fp32=True),
    }
    module, layer = "sambalm.model.mixers.linear_attention.hf", "SambaGatedLinearAttention"
    name, title = "gla", "gated linear attention"


class RetNetHF(GLAHF):
    """Retention in the Hugging Face format."""

    tensors: ClassVar = {name: tensor for name, tensor in GLAHF.tensors.items() if not name.startswith("decay")}
    layer = "SambaRetention"
    name, title = "retnet", "retention"


class GatedLinearAttention(WholeHeadsMixer):
    """A matrix as each head's state, whose key channels decay as the token says (arXiv 2312.06635)."""

    letter, name = "A", "gla"
    title, state_flops = "gated linear attention", 5  # a state decays, takes in a product of key and value, and is read
    sizes: ClassVar[type[BaseModel] | None] = GLASizes
    hf: ClassVar[HFSide | None] = GLAHF()

    def layer(self, config: "ModelConfig", *, tp: "TensorParallel", kernels: "Kernels") -> "nn.Module":
        from sambalm.model.mixers.linear_attention.layer import GatedLinearAttentionLayer

        return GatedLinearAttentionLayer(config, config.sizes_of(self), tp=tp, kernels=kernels)

    def kernel_needs(
        self, config: "ModelConfig", *, sequences: int, part_tokens: int, tp: Place, cp: Place
    ) -> dict[str, Any]:
        return {"operations": ("linear_attention",)}

    def parameters(self, config: "ModelConfig", *, tensor_ranks: int) -> Sequence[Parameter]:
        width, share = config.hidden_size, self._heads(config, tensor_ranks)
        key, value, product = share.key.length, share.value.length, {"in_product": True, "matmul_only": True}
        return (
            Parameter("in_proj.wide", (2 * key + 2 * value, width), **product, takes_fp8=True),
            *self._decay_parameters(config, tensor_ranks=tensor_ranks),
            Parameter("norm.weight", (config.sizes_of(self).value_dim,)),
            Parameter("out_proj.weight", (width, value), **product, takes_fp8=True),
        )

    def _decay_parameters(self, config: "ModelConfig", *, tensor_ranks: int) -> Iterator[Parameter]:
        key, rank = self._heads(config, tensor_ranks).key.length, config.sizes_of(self).gate_rank
        alone = tensor_ranks == 1  # several ranks' gradients are summed before they meet the optimizer
        yield Parameter("in_proj.down", (rank, config.hidden_size), in_product=True, matmul_only=alone)
        yield Parameter("in_proj.up", (key, rank), in_product=True, matmul_only=True)
        yield Parameter("in_proj.bias", (key,))

    def _shared_weights(self, config: "ModelConfig") -> int:
        return super()._shared_weights(config) + config.sizes_of(self).gate_rank * config.hidden_size

    def _decay_bytes(self, config: "ModelConfig", share: Share) -> int:
        return FP32_BYTES * share.sequences * self._heads(config, share.tensor_ranks).key.length

    def kernels(self, config: "ModelConfig", share: Share) -> Iterator[Kernel]:
        assert share.kernels.linear_attention is not None, "kernel_needs says that there is one"
        yield from self._rule_and_norm(config, share, traffic=ATTENTION[share.kernels.linear_attention])
        keys = self._heads(config, share.tensor_ranks).key.length
        yield self._before(share, keys=share.tokens * keys)

    def _before(self, share: Share, *, keys: int) -> Kernel:
        """Returns what is computed of the projections before the kernel, of so many channels of keys."""
        return MemoryPass(DECAYS, keys)

    def saved_bytes(self, config: "ModelConfig", share: Share, *, inside: bool) -> int:
        a, T, heads = share.activation_bytes, share.tokens, self._heads(config, share.tensor_ranks)
        key, value = heads.key.length, heads.value.length
        total = a * T * (2 * key + 2 * value)  # the projections
        total += self._before_bytes(config, share)
        elements, count = T * value, T * heads.heads.length
        total += gated_head_norm_bytes(share, elements=elements, heads=count, activation="silu")
        total += a * T * value  # out_proj's input
        total += self._context_bytes(config, share, inside=inside)
        return total + self._attention_bytes(config, share) if inside else total

    def _before_bytes(self, config: "ModelConfig", share: Share) -> int:
        """Counts what the decays keep: their few channels, the log-sigmoid's input, its factor on a CPU, the result."""
        a, T, key = share.activation_bytes, share.tokens, self._heads(config, share.tensor_ranks).key.length
        wide = 3 if share.kernels.device == "cpu" else 2
        return a * T * config.sizes_of(self).gate_rank + wide * FP32_BYTES * T * key

    def _attention_bytes(self, config: "ModelConfig", share: Share) -> int:
        """Counts what the kernel keeps besides its inputs."""
        if share.kernels.linear_attention == "torch":  # the states at the beginning of each chunk
            return self._chunk_state_bytes(config, share)
        # The decays since each chunk's beginning, and the scores within chunks.
        heads = self._heads(config, share.tensor_ranks)
        return FP32_BYTES * share.tokens * (heads.key.length + heads.heads.length * CHUNK_TOKENS)

    def _context_bytes(self, config: "ModelConfig", share: Share, *, inside: bool) -> int:
        """Counts what passing states over context-parallel ranks keeps."""
        ranks, state = share.context_ranks, self._state_bytes(config, share)
        if ranks == 1:
            return 0
        # All ranks' states; with a kernel that runs again the state that it starts from.
        total = ranks * (state + self._decay_bytes(config, share)) + (0 if inside else state)
        return total + (self._attention_bytes(config, share) if ranks > 2 and inside else 0)


class RetNet(GatedLinearAttention):
    """The same with one fixed decay a head, and rotary positions (arXiv 2307.08621)."""

    letter, name = "R", "retnet"
    title, sizes, hf = "retention", RetNetSizes, RetNetHF()

    def layer(self, config: "ModelConfig", *, tp: "TensorParallel", kernels: "Kernels") -> "nn.Module":
        from sambalm.model.mixers.linear_attention.layer import RetentionLayer

        return RetentionLayer(config, config.sizes_of(self), letter=self.letter, tp=tp, kernels=kernels)

    def shared_inputs(self, config: "ModelConfig", positions: "Tensor") -> "tuple[Tensor, Tensor, Tensor]":
        """Returns cosines and sines of the positions, [S, B or 1, 1, head dim / 2], and the decays' logarithms [heads].

        All are in fp32.
        """
        from sambalm.model.ops.reference.linear_attention import retention_log_decays
        from sambalm.model.ops.reference.window_attention import rotary_tables

        sizes = config.sizes_of(self)
        tables = rotary_tables(positions.unsqueeze(2), head_dim=sizes.head_dim, base=sizes.rope_base)
        return *tables, retention_log_decays(sizes.num_heads, device=positions.device)

    def shared_inputs_bytes(self, config: "ModelConfig", share: Share) -> int:
        sizes = config.sizes_of(self)
        return FP32_BYTES * (sizes.head_dim * share.part_tokens + sizes.num_heads)

    def _decay_parameters(self, config: "ModelConfig", *, tensor_ranks: int) -> Iterator[Parameter]:
        yield from ()

    def _shared_weights(self, config: "ModelConfig") -> int:
        return config.sizes_of(self).value_dim

    def _decay_bytes(self, config: "ModelConfig", share: Share) -> int:
        return FP32_BYTES * share.sequences * self._heads(config, share.tensor_ranks).heads.length

    def _before(self, share: Share, *, keys: int) -> Kernel:
        return MemoryPass(ROTARY[share.kernels.elementwise], 2 * keys)

    def _before_bytes(self, config: "ModelConfig", share: Share) -> int:
        """Counts the rotated queries and keys."""
        return share.activation_bytes * share.tokens * 2 * self._heads(config, share.tensor_ranks).key.length

    def _attention_bytes(self, config: "ModelConfig", share: Share) -> int:
        return super()._attention_bytes(config, share) if share.kernels.linear_attention == "torch" else 0


MIXER, RETNET = GatedLinearAttention(), RetNet()
