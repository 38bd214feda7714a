"""The Samba language model: a loop over its layer pattern, or over the part of it that a pipeline stage holds."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sambalm.model import initialization as init
from sambalm.model.config import ModelConfig
from sambalm.model.mixers.context import SequenceContext
from sambalm.model.norm import RMSNorm
from sambalm.model.ops.documents import Documents
from sambalm.model.ops.registry import TORCH_KERNELS, Kernels
from sambalm.model.registry import mixer, mixers_of
from sambalm.parallel.groups import ContextParallel, TensorParallel
from sambalm.parallel.layers.linear import linear
from sambalm.parallel.layers.recompute import recomputed
from sambalm.parallel.layers.tensor_parallel import VocabParallelEmbedding, cross_entropy
from sambalm.parallel.shard import equal_shard
from sambalm.parallel.sharding import sharded_parameter


class Sublayer(nn.Module):
    """f(RMSNorm(x)), with f by the sublayer's letter in the pattern; the sublayer after it adds that to x."""

    def __init__(self, letter: str, config: ModelConfig, *, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        self.norm = RMSNorm(config, tp=tp, kernels=kernels)
        self.writes, self.takes_stream = mixer(letter).writes, mixer(letter).takes_stream
        self.mixer = mixer(letter).layer(config, tp=tp, kernels=kernels)

    def forward(self, x: Tensor, branch: Tensor | None, context: SequenceContext) -> tuple[Tensor, Tensor, Any]:
        """The residual stream and what the sublayer before adds to it, to the stream, what this one adds and writes."""
        x, normed = self.norm(x, branch)
        given = (normed, context, x) if self.takes_stream else (normed, context)
        if self.writes is None:
            return x, self.mixer(*given), None
        return x, *self.mixer(*given)


class Head(nn.Module):
    """The vocabulary-parallel LM head. Tied, its weight is the embedding's."""

    def __init__(self, weight: nn.Parameter, *, rows: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.weight, self.rows = tp, weight, rows  # those of tokens: others are zeros (parallel/shard.py)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits of all rows that the rank holds, also of those that no token has."""
        return linear(x, self.weight, tp=self.tp)


class Samba(nn.Module):
    """Tokens to losses or logits, or one pipeline stage's part of that.

    All weights are zero until `parallel.sharding.initialize_parameters` draws them or a checkpoint fills them.

    Args:
        config: what the model is.
        layers: the sublayers to hold, a contiguous part of the pattern; all by default. The first of the pattern brings
            the embedding along, the last the final norm and the head.
        tp: this rank's place in the tensor-parallel group.
        cp: this rank's place in the context-parallel group.
        kernels: the implementations to run.
        dtype: of activations and matrix products. Weights, norms' statistics, scan states and losses are fp32.
        recompute_layers: whether the backward computes each sublayer again instead of keeping its activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: range | None = None,
        tp: TensorParallel = TensorParallel(),
        cp: ContextParallel = ContextParallel(),
        kernels: Kernels = TORCH_KERNELS,
        dtype: torch.dtype = torch.float32,
        recompute_layers: bool = False,
    ) -> None:
        super().__init__()
        layers = range(len(config.pattern)) if layers is None else layers
        self.config, self.tp, self.cp, self.dtype, self.recompute_layers = config, tp, cp, dtype, recompute_layers
        self.token_losses = kernels.elementwise.token_losses
        self.is_first, self.is_last = layers.start == 0, layers.stop == len(config.pattern)
        if self.is_first or (self.is_last and config.tie_embeddings):
            self.embedding = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                tp=tp,
                init=init.normal(config.embedding_std),
                owned=self.is_first,
            )
        # Keyed by their number in the whole model, which canonical names and initial weights depend on.
        self.kinds = mixers_of({config.pattern[i] for i in layers})
        self.reads = {one.reads for one in self.kinds if one.reads}
        self.layers = nn.ModuleDict(
            {str(i): Sublayer(config.pattern[i], config, tp=tp, kernels=kernels) for i in layers}
        )
        if self.is_last:
            self.final_norm = RMSNorm(config, tp=tp, kernels=kernels, scale=config.output_scale)
            self.head = Head(self._head_weight(), rows=equal_shard(config.vocab_size, tp).length, tp=tp)

    def _head_weight(self) -> nn.Parameter:
        if self.config.tie_embeddings:
            return self.embedding.weight
        width = self.config.hidden_size
        rows = equal_shard(self.config.vocab_size, self.tp)
        weights = init.linear(self.config.base_model.hidden_size)  # which `output_scale` makes up for
        return sharded_parameter((0, width), {"weight": rows}, init=weights, matmul_only=True)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        hidden: Tensor | None = None,
        document_starts: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            tokens: int64 [batch, this rank's part of the sequence].
            labels: like tokens; None for logits instead of losses.
            hidden: the stage before's output [sequence (/ tp under sequence parallelism), batch, width]; None on the
                first.
            document_starts: for each token the position in the whole sequence of its document's first token, int64
                [batch, this rank's part of the sequence] on the CPU: each document is then run as if it were alone.
                None: the sequence is one stream.

        Returns:
            On the last stage fp32 losses [batch, sequence] of the labels, or without labels this rank's logits [batch,
            sequence, vocabulary / tp]; on other stages the hidden states for the next.
        """
        x = self.embedding(tokens, self.dtype) if self.is_first else hidden
        assert x is not None, "stages after the first take the stage before's output"
        context = self._context(tokens, document_starts)
        branch = None
        layer: Any
        for layer in self.layers.values():
            if self.recompute_layers and self.training:  # which keeps a layer's inputs: one is better than two
                x, branch, memory = recomputed(layer, _added(x, branch), None, context)
            else:
                x, branch, memory = layer(x, branch, context)
            if layer.writes in self.reads:
                context = context.with_memory(layer.writes, memory)
        if not self.is_last:
            return _added(x, branch)
        logits = self.head(self.final_norm(x, branch)[1])
        if labels is None:
            return logits[..., : self.head.rows].transpose(0, 1)
        return cross_entropy(logits, labels.t(), self.tp, vocabulary=self.head.rows, token_losses=self.token_losses).t()

    def backward_order(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        """Modules in the order in which a backward goes through the whole model, each with the parameter whose gradient
        it finds once it has all others of the module. Left out is the embedding: its gradient comes last of all, also
        where the head shares it.
        """
        if not self.config.tie_embeddings:
            yield self.head, self.final_norm.weight
        layer: Any
        for layer in reversed(list(self.layers.values())):
            yield layer, layer.norm.weight  # whose norm is the first that its forward computes

    def _context(self, tokens: Tensor, document_starts: Tensor | None) -> SequenceContext:
        first = self.cp.rank * tokens.shape[1]
        documents = None if document_starts is None else Documents(document_starts, first, tokens.device)
        if documents:
            positions = documents.positions.t()
        else:
            positions = torch.arange(first, first + tokens.shape[1], device=tokens.device).unsqueeze(1)
        shared = {one.letter: one.shared_inputs(self.config, positions) for one in self.kinds}
        return SequenceContext(cp=self.cp, documents=documents, shared=shared)


def _added(x: Tensor, branch: Tensor | None) -> Tensor:
    return x if branch is None else x + branch
