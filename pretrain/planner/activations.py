"""What one forward through a pipeline chunk keeps for its backward, and what that backward needs besides.

All of it follows from the model and one rank's share of a micro-batch, so layouts that differ in neither share it. A
mixer counts what its own layer keeps. T: tokens of a micro-batch on the rank; `a` is the bytes of an activation (2 in
bf16).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from sambalm.model.config import ModelConfig
from sambalm.model.mixers.counts import FP32_BYTES, Share
from sambalm.model.registry import mixer
from sambalm.pretrain.planner.sizes import Chunk, embedding_rows, local_sizes

ENDS = "ends"  # embedding, final norm, head and loss, and what a pipeline keeps between chunks


@dataclass(frozen=True)
class SublayerMemory:
    """Bytes of one kind of sublayer."""

    saved_bytes: int  # what autograd keeps
    backward_bytes: int  # what its backward needs besides


@dataclass(frozen=True)
class ChunkMemory:
    """Bytes of one forward through a pipeline chunk, by kind of sublayer or as a whole."""

    saved_by_kind: Mapping[str, int]  # what autograd keeps
    rounded_by_kind: Mapping[str, int]  # of that the weights' copies, which may stay from one forward to the next
    at_loss_bytes: int  # what the backward needs besides at the loss
    in_layers_bytes: int  # and at the dearest sublayer


class ActivationCounts:
    """Counts forwards through the chunks of one model, each chunk once."""

    def __init__(self, model: ModelConfig, share: Share, *, is_pipelined: bool) -> None:
        """
        Args:
            is_pipelined: whether a schedule keeps each chunk's input and output.
        """
        self._model, self._share, self._is_pipelined = model, share, is_pipelined
        self._sublayers = _sublayers(model, share)
        self._chunks: dict[Chunk, ChunkMemory] = {}

    def of(self, chunk: Chunk) -> ChunkMemory:
        """Returns one forward through a chunk."""
        if chunk not in self._chunks:
            self._chunks[chunk] = _chunk_memory(
                self._model, chunk, self._share, self._sublayers, is_pipelined=self._is_pipelined
            )
        return self._chunks[chunk]


@lru_cache(maxsize=1024)
def activation_counts(model: ModelConfig, share: Share, *, is_pipelined: bool) -> ActivationCounts:
    """Returns one object for all layouts whose ranks keep the same."""
    return ActivationCounts(model, share, is_pipelined=is_pipelined)


def _chunk_memory(
    model: ModelConfig, chunk: Chunk, share: Share, sublayers: Mapping[str, SublayerMemory], *, is_pipelined: bool
) -> ChunkMemory:
    saved, rounded = dict.fromkeys([*(one.name for one in model.kinds), ENDS], 0), {}
    for letter, count in chunk.letters:
        kind, weights = mixer(letter).name, local_sizes(model, letter, share.tensor_ranks).matrix
        saved[kind] = count * sublayers[letter].saved_bytes
        saved[ENDS] += mixer(letter).shared_inputs_bytes(model, share)  # once for all layers of the kind
        rounded[kind] = count * rounded_bytes(share.activation_bytes, weights)
    at_loss, freed = 0, 0
    if chunk.is_last:
        vocabulary = embedding_rows(model, share.tensor_ranks)
        freed = _head_saved_bytes(model, share)  # before any sublayer's backward
        saved[ENDS] += freed
        rounded[ENDS] = rounded_bytes(share.activation_bytes, vocabulary * model.hidden_size)
        at_loss = _loss_gradient_bytes(model, share)
    if chunk.is_first:
        saved[ENDS] += share.tokens * 8  # the tokens, int64
    if is_pipelined:
        saved[ENDS] += 2 * _residual_bytes(model, share)
    in_layers = max(0, *(sublayers[letter].backward_bytes - freed for letter, _ in chunk.letters))
    return ChunkMemory(saved, rounded, at_loss_bytes=at_loss, in_layers_bytes=in_layers)


def rounded_bytes(activation_bytes: int, elements: int) -> int:
    """Counts weights in the activations' dtype, where it is another one than theirs."""
    return elements * activation_bytes if activation_bytes < FP32_BYTES else 0


def _sublayers(model: ModelConfig, share: Share) -> dict[str, SublayerMemory]:
    """Counts each kind of sublayer, which all chunks share."""
    found = {}
    for one in model.kinds:
        saved, whole = (_saved_bytes(model, one.letter, share, mode) for mode in (share.recompute, "none"))
        again = {"none": 0, "selective": max(0, whole - saved), "full": whole}[share.recompute]
        # The widest gradients that are alive together in its backward, and that of its residual stream.
        gradients = one.backward_bytes(model, share) + 2 * _residual_bytes(model, share)
        found[one.letter] = SublayerMemory(saved, again + gradients)
    return found


def _saved_bytes(model: ModelConfig, letter: str, share: Share, recompute: str) -> int:
    """Counts what autograd keeps of one sublayer under a setting of parallel.recompute."""
    if recompute == "full":
        return _residual_bytes(model, share)
    weights = rounded_bytes(share.activation_bytes, local_sizes(model, letter, share.tensor_ranks).matrix)
    own = mixer(letter).saved_bytes(model, share, inside=recompute == "none")
    return _norm_bytes(model, share) + weights + own


def _residual_bytes(model: ModelConfig, share: Share) -> int:
    """Counts the residual stream once."""
    tokens = share.tokens // (share.tensor_ranks if share.sequence_parallel else 1)
    return tokens * model.hidden_size * share.activation_bytes


def _norm_bytes(model: ModelConfig, share: Share) -> int:
    """Counts the input, which PyTorch's own norm keeps in fp32, its statistics, and the output for what follows."""
    residual = _residual_bytes(model, share)
    elements = residual // share.activation_bytes
    kept = residual if share.kernels.norm != "torch" else elements * FP32_BYTES
    if share.kernels.device == "cpu":
        kept *= 2  # and the input times its statistics
    return kept + elements // model.hidden_size * FP32_BYTES + residual


def _head_saved_bytes(model: ModelConfig, share: Share) -> int:
    a, vocabulary = share.activation_bytes, embedding_rows(model, share.tensor_ranks)
    # The log-probabilities in fp32, or of a fused loss the logits.
    logit_bytes = a if _loss_is_fused(share) else FP32_BYTES
    log_probabilities = logit_bytes * share.tokens * vocabulary
    labels = 8 * share.tokens
    return _norm_bytes(model, share) + log_probabilities + labels + rounded_bytes(a, vocabulary * model.hidden_size)


def _loss_gradient_bytes(model: ModelConfig, share: Share) -> int:
    """Counts the gradients of log-probabilities and logits; over several ranks the first is written in place.

    A fused loss has the logits' gradient alone.
    """
    a = share.activation_bytes
    widths = 2 * FP32_BYTES if share.tensor_ranks == 1 else 2 * a
    widths = a if _loss_is_fused(share) else widths
    return widths * share.tokens * embedding_rows(model, share.tensor_ranks)


def _loss_is_fused(share: Share) -> bool:
    return share.kernels.elementwise == "compiled" and share.tensor_ranks == 1
