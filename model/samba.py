"""The Samba language model: a loop over its layer pattern."""

import torch
from torch import Tensor, nn

from sambalm.model import initialization as init
from sambalm.model.config import ATTENTION, MAMBA, MLP, ModelConfig
from sambalm.model.layers import MambaMixer, RMSNorm, SequenceContext, SwiGLU, WindowAttention
from sambalm.model.ops.kernels import TORCH_KERNELS, Kernels
from sambalm.model.ops.window_attention import rotary_tables
from sambalm.parallel.sharding import sharded_parameter
from sambalm.parallel.state import TensorParallel
from sambalm.parallel.tensor_parallel import VocabParallelEmbedding, column_parallel_linear, cross_entropy

SUBLAYERS = {MAMBA: MambaMixer, ATTENTION: WindowAttention, MLP: SwiGLU}


class Sublayer(nn.Module):
    """x + f(RMSNorm(x)), with f by the sublayer's letter in the pattern."""

    def __init__(self, letter: str, config: ModelConfig, *, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        self.norm = RMSNorm(config, tp=tp, kernels=kernels)
        self.mixer = SUBLAYERS[letter](config, tp=tp, kernels=kernels)

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        return x + self.mixer(self.norm(x), context)


class Head(nn.Module):
    """The vocabulary-parallel LM head. Tied, its weight is the embedding's."""

    def __init__(self, weight: nn.Parameter, *, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.weight = tp, weight

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel_linear(x, self.weight, self.tp)


class Samba(nn.Module):
    """Tokens to losses or logits.

    Args:
        config: what the model is.
        tp: this rank's place in the tensor-parallel group.
        kernels: the implementations to run.
        dtype: of activations and matrix products. Weights, norms' statistics, scan states and losses are fp32.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        tp: TensorParallel = TensorParallel(),
        kernels: Kernels = TORCH_KERNELS,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config, self.tp, self.dtype = config, tp, dtype
        self.embedding = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, tp=tp, init=init.normal(config.embedding_std)
        )
        # Keyed by their number in the whole model, which canonical names and initial weights depend on.
        self.layers = nn.ModuleDict(
            {str(i): Sublayer(letter, config, tp=tp, kernels=kernels) for i, letter in enumerate(config.pattern)}
        )
        self.final_norm = RMSNorm(config, tp=tp, kernels=kernels)
        head_weight = (
            self.embedding.weight
            if config.tie_embeddings
            else sharded_parameter(
                (config.vocab_size, config.hidden_size), init=init.linear(config.hidden_size), tp=tp, dim=0
            )
        )
        self.head = Head(head_weight, tp=tp)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Args:
            tokens, labels: int64 [batch, sequence].

        Returns:
            fp32 losses [batch, sequence] of the labels, or without labels this rank's logits
            [batch, sequence, vocabulary / tp].
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        context = SequenceContext(
            rotary=rotary_tables(positions, head_dim=self.config.head_dim, base=self.config.rope_base)
        )
        x = self.embedding(tokens, self.dtype)
        for layer in self.layers.values():
            x = layer(x, context)
        logits = self.head(self.final_norm(x))
        if labels is None:
            return logits.transpose(0, 1)
        return cross_entropy(logits, labels.t(), self.tp).t()
