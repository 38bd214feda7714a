"""Samba of vLLM's own layers: its paged windows, its convolution and scan with their states, its parallel products.

T: tokens of all requests of a step.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFunc,
    MambaStateCopyFuncCalculator,
    MambaStateShapeCalculator,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from sambalm.model.hf.configuration_samba import ATTENTION, MAMBA, Block, SambaConfig
from sambalm.model.ops.reference.window_attention import apply_rotary, rotary_tables
from sambalm.model.vllm.cpu_mamba import mix_on_cpu


def _state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
    """Returns the dtypes of the convolution's state and of the scan's, which is fp32: it would drift in bf16."""
    return vllm_config.model_config.dtype, torch.float32


class SambaMamba(MambaMixer):
    """Mamba-1, whose rates and state are fp32 in a model of any dtype."""

    def __init__(self, config: SambaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(
            hidden_size=config.hidden_size,
            ssm_state_size=config.state_size,
            conv_kernel_size=config.conv_kernel,
            intermediate_size=config.intermediate_size,
            time_step_rank=config.time_step_rank,
            use_conv_bias=True,
            use_bias=False,
            use_rms_norm=False,
            model_config=vllm_config.model_config,
            cache_config=vllm_config.cache_config,
            prefix=prefix,
        )
        self._state_dtypes = _state_dtypes(vllm_config)
        # On a CPU it would pack the bf16 weight for another convolution than the one of this layer.
        self.conv1d.quant_method = None
        for module, name in ((self, "D"), (self.dt_proj, "bias")):
            parameter = getattr(module, name)
            parameter.data = parameter.data.float()

    def forward_impl(self, hidden_states: Tensor, output: Tensor) -> None:
        """Fills output [T, width] for hidden_states [T, width] of all requests of a step."""
        metadata = get_forward_context().attn_metadata
        if not current_platform.is_cpu():
            super().forward_impl(hidden_states, output)
        elif metadata is None:  # a trial run before there is a cache
            output.zero_()
        else:
            x, z = self.in_proj(hidden_states)[0].chunk(2, dim=-1)
            mixed, _ = self.out_proj(mix_on_cpu(self, x, z, metadata[self.prefix]))
            output[: len(mixed)] = mixed

    def get_state_dtype(self) -> tuple[torch.dtype, torch.dtype]:
        """Returns the dtypes of the states in the cache."""
        return self._state_dtypes


class SambaAttention(nn.Module):
    """Sliding-window attention with rotary positions and grouped queries."""

    def __init__(self, config: SambaConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        self.head_dim, self.rotary_base = config.head_dim, config.rotary_base
        self.heads, self.kv_heads = config.num_attention_heads // ranks, max(1, config.num_key_value_heads // ranks)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.attn = Attention(
            self.heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            per_layer_sliding_window=config.sliding_window,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Maps x [T, width] to the same; `rotary` has cosines and sines of the positions, [T, 1, head dim / 2]."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        qkv, _ = self.qkv_proj(x)
        q, k, v = qkv.split([number * self.head_dim for number in heads], dim=-1)
        q, k = (apply_rotary(t.unflatten(-1, (-1, self.head_dim)), *rotary).flatten(-2) for t in (q, k))
        return self.o_proj(self.attn(q, k, v))[0]


class SambaBlock(nn.Module):
    """A mixer and the MLP behind it, each added to the residual stream; either may be missing."""

    def __init__(self, config: SambaConfig, block: Block, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.mixer = self.mlp = None
        if block.mixer is not None:
            self.mixer_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
            layer: Any = {MAMBA: SambaMamba, ATTENTION: SambaAttention}[block.mixer]
            self.mixer = layer(config, vllm_config, f"{prefix}.mixer")
        if block.mlp is not None:
            self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
            self.mlp = LlamaMLP(
                config.hidden_size,
                config.mlp_size,
                "silu",
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.mlp",
            )

    def forward(
        self, x: Tensor, residual: Tensor | None, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Maps what is still to be added to the residual stream, and the stream, to the same after the block."""
        if self.mixer is not None:
            x, residual = _add_and_norm(self.mixer_norm, x, residual)
            if isinstance(self.mixer, SambaMamba):
                mixed = torch.empty_like(x)
                self.mixer(x, mixed)
                x = mixed
            else:
                x = self.mixer(x, rotary)
        if self.mlp is not None:
            x, residual = _add_and_norm(self.mlp_norm, x, residual)
            x = self.mlp(x)
        return x, residual


def _add_and_norm(norm: RMSNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return (norm(x), x) if residual is None else norm(x, residual)


@support_torch_compile
class SambaModel(nn.Module):
    """Tokens to the last hidden states."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.head_dim, self.rotary_base = config.head_dim, config.rotary_base
        self.embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            SambaBlock(config, block, vllm_config, f"{prefix}.layers.{number}")
            for number, block in enumerate(config.blocks)
        )
        self.norm_f = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Maps ids or embeddings of the tokens [T] and their positions to [T, width]."""
        x, residual = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds, None
        cos, sin = rotary_tables(positions, head_dim=self.head_dim, base=self.rotary_base)
        for layer in self.layers:
            x, residual = layer(x, residual, (cos.unsqueeze(1), sin.unsqueeze(1)))
        return _add_and_norm(self.norm_f, x, residual)[0]


class SambaForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """Tokens to logits, with the weights of a Hugging Face folder."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={".A_log": ".A"},
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        },
    )
    packed_modules_mapping = {  # noqa: RUF012  (vLLM knows dicts)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
        "in_proj": ["in_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        if config.extensions:
            raise ValueError(f"the plug-in has the layers M, * and -, but the pattern is {config.pattern}")
        if config.rotary_base is None:
            raise ValueError("the plug-in has no attention without positions, but attn has rope_theta null")
        if current_platform.is_cpu() and vllm_config.model_config.dtype != torch.float32:
            # Its runner leaves in the windows' blocks what they held before, for instance fp32 states.
            raise ValueError("vLLM on a CPU computes NaN of this model in other dtypes than fp32: add --dtype float32")
        self.config = config
        self.backbone = SambaModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "backbone"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.backbone.embeddings)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Returns the embeddings of ids [T], [T, width]."""
        return self.backbone.embeddings(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """Does what SambaModel does."""
        return self.backbone(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Maps hidden states [tokens, width] to logits [tokens, vocabulary]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Takes the weights of a Hugging Face folder; returns the names of the parameters that they fill."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
        """Returns the dtypes of the convolution's state and of the scan's."""
        return _state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns the shapes of the two states on a tensor-parallel rank."""
        config = vllm_config.model_config.hf_config
        return MambaStateShapeCalculator.mamba1_state_shape(
            tp_world_size=vllm_config.parallel_config.tensor_parallel_size,
            intermediate_size=config.intermediate_size,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
        )

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, MambaStateCopyFunc]:
        """Returns what copies the two states."""
        return MambaStateCopyFuncCalculator.mamba1_state_copy_func()
