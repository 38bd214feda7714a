"""Samba for transformers, in PyTorch alone: [Mamba, MLP, sliding-window attention, MLP] repeated, or any other pattern.

The layers run the operations that training runs, on a GPU by its kernels, and stand in files of their own. Between
calls the cache holds what each layer needs of the tokens before, so a sequence may be read in pieces of any length with
the same result. Padding may be on either side of a row; only between its tokens does it take up places of the
attention window, which a warning tells.

B: batch, S: sequence, H: heads, d: head dim.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from sambalm.model.ops.reference.window_attention import rotary_tables

from .configuration_samba import FULL_ATTENTION, SLIDING_ATTENTION, Block, SambaConfig
from .kernels import operations_for
from .layers import (
    DENSE_ATTENTION,
    AttentionMasks,
    AttentionWeightsLayer,
    PackedDocuments,
    Padding,
    SambaLayer,
    SambaResidualLinear,
    SambaRMSNorm,
    SequenceContext,
)
from .mixers import fp32_tensors, layer_class

logger = logging.get_logger(__name__)

# What transformers calls the cache, as an argument and in outputs: until 5.23 past_key_values, then cache.
_CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class AttentionFreeCache(DynamicCache):
    """The cache of a model without attention, whose layers do not know how many tokens they have seen."""

    def __init__(self, *, config: SambaConfig) -> None:
        super().__init__(config=config)
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    @property
    def is_linear(self) -> list[bool]:
        """That no layer is: of a cache of such layers alone, generate from 5.24 on takes it that it counts nothing."""
        return [False] * len(self.layers)

    def reset(self) -> None:
        super().reset()
        self.seen_tokens = 0


class SambaBlock(GradientCheckpointingLayer):
    """A mixer and the MLP behind it, each x + f(RMSNorm(x)); either may be missing."""

    def __init__(self, config: SambaConfig, block: Block, layer_idx: int) -> None:
        super().__init__()
        self.mixer = self.mlp = None
        if block.mixer is not None:
            self.mixer_norm = SambaRMSNorm(config)
            self.mixer = layer_class(block.mixer)(config, layer_idx)
        if block.mlp is not None:
            self.mlp_norm = SambaRMSNorm(config)
            self.mlp = layer_class(block.mlp)(config, layer_idx)

    def forward(self, hidden_states: Tensor, context: SequenceContext) -> Tensor:
        if self.mixer is not None:
            normed = self.mixer_norm(hidden_states, context.operations)
            given = (normed, context, hidden_states) if self.mixer.takes_stream else (normed, context)
            mixed = self.mixer(*given)
            hidden_states = hidden_states + (mixed[0] if isinstance(mixed, tuple) else mixed)
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states, context.operations), context)
        return hidden_states


class SambaPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial weights."""

    config_class = SambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SambaBlock"]  # noqa: RUF012 - transformers and its tests know lists
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    _is_stateful = True
    _can_record_outputs = {"hidden_states": SambaBlock, "attentions": AttentionWeightsLayer}  # noqa: RUF012

    def __init__(self, config: SambaConfig) -> None:
        super().__init__(config)
        self._keep_in_fp32_modules_strict = _fp32_patterns(config)

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As its parent's, which takes a module without parameters of its own for one that was loaded."""
        if isinstance(module, SambaLayer) and not all(is_loaded(p) for p in module.parameters()):
            super()._initialize_weights(module)
        else:
            super()._initialize_weights(module, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The paper's initialisation; see sambalm.model.initialization."""
        if isinstance(module, nn.Linear):
            writes = len(self.config.pattern) if isinstance(module, SambaResidualLinear) else 1
            bound = 1 / math.sqrt(module.in_features * writes)
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, SambaLayer):
            module.init_weights()
        elif isinstance(module, SambaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)


def is_loaded(parameter: Tensor) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


def _fp32_patterns(config: SambaConfig) -> set[str]:
    """Returns regular expressions of the parameters that stay fp32 in a model of any dtype."""
    layers = {("mixer", block.mixer) for block in config.blocks} | {("mlp", block.mlp) for block in config.blocks}
    return {
        rf"{slot}\.{re.escape(name)}$" for slot, letter in layers if letter is not None for name in fp32_tensors(letter)
    }


class SambaModel(SambaPreTrainedModel):
    """Tokens to the last hidden states."""

    def __init__(self, config: SambaConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SambaBlock(config, block, i) for i, block in enumerate(config.blocks)])
        self._tell_sources()
        self.norm_f = SambaRMSNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _tell_sources(self) -> None:
        """Tells each layer that reads a memory which block writes it."""
        writers: dict[str, int] = {}
        for number, block in enumerate(self.layers):
            if isinstance(block.mixer, SambaLayer):
                block.mixer.source_idx = writers.get(block.mixer.reads)
                if block.mixer.writes is not None:
                    writers[block.mixer.writes] = number

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Args:
            input_ids: int64 [B, S]; or inputs_embeds [B, S, width].
            attention_mask: [B, past + S], 0 for padding; or a mask [B, H or 1, S, keys] for the attention alone, whose
                layers then all have one window, or none.
            position_ids: int64 [B or 1, S]; without them they are counted from each row's first real token. A token
                whose position does not follow the one before begins a document, which sees nothing of those before it:
                so rows are packed. The first token of a call goes on from the cache in any case.
            past_key_values: the cache to continue from and to update, DynamicCache(config=...) or StaticCache;
                transformers from 5.24 on calls it `cache`. Both names are taken by every version.

        Returns:
            last_hidden_state [B, S, width], and the cache if one was given or use_cache is true. Packed rows have none,
            nor has training with gradient checkpointing.

        Raises:
            ValueError: not exactly one input was given, or packed rows with a cache, or to a mixer that cannot tell
                documents apart, or one mask of keys to layers that see different keys.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        cache = _one_cache(cache, past_key_values, others=kwargs)
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.gradient_checkpointing and self.training and (use_cache or cache is not None):
            logger.warning_once("The cache is set aside: gradient checkpointing would run layers on it a second time.")
            use_cache, cache = False, None
        padding = self._padding(attention_mask, length=x.shape[1])
        documents = self._documents(position_ids, padding)
        are_packed = documents is not None and not torch.compiler.is_compiling()
        if cache is not None and are_packed:
            raise ValueError("position_ids start again within a row: packed documents are read without a cache")
        if use_cache and cache is None and not are_packed:
            cache = new_cache(self.config)
        operations = operations_for(x, self.config)
        context = self.sequence_context(
            SequenceContext(cache, padding, None, None, documents, operations=operations, memories={}),
            x,
            mask=attention_mask,
            positions=position_ids,
            output_attentions=kwargs.get("output_attentions"),
        )
        for layer in self.layers:
            x = layer(x, context)
        if isinstance(cache, AttentionFreeCache):
            cache.seen_tokens += x.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=self.norm_f(x, operations), **{_CACHE: cache})

    @staticmethod
    def _padding(mask: Tensor | None, *, length: int) -> Padding | None:
        real = mask[:, -length:].bool() if mask is not None and mask.ndim == 2 else None
        return None if real is None or _is_known(real.all()) else Padding.of(real)

    def _documents(self, positions: Tensor | None, padding: Padding | None) -> PackedDocuments | None:
        """Returns the documents of packed rows; for a compiler, which sees no positions, rows always are such."""
        if positions is None or positions.shape[1] == 1:
            return None
        if padding:
            positions = positions.expand(len(padding.order), -1)
        documents = PackedDocuments.of(positions, padding)
        if _is_known(~documents.resets.any()):
            return None
        unable = [type(m).__name__ for m in self.modules() if isinstance(m, SambaLayer) and not m.isolates_documents]
        if unable:
            raise ValueError(
                f"position_ids start again within a row, but {unable[0]} cannot keep packed documents apart: give each "
                "document a row of its own"
            )
        return documents

    def sequence_context(
        self,
        context: SequenceContext,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> SequenceContext:
        """Returns the context with positions and what the attention needs; the other arguments are as forward's."""
        config, cache = self.config, context.cache
        if positions is None:
            positions = _positions(mask, past=cache.get_seq_length() if cache is not None else 0, like=x)
        context = context._replace(positions=positions)
        if not has_attention(config):
            return context
        if mask is not None and mask.ndim == 4 and {SLIDING_ATTENTION, FULL_ATTENTION} <= set(config.layer_types):
            raise ValueError(
                "attention_mask has 4 dimensions, but the model's layers see different keys: give one of shape "
                "[rows, tokens] that marks the padding"
            )
        if config.rotary_base is not None:
            cos, sin = rotary_tables(positions, head_dim=config.head_dim, base=config.rotary_base)
            context = context._replace(rotary=(cos.unsqueeze(2), sin.unsqueeze(2)))
        are_all_real = mask is None
        if mask is not None and mask.ndim == 2:
            reach = x.shape[1] + config.sliding_window - 1 if SLIDING_ATTENTION in config.layer_types else 0
            are_all_real = _is_known(mask[:, 0 if FULL_ATTENTION in config.layer_types else -reach :].all())
            if (
                reach
                and not are_all_real
                and _is_known(_displaces_tokens(mask.bool(), reach=reach, window=config.sliding_window))
            ):
                logger.warning_once(_DISPLACED.format(window=config.sliding_window))
        is_dense = config._attn_implementation in DENSE_ATTENTION and (mask is None or mask.ndim == 2)
        if is_dense and not (output_attentions or config.output_attentions):
            return context if are_all_real or mask is None else context._replace(real_keys=mask.bool())
        given = {"config": config, "inputs_embeds": x, "attention_mask": mask, _CACHE: cache}
        given["and_mask_function"] = _within_documents(context.documents) if context.documents else None
        masks = AttentionMasks(
            window=create_sliding_window_causal_mask(**given) if SLIDING_ATTENTION in config.layer_types else None,
            full=create_causal_mask(**given) if FULL_ATTENTION in config.layer_types else None,
        )
        return context._replace(attention_masks=masks)


_DISPLACED = (
    "attention_mask has padding between the tokens of a row, where it takes up places of the attention's window of "
    "{window}: the row's result is not that of its tokens alone. Pad on the left, before the first token."
)


def _displaces_tokens(real: Tensor, *, reach: int, window: int) -> Tensor:
    """Whether padding in the last `reach` places lies between real tokens [B, past + S] and takes a window from one."""
    padding = ~real[:, -reach:]
    before, after = real.cumsum(dim=1)[:, -reach:] > 0, real[:, -reach:].flip(1).cumsum(dim=1).flip(1) > 0
    return ((padding & before & after).any(dim=1) & real[:, :-window].any(dim=1)).any()


def _is_known(truth: Tensor) -> bool:
    """Whether it is true. A compiler cannot tell, and gets the operations that are right either way."""
    return not torch.compiler.is_compiling() and bool(truth)


def _within_documents(documents: PackedDocuments) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Returns the function of (row, head, query, key) by which transformers masks other documents."""
    numbers = documents.numbers

    def is_of_one_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = row if len(numbers) > 1 else torch.zeros_like(row)
        return numbers[row, query] == numbers[row, key]

    return is_of_one_document


def _positions(mask: Tensor | None, *, past: int | Tensor, like: Tensor) -> Tensor:
    """The positions [B or 1, S] of the tokens of `like` [B, S, width] after `past` others, a number or int64 [1]."""
    length = like.shape[1]
    if mask is not None and mask.ndim == 2:
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
    return (past + torch.arange(length, device=like.device)).unsqueeze(0)


def has_attention(config: SambaConfig) -> bool:
    """Whether a layer attends to tokens, for which the cache keeps keys and values and counts tokens."""
    return SLIDING_ATTENTION in config.layer_types or FULL_ATTENTION in config.layer_types


def _one_cache(cache: Cache | None, former: Cache | None, *, others: dict[str, Any]) -> Cache | None:
    """The cache that was given, by either of its names. A third one, of a later transformers, would go unseen."""
    if cache is not None and former is not None:
        raise ValueError("give one of cache and past_key_values: they are the same argument")
    for name, value in others.items():
        if isinstance(value, Cache):
            raise ValueError(
                f"{name} is a cache, which this model knows as `cache` or `past_key_values`: give it as such"
            )
    return former if cache is None else cache


def new_cache(config: SambaConfig) -> DynamicCache:
    """An empty cache for a model of this configuration."""
    return DynamicCache(config=config) if has_attention(config) else AttentionFreeCache(config=config)


class SambaForCausalLM(SambaPreTrainedModel, GenerationMixin):
    """Tokens to logits."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: SambaConfig) -> None:
        super().__init__(config)
        self.backbone = SambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Arguments as SambaModel's, and:

            labels: int64 [B, S]; a token's label is the token itself (the shift is made here), -100 leaves it out.
            logits_to_keep: compute the logits of the last so many positions, 0 for all, or of the positions given.

        Returns:
            logits [B, S or logits_to_keep, vocabulary] in the weights' dtype, the mean loss if there are labels, and
            the cache.
        """
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=_one_cache(cache, past_key_values, others=kwargs),
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{_CACHE: outputs.get(_CACHE)},
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """Leaves the mask as it is: the model makes what it needs, and without padding that is nothing."""
        return attention_mask

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        if has_attention(self.config) or model_kwargs.get(_CACHE) is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        elif generation_config.use_cache is not False:
            model_kwargs[_CACHE] = AttentionFreeCache(config=self.config)


__all__ = ["SambaForCausalLM", "SambaModel", "SambaPreTrainedModel"]
