"""Attention as the rest of the code knows it, over a window and over everything before: counts, costs and names.

T: tokens of a micro-batch on the rank; `a` is the bytes of an activation.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sambalm.model.mixers.attention.heads import HeadShare, kv_copies, share_heads
from sambalm.model.mixers.attention.sizes import CROSS_LETTER, FULL_LETTER, LETTER
from sambalm.model.mixers.base import Ability, HFSide, HFTensor, Mixer
from sambalm.model.mixers.counts import (
    FORWARD_AND_BACKWARD,
    FP32_BYTES,
    Attention,
    Kernel,
    MemoryPass,
    Message,
    Parameter,
    Share,
    Traffic,
    halo_message,
    input_and_output_messages,
    mean_keys,
)
from sambalm.model.ops.implementations import AttentionCall
from sambalm.parallel.shard import Place, Position

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sambalm.model.config import ModelConfig
    from sambalm.model.ops.registry import Kernels
    from sambalm.parallel.groups import TensorParallel

# Of a query or key: casts, four products of halves, two sums, joined.
ROTARY = {"torch": Traffic(48, 52), "compiled": Traffic(4, 4, fused=True)}
KEYS_AND_VALUES = "keys and values"  # the memory of full attention
LAYOUT = Traffic(4, 4, fused=True)  # of a query: heads next to tokens and back


class AttentionHF(HFSide):
    """Window attention in the Hugging Face format, by the names of flash-linear-attention."""

    tensors: ClassVar = {
        "q_proj.weight": HFTensor(("qkv_proj.q.weight",)),
        "k_proj.weight": HFTensor(("qkv_proj.k.weight",)),
        "v_proj.weight": HFTensor(("qkv_proj.v.weight",)),
        "o_proj.weight": HFTensor(("o_proj.weight",)),
    }
    module, layer = "sambalm.model.mixers.attention.hf", "SambaAttention"
    step: ClassVar[str | None] = "sambalm.model.mixers.attention.step:AttentionStep"
    cache_layer = "sliding_attention"

    def to_config(self, config: "ModelConfig") -> dict[str, Any]:
        return {
            "attn": {
                "num_heads": config.num_query_heads,
                "num_kv_heads": config.num_kv_heads,
                "window_size": config.window,
                "rope_theta": config.rope_base,
            }
        }

    def from_config(self, hf: Any) -> dict[str, Any]:
        return {
            "num_query_heads": hf.num_attention_heads,
            "num_kv_heads": hf.num_key_value_heads,
            "window": hf.sliding_window,
            "rope_base": hf.attn["rope_theta"],
        }

    def describe(self, hf: Any) -> str:
        return f"sliding-window attention: {_heads_text(hf)}, window {hf.sliding_window}, {_positions_text(hf)}"


class FullAttentionHF(AttentionHF):
    """Full attention in the Hugging Face format: other layers, whose cache grows with the text."""

    layer, step = "SambaFullAttention", None
    cache_layer = "full_attention"

    def describe(self, hf: Any) -> str:
        return f"full causal attention: {_heads_text(hf)}, {_positions_text(hf)}"


class CrossAttentionHF(FullAttentionHF):
    """Cross attention in the Hugging Face format, which keeps nothing in the cache."""

    tensors: ClassVar = {
        "q_proj.weight": HFTensor(("q_proj.q.weight",)),
        "o_proj.weight": HFTensor(("o_proj.weight",)),
    }
    layer, cache_layer = "SambaCrossAttention", "moe"

    def describe(self, hf: Any) -> str:
        return f"cross attention: {_heads_text(hf)}, over the keys and values of the last `{FULL_LETTER}` before"


def _heads_text(hf: Any) -> str:
    return f"{hf.num_attention_heads} query heads, {hf.num_key_value_heads} key/value heads"


def _positions_text(hf: Any) -> str:
    return "no positions" if hf.rotary_base is None else f"rotary base {hf.rotary_base:g}"


class WindowAttention(Mixer):
    """Causal attention over a sliding window, with grouped queries and, where `rope_base` is given, positions."""

    letter, name = LETTER, "attention"
    title, abilities = "window attention", frozenset(Ability)
    hf: ClassVar[HFSide | None] = AttentionHF()

    def layer(self, config: "ModelConfig", *, tp: "TensorParallel", kernels: "Kernels") -> "nn.Module":
        from sambalm.model.mixers.attention.layer import WindowAttentionLayer

        return WindowAttentionLayer(config, letter=self.letter, tp=tp, kernels=kernels)

    def _layer_window(self, config: "ModelConfig") -> int | None:
        return config.window

    def _window(self, config: "ModelConfig", sequence_tokens: int) -> int:
        """Returns how many positions a query sees at most; as many as the sequence has are all of them."""
        window = self._layer_window(config)
        return sequence_tokens if window is None else window

    def check(self, config: "ModelConfig", *, tensor_ranks: int) -> None:
        try:
            kv_copies(config, tensor_ranks)
        except ValueError as error:
            raise ValueError(
                f"parallel.tensor is {tensor_ranks}: {error} (model.num_query_heads, model.num_kv_heads); choose at "
                f"most {config.num_kv_heads}, or a multiple of it up to {config.num_query_heads}"
            ) from None

    def weight_copies(self, config: "ModelConfig", *, tensor_ranks: int) -> int:
        return kv_copies(config, tensor_ranks)

    def kernel_needs(
        self, config: "ModelConfig", *, sequences: int, part_tokens: int, tp: Place, cp: Place
    ) -> dict[str, Any]:
        """Returns the calls of the kernel on this rank."""
        heads, window = share_heads(config, tp), self._window(config, part_tokens * cp.size)
        calls = tuple(
            AttentionCall(
                batch=sequences,
                query_heads=heads.query.length // config.head_dim,
                kv_heads=heads.kv_heads,
                queries=queries,
                keys=before + queries,
                head_dim=config.head_dim,
                window=window,
            )
            for queries, before in _kernel_calls(window, part_tokens, cp)
        )
        return {"attention_calls": calls}

    def shared_inputs(self, config: "ModelConfig", positions: "Tensor") -> "tuple[Tensor, Tensor] | None":
        """Returns cosines and sines of this rank's positions, fp32 [S, B or 1, 1, head dim / 2]; None without any."""
        if config.rope_base is None:
            return None
        from sambalm.model.ops.reference.window_attention import rotary_tables

        return rotary_tables(positions.unsqueeze(2), head_dim=config.head_dim, base=config.rope_base)

    def shared_inputs_bytes(self, config: "ModelConfig", share: Share) -> int:
        return 0 if config.rope_base is None else FP32_BYTES * config.head_dim * share.part_tokens

    def parameters(self, config: "ModelConfig", *, tensor_ranks: int) -> Sequence[Parameter]:
        width, heads = config.hidden_size, self._heads(config, tensor_ranks)
        product = {"in_product": True, "takes_fp8": True}
        alone = heads.kv_copies == 1  # copies of a kv head are summed before they are multiplied
        return (
            Parameter("qkv_proj.query", (heads.query.length, width), **product, matmul_only=True),
            Parameter("qkv_proj.key_value", (2 * heads.kv.length, width), **product, matmul_only=alone),
            Parameter("o_proj.weight", (width, heads.query.length), **product, matmul_only=True),
        )

    def mixing_flops(self, config: "ModelConfig", *, sequence_tokens: int) -> float:
        keys = mean_keys(sequence_tokens, self._window(config, sequence_tokens))
        return FORWARD_AND_BACKWARD * 4.0 * config.hidden_size * keys

    def messages(self, config: "ModelConfig", share: Share) -> Iterator[Message]:
        yield from input_and_output_messages(config.hidden_size, share)
        heads = self._heads(config, share.tensor_ranks)
        kv_weights = FP32_BYTES * 2 * heads.kv.length * config.hidden_size
        yield Message("tensor", "all-reduce", heads.kv_copies, kv_weights)
        if share.context_ranks > 1:
            yield halo_message(2 * heads.kv.length, self._window(config, share.sequence_tokens) - 1, share)

    def kernels(self, config: "ModelConfig", share: Share) -> Iterator[Kernel]:
        heads = self._heads(config, share.tensor_ranks)
        flops = FORWARD_AND_BACKWARD * 4.0 * heads.query.length * self._busiest_keys(config, share)
        yield Attention(flops * share.tokens)
        if config.rope_base is not None:
            rotated = share.tokens * (heads.query.length + heads.kv.length)
            yield MemoryPass(ROTARY[share.kernels.elementwise], rotated)
        yield MemoryPass(LAYOUT, share.tokens * heads.query.length)

    def _busiest_keys(self, config: "ModelConfig", share: Share) -> float:
        """Returns how many keys a query sees on average, on the context-parallel rank that computes longest."""
        return mean_keys(share.sequence_tokens, config.window)

    def saved_bytes(self, config: "ModelConfig", share: Share, *, inside: bool) -> int:
        a, T, heads = share.activation_bytes, share.tokens, self._heads(config, share.tensor_ranks)
        query, kv, window = heads.query.length, heads.kv.length, self._window(config, share.sequence_tokens)
        calls = _kernel_calls(window, share.part_tokens, _last(share))
        total = a * T * 2 * query  # the rotated queries, and o_proj's input
        if config.rope_base is None:
            total += a * T * 2 * kv  # the projections in one piece, whose queries are those
        if share.context_ranks > 1:  # keys and values in one tensor, and once more those joined to the neighbours'
            keys = sum(queries + before for queries, before in calls)
            total += a * share.sequences * keys * 2 * kv
        elif config.rope_base is not None:
            total += a * T * (query + 3 * kv)  # the projections, for the values, and the rotated keys
        return total + (self._kernel_bytes(config, share) if inside else 0)

    def _kernel_bytes(self, config: "ModelConfig", share: Share) -> int:
        """Counts what the kernel keeps besides its inputs."""
        a, T, heads = share.activation_bytes, share.tokens, self._heads(config, share.tensor_ranks)
        query, window = heads.query.length, self._window(config, share.sequence_tokens)
        total = a * T * query + FP32_BYTES * T * query // config.head_dim  # output, log-sum-exp
        if share.kernels.attention != "torch":
            return total
        calls = _kernel_calls(window, share.part_tokens, _last(share))
        return total + sum(_joined_blocks_bytes(share, heads, *call, window=window) for call in calls)

    def backward_bytes(self, config: "ModelConfig", share: Share) -> int:
        heads = self._heads(config, share.tensor_ranks)
        return share.tokens * share.activation_bytes * 2 * (heads.query.length + 2 * heads.kv.length)

    @staticmethod
    def _heads(config: "ModelConfig", tensor_ranks: int) -> HeadShare:
        return share_heads(config, Position(tensor_ranks))


def _last(share: Share) -> Position:
    """Returns the context-parallel rank that has the most keys."""
    return Position(share.context_ranks, rank=share.context_ranks - 1)


def _kernel_calls(window: int, part_tokens: int, cp: Place) -> list[tuple[int, int]]:
    """Lists queries, and keys before the first of them, of each call of the kernel, as `AttentionLayer` makes them."""
    reach = window - 1
    if cp.size == 1:
        return [(part_tokens, 0)]
    near = reach if part_tokens >= 2 * reach else part_tokens
    calls = [(part_tokens - near, near), (near, min(reach, cp.rank * part_tokens))]
    return [(queries, before) for queries, before in calls if queries]


def _joined_blocks_bytes(share: Share, heads: HeadShare, length: int, before: int, *, window: int) -> int:
    """Counts the masks of one call in plain PyTorch, and the keys and values that each block joins."""
    from sambalm.model.ops.reference.window_attention import MAX_BLOCK_QUERIES, MIN_BLOCK_QUERIES

    a = share.activation_bytes
    before = min(before, window - 1)
    if before == 0 and length <= window:
        return 0
    block = max(MIN_BLOCK_QUERIES, min(window, MAX_BLOCK_QUERIES))
    total = 0
    starts = [0, *range(before + block, before + length, block), before + length]
    for number in range(len(starts) - 1):
        first_query = starts[number] if number else before
        first_key = max(start for start in starts if start <= max(0, first_query - window + 1))
        keys, queries = starts[number + 1] - first_key, starts[number + 1] - first_query
        total += queries * keys * a
        if first_key != starts[number]:
            total += share.sequences * keys * 2 * heads.kv.length * a
    return total


class FullAttention(WindowAttention):
    """Causal attention over everything before, with the heads and positions of the window attention."""

    letter, name, title = FULL_LETTER, "full_attention", "full attention"
    hf: ClassVar[HFSide | None] = FullAttentionHF()
    writes: ClassVar[str | None] = KEYS_AND_VALUES

    def layer(self, config: "ModelConfig", *, tp: "TensorParallel", kernels: "Kernels") -> "nn.Module":
        from sambalm.model.mixers.attention.layer import FullAttentionLayer

        return FullAttentionLayer(config, letter=self.letter, tp=tp, kernels=kernels)

    def _layer_window(self, config: "ModelConfig") -> int | None:
        return None

    def _busiest_keys(self, config: "ModelConfig", share: Share) -> float:
        return share.sequence_tokens - (share.part_tokens - 1) / 2  # of the last part, which has the most before it


class CrossAttention(FullAttention):
    """Causal attention over the keys and values of the last full attention before (arXiv 2405.05254, 2507.06607)."""

    letter, name, title = CROSS_LETTER, "cross_attention", "cross attention"
    hf = CrossAttentionHF()
    writes, reads = None, KEYS_AND_VALUES

    def layer(self, config: "ModelConfig", *, tp: "TensorParallel", kernels: "Kernels") -> "nn.Module":
        from sambalm.model.mixers.attention.layer import CrossAttentionLayer

        return CrossAttentionLayer(config, letter=self.letter, memory=KEYS_AND_VALUES, tp=tp, kernels=kernels)

    def parameters(self, config: "ModelConfig", *, tensor_ranks: int) -> Sequence[Parameter]:
        width, query = config.hidden_size, self._heads(config, tensor_ranks).query.length
        product = {"in_product": True, "takes_fp8": True, "matmul_only": True}
        return Parameter("q_proj.weight", (query, width), **product), Parameter(
            "o_proj.weight", (width, query), **product
        )

    def messages(self, config: "ModelConfig", share: Share) -> Iterator[Message]:
        return input_and_output_messages(config.hidden_size, share)

    def saved_bytes(self, config: "ModelConfig", share: Share, *, inside: bool) -> int:
        """Counts what full attention keeps, without keys and values."""
        a, T, heads = share.activation_bytes, share.tokens, self._heads(config, share.tensor_ranks)
        total = a * T * 2 * heads.query.length  # the rotated queries, and o_proj's input
        return total + (self._kernel_bytes(config, share) if inside else 0)

    def backward_bytes(self, config: "ModelConfig", share: Share) -> int:
        return super().backward_bytes(config, share) * share.context_ranks  # keys' gradients are of all parts


MIXER, FULL, CROSS = WindowAttention(), FullAttention(), CrossAttention()
