"""Mega-S6 as the rest of the code knows it: parameters, operations, memory, messages and names.

T: tokens of a micro-batch on the rank, D: width, Z: channels of queries and keys; `a` is the bytes of an activation.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from sambalm.model.mixers.base import Ability, HFSide, HFTensor, Mixer
from sambalm.model.mixers.counts import (
    FORWARD_AND_BACKWARD,
    FP32_BYTES,
    Attention,
    Convolution,
    Kernel,
    MemoryPass,
    Message,
    Parameter,
    Scan,
    Share,
    Traffic,
    halo_message,
    mean_keys,
)
from sambalm.model.mixers.mega.sizes import POSITION_BASE, MegaSizes, Piece, pieces_of
from sambalm.model.mixers.scan_counts import SCAN_FLOPS, ScanCounts
from sambalm.model.ops.implementations import AttentionCall
from sambalm.parallel.shard import Place

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sambalm.model.config import ModelConfig
    from sambalm.model.ops.registry import Kernels
    from sambalm.parallel.groups import TensorParallel

# Of a channel of the stream, by the list of kernels that PyTorch launches: biases, activations, products and gates, and
# queries and keys for each head.
GATES = Traffic(64, 82)


class MegaHF(HFSide):
    """Mega-S6 in the Hugging Face format; the names of S6's tensors are Mamba's."""

    tensors: ClassVar = {
        "A_log": HFTensor(("s6.A_log",), is_fp32=True),
        "D": HFTensor(("s6.D",), is_fp32=True),
        "conv1d.weight": HFTensor(("s6.conv.weight",), is_conv=True),
        "conv1d.bias": HFTensor(("s6.conv.bias",)),
        "x_proj.weight": HFTensor(("s6.x_proj.weight",)),
        "dt_proj.weight": HFTensor(("s6.dt_proj.weight",)),
        "dt_proj.bias": HFTensor(("s6.dt_proj.bias",), is_fp32=True),
        **{
            f"in_proj.{kind}": HFTensor(tuple(f"in_proj.{part}.{kind}" for part in ("update", "reset", "hidden")))
            for kind in ("weight", "bias")
        },
        **{f"z_proj.{kind}": HFTensor((f"in_proj.shared.{kind}",)) for kind in ("weight", "bias")},
        **{
            f"{name}.{kind}": HFTensor((f"{name}.{kind}",))
            for name in ("v_proj", "h_proj")
            for kind in ("weight", "bias")
        },
        **{f"qk_{name}": HFTensor((f"query_{name}", f"key_{name}")) for name in ("scale", "position")},
        "q_bias": HFTensor(("query_bias",)),
    }
    module, layer = "sambalm.model.mixers.mega.hf", "SambaMega"
    cache_layer = "linear_attention"

    def describe(self, hf: Any) -> str:
        sizes = hf.sizes("mega")
        return (
            f"Mega-S6: queries and keys of {sizes['key_dim']} channels in chunks of {sizes['chunk_tokens']} tokens, S6 "
            f"of {sizes['d_state']} states, convolution over {sizes['d_conv']} tokens"
        )


class Mega(Mixer):
    """A gated attention within chunks, over what a convolution and the selective scan make of the stream."""

    letter, name = "Z", "mega"
    title, abilities = "Mega-S6", frozenset({Ability.CONTEXT_PARALLEL, Ability.PACKED_DOCUMENTS})
    sizes: ClassVar[type[BaseModel] | None] = MegaSizes
    hf: ClassVar[HFSide | None] = MegaHF()
    takes_stream = True

    def layer(self, config: "ModelConfig", *, tp: "TensorParallel", kernels: "Kernels") -> "nn.Module":
        from sambalm.model.mixers.mega.layer import MegaLayer

        return MegaLayer(config, self._sizes(config), letter=self.letter, tp=tp, kernels=kernels)

    def check(self, config: "ModelConfig", *, tensor_ranks: int) -> None:
        self._heads(config)

    def shrunk(self, config: "ModelConfig", *, hidden_size: int, sequence_share: float) -> dict[str, Any]:
        """Gives the small model two heads or more, and the chunk the share of a sequence that it has."""
        sizes = self._sizes(config)
        fitting = [
            key for key in range(2, sizes.key_dim + 1, 2) if hidden_size % (2 * key) == 0 and 4 * key <= hidden_size
        ]
        changes = {"chunk_tokens": max(2, round(sizes.chunk_tokens * sequence_share))}
        return changes | ({"key_dim": fitting[-1]} if fitting else {})

    def kernel_needs(
        self, config: "ModelConfig", *, sequences: int, part_tokens: int, tp: Place, cp: Place
    ) -> dict[str, Any]:
        sizes, heads = self._sizes(config), self._heads(config)
        calls = tuple(
            AttentionCall(
                batch=piece.chunks * sequences,
                query_heads=heads,
                kv_heads=heads,
                queries=piece.queries,
                keys=piece.before + piece.queries,
                head_dim=2 * sizes.key_dim,
                window=piece.before + piece.queries,
            )
            for piece in self._pieces(config, part_tokens, rank=cp.rank)
        )
        return {"d_state": sizes.d_state, "d_conv": sizes.d_conv, "attention_calls": calls}

    def shared_inputs(self, config: "ModelConfig", positions: "Tensor") -> "tuple[Tensor, Tensor]":
        """Returns cosines and sines of the tokens' places in their chunks, fp32 [S, B or 1, 1, key_dim / 2]."""
        from sambalm.model.ops.reference.window_attention import rotary_tables

        sizes = self._sizes(config)
        places = (positions % sizes.chunk_tokens).unsqueeze(2)
        return rotary_tables(places, head_dim=sizes.key_dim, base=POSITION_BASE)

    def shared_inputs_bytes(self, config: "ModelConfig", share: Share) -> int:
        return FP32_BYTES * self._sizes(config).key_dim * share.part_tokens

    def parameters(self, config: "ModelConfig", *, tensor_ranks: int) -> Sequence[Parameter]:
        sizes, D = self._sizes(config), config.hidden_size
        Z, N, rank = sizes.key_dim, sizes.d_state, sizes.step_rank(D)
        product = {"in_product": True, "matmul_only": True}
        return (
            Parameter("scale", (2 * Z,)),
            Parameter("position", (2 * Z,)),
            Parameter("bias", (Z,)),
            Parameter("s6.conv.weight", (D, sizes.d_conv)),
            Parameter("s6.conv.bias", (D,)),
            Parameter("s6.x_proj.weight", (rank + 2 * N, D), **product),
            Parameter("s6.dt_proj.weight", (D, rank), **product),
            Parameter("s6.dt_proj.bias", (D,)),
            # A rate, not a projection.
            Parameter("s6.A_log", (D, N), weight_decay=False),
            Parameter("s6.D", (D,)),
            Parameter("in_proj.weight", (3 * D + Z, D), **product, takes_fp8=True),
            Parameter("in_proj.bias", (3 * D + Z,)),
            Parameter("v_proj.weight", (D, D), **product, takes_fp8=True),
            Parameter("v_proj.bias", (D,)),
            Parameter("h_proj.weight", (D, D), **product, takes_fp8=True),
            Parameter("h_proj.bias", (D,)),
        )

    def mixing_flops(self, config: "ModelConfig", *, sequence_tokens: int) -> float:
        scan = SCAN_FLOPS * config.hidden_size * self._sizes(config).d_state
        return FORWARD_AND_BACKWARD * (scan + 4.0 * config.hidden_size * self._mean_keys(config, sequence_tokens))

    def messages(self, config: "ModelConfig", share: Share) -> Iterator[Message]:
        sizes = self._sizes(config)
        yield from self._scan(config, share).messages(d_conv=sizes.d_conv)
        if self._fetches_keys(config, share):
            yield halo_message(2 * sizes.key_dim + config.hidden_size, sizes.chunk_tokens - 1, share)

    def kernels(self, config: "ModelConfig", share: Share) -> Iterator[Kernel]:
        D, sizes = config.hidden_size, self._sizes(config)
        yield Convolution(share.tokens * D)
        scans = 2 if share.context_ranks > 1 else 1  # as Mamba's
        yield Scan(share.sequences, D, share.part_tokens, states=sizes.d_state, scans=scans)
        keys = self._mean_keys(config, share.sequence_tokens)
        yield Attention(FORWARD_AND_BACKWARD * 4.0 * D * keys * share.tokens)
        yield MemoryPass(GATES, share.tokens * D)

    def saved_bytes(self, config: "ModelConfig", share: Share, *, inside: bool) -> int:
        a, T, D, sizes = share.activation_bytes, share.tokens, config.hidden_size, self._sizes(config)
        N, R = sizes.d_state, sizes.step_rank(D)
        total = 2 * D * N * FP32_BYTES  # A's exponential and its negative
        total += a * T * D * 3 + a * T * (R + 2 * N)  # outputs of conv, scan and its SiLU; x_proj's output
        if share.kernels.conv == "torch":
            total += a * T * D  # the sum before SiLU
            if share.context_ranks > 1:  # the tokens that see a neighbour's, with those, and their sums
                total += 4 * a * share.sequences * (sizes.d_conv - 1) * D
        scan = self._scan(config, share)
        total += scan.context_bytes(inside=inside)
        total += scan.inside_bytes() if inside else a * T * D  # else the step sizes
        keys_before = (rank * share.part_tokens % sizes.chunk_tokens for rank in range(share.context_ranks))
        total += a * share.sequences * max(keys_before) * 2 * D  # a chunk's keys and values on the rank before
        total += self._gates_bytes(config, share)
        return total + (a * T * D + FP32_BYTES * T * self._heads(config) if inside else 0)  # output, log-sum-exp

    def _gates_bytes(self, config: "ModelConfig", share: Share) -> int:
        """Counts what stands between the products, and the attention's inputs."""
        a, T, D, Z = share.activation_bytes, share.tokens, config.hidden_size, self._sizes(config).key_dim
        # Queries, keys and values of all heads; the values before SiLU; three gates before their activation, the first
        # after it; SiLU of the reset gate unless it is fused; attention's output, and its product with that gate; and
        # the candidate less the stream.
        wide = 11 if share.kernels.elementwise == "torch" else 10
        return a * T * D * wide + T * Z * (a + max(a, FP32_BYTES))  # the shared channels before and after SiLU

    def backward_bytes(self, config: "ModelConfig", share: Share) -> int:
        wide = FP32_BYTES * share.tokens * config.hidden_size
        # The scan's backward has decays, states and gradients of a chunk, and comes when what the gates kept has gone.
        scan = 2 * wide + 3 * self._scan(config, share).chunk_bytes() - self._gates_bytes(config, share)
        return max(4 * wide, scan)

    def _scan(self, config: "ModelConfig", share: Share) -> ScanCounts:
        return ScanCounts(config.hidden_size, self._sizes(config).d_state, share, has_gate=False)

    def _fetches_keys(self, config: "ModelConfig", share: Share) -> bool:
        """Whether chunks lie across context-parallel ranks. Packed documents make them, and counts know of none."""
        return share.context_ranks > 1 and share.part_tokens % self._sizes(config).chunk_tokens > 0

    def _mean_keys(self, config: "ModelConfig", sequence_tokens: int) -> float:
        """Returns the keys that a query sees, on average over a sequence."""
        pieces = self._pieces(config, sequence_tokens, rank=0)
        seen = [piece.chunks * piece.queries * mean_keys(piece.queries, piece.queries) for piece in pieces]
        return sum(seen) / sequence_tokens

    def _pieces(self, config: "ModelConfig", part_tokens: int, *, rank: int) -> list[Piece]:
        chunk_tokens = self._sizes(config).chunk_tokens
        return pieces_of(part_tokens, first=rank * part_tokens, chunk_tokens=chunk_tokens)

    def _heads(self, config: "ModelConfig") -> int:
        return self._sizes(config).heads(config.hidden_size)

    def _sizes(self, config: "ModelConfig") -> MegaSizes:
        return config.sizes_of(MIXER)


MIXER = Mega()
