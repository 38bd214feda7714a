"""Samba for transformers, in PyTorch alone: [Mamba, MLP, sliding-window attention, MLP] repeated, or any other pattern.

The mixers run the operations that training runs. Between calls the cache holds the last inputs of each Mamba's
convolution, its state, and the keys and values of the last window - 1 positions, so a sequence may be read in pieces of
any length with the same result. Padding may be on either side of a row; only between its tokens would it take up places
of the attention window.

B: batch, S: sequence, D: Mamba's channels, H: heads, d: head dim.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from sambalm.model.ops.reference.causal_conv import causal_conv_silu
from sambalm.model.ops.reference.rms_norm import rms_norm
from sambalm.model.ops.reference.selective_scan import gated_selective_scan
from sambalm.model.ops.reference.window_attention import apply_rotary, rotary_tables, window_attention

from .configuration_samba import ATTENTION, MAMBA, Block, SambaConfig

# Before the softplus, a step this negative is exactly 0 whatever its bias: the state stays as it is.
NO_STEP = -1e4

# The attention implementations in whose place window_attention runs when no mask is needed.
DENSE_ATTENTION = (None, "eager", "sdpa")


class Padding(NamedTuple):
    """How to bring each row's real tokens to its front, where convolution and scan meet nothing else before them."""

    order: Tensor  # int64 [B, S]: the token that comes to each place
    inverse: Tensor  # int64 [B, S]: the place of each token
    counts: Tensor  # int64 [B]: real tokens of each row

    @classmethod
    def of(cls, real: Tensor) -> "Padding":
        """From a mask of the real tokens, bool [B, S]."""
        order = real.int().argsort(dim=1, descending=True, stable=True)
        return cls(order, order.argsort(dim=1), real.sum(dim=1))

    def front(self, x: Tensor) -> Tensor:
        """x [B, S, width] with real tokens first; what was padding becomes zero."""
        return x.take_along_dim(self.order[..., None], dim=1).masked_fill(~self.real[..., None], 0)

    def back(self, x: Tensor) -> Tensor:
        return x.take_along_dim(self.inverse[..., None], dim=1)

    @property
    def real(self) -> Tensor:
        """bool [B, S], in the order of `front`."""
        return torch.arange(self.order.shape[1], device=self.order.device) < self.counts[:, None]


class SequenceContext(NamedTuple):
    """What the blocks need to know of a batch besides its activations."""

    cache: Cache | None
    padding: Padding | None  # None when there is no padding
    attention_mask: Tensor | None  # as the attention implementation wants it; None when every key in the window counts
    rotary: tuple[Tensor, Tensor] | None  # cosines and sines, fp32 [B or 1, 1, S, d / 2]


class AttentionFreeCache(DynamicCache):
    """The cache of a model without attention, whose layers do not know how many tokens they have seen."""

    def __init__(self, *, config: SambaConfig) -> None:
        super().__init__(config=config)
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def reset(self) -> None:
        super().reset()
        self.seen_tokens = 0


class SambaRMSNorm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, config: SambaConfig) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.hidden_size)), config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class SambaResidualLinear(nn.Linear):
    """A projection that writes the residual stream, which has smaller initial weights."""


class SambaMamba(nn.Module):
    """Mamba-1 (arXiv 2312.00752, section 3.4)."""

    def __init__(self, config: SambaConfig, layer_idx: int) -> None:
        super().__init__()
        width, inner, states = config.hidden_size, config.intermediate_size, config.state_size
        self.layer_idx = layer_idx
        rank = int(config.time_step_rank)
        self.split_sizes = [rank, states, states]
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.conv_kernel, groups=inner, padding=config.conv_kernel - 1)
        self.x_proj = nn.Linear(inner, sum(self.split_sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = SambaResidualLinear(inner, width, bias=False)

    def forward(self, hidden_states: Tensor, context: SequenceContext) -> Tensor:
        """hidden_states [B, S, width] to the same; continues from and updates the context's cache."""
        cache, padding = context.cache, context.padding
        conv_state, scan_state = _carried_states(cache, self.layer_idx)
        if padding:
            hidden_states = padding.front(hidden_states)
        x_BSD, z_BSD = self.in_proj(hidden_states).chunk(2, dim=-1)
        u_BSD, conv_state = self._convolve(x_BSD, conv_state, padding)
        dt, B, C = self.x_proj(u_BSD).split(self.split_sizes, dim=-1)
        dt_BSD = F.linear(dt, self.dt_proj.weight)
        if padding:
            dt_BSD = dt_BSD.masked_fill(~padding.real[..., None], NO_STEP)
        work = torch.promote_types(x_BSD.dtype, torch.float32)
        y_BSD, scan_state = gated_selective_scan(
            u_BSD,
            dt_BSD,
            -torch.exp(self.A_log.to(work)),
            B,
            C,
            D=self.D.to(work),
            z=z_BSD,
            dt_bias=self.dt_proj.bias.to(work),
            initial_state=scan_state,
        )
        if cache is not None:
            cache.update_conv_state(conv_state.transpose(1, 2), self.layer_idx)
            cache.update_recurrent_state(scan_state, self.layer_idx)
        output = self.out_proj(y_BSD)
        return padding.back(output) if padding else output

    def _convolve(self, x_BSD: Tensor, state_BDT: Tensor | None, padding: Padding | None) -> tuple[Tensor, Tensor]:
        """The convolution's output [B, S, D] and its last conv_kernel - 1 real inputs [B, conv_kernel - 1, D]."""
        taps_before = self.conv1d.kernel_size[0] - 1
        state = None if state_BDT is None else state_BDT.transpose(1, 2)
        u_BSD = causal_conv_silu(x_BSD, self.conv1d.weight.squeeze(1), self.conv1d.bias, state)
        if state is None:
            state = x_BSD.new_zeros(x_BSD.shape[0], taps_before, x_BSD.shape[2])
        if padding:
            places = padding.counts[:, None] + torch.arange(taps_before, device=x_BSD.device)
            return u_BSD, torch.cat((state, x_BSD), dim=1).take_along_dim(places[..., None], dim=1)
        return u_BSD, torch.cat((state, x_BSD[:, -taps_before:]), dim=1)[:, -taps_before:]


def _carried_states(cache: Cache | None, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
    """The last inputs of a layer's convolution [B, D, taps - 1] and its scan's state; None before its first token.

    Versions of transformers differ in whether a layer has one state or several, of which this model uses the first.
    """
    if cache is None or not cache.has_previous_state(layer_idx):
        return None, None
    layer = cache.layers[layer_idx]
    conv, scan = (s if isinstance(s, Tensor) else s[0] for s in (layer.conv_states, layer.recurrent_states))
    return conv, scan


class SambaAttention(nn.Module):
    """Causal sliding-window attention with rotary positions and grouped queries."""

    def __init__(self, config: SambaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.window = config.head_dim, config.sliding_window
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = SambaResidualLinear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, S, width] to the same, and the attention weights where the implementation gives them."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        q, k = (apply_rotary(t, *context.rotary) for t in (q, k))
        if context.cache is not None:
            k, v = context.cache.update(k, v, self.layer_idx)
        weights = None
        if context.attention_mask is None and self.config._attn_implementation in DENSE_ATTENTION:
            y_BSHd = self._attend_window(q, k, v, context.cache).transpose(1, 2)
        else:
            y_BSHd, weights = self._attend_masked(q, k, v, context.attention_mask)
        return self.o_proj(y_BSHd.flatten(2)), weights

    def _attend_window(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache | None) -> Tensor:
        # A static cache that is not yet full hands out its whole buffer.
        seen = k.shape[2] if cache is None else cache.get_seq_length(self.layer_idx)
        return window_attention(q, k[:, :, :seen], v[:, :, :seen], window=self.window)

    def _attend_masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor | None]:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if isinstance(mask, Tensor):
            # With a window of one position transformers' cache keeps every key, though its mask counts on none.
            k, v = k[:, :, -mask.shape[-1] :], v[:, :, -mask.shape[-1] :]
        scaling = 1 / math.sqrt(self.head_dim)
        return attend(self, q, k, v, mask, dropout=0.0, scaling=scaling, sliding_window=self.window)


def eager_attention_forward(
    module: "SambaAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with its weights written out; signature and shapes as ALL_ATTENTION_FUNCTIONS has them."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    work = torch.promote_types(query.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=work).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class SambaMLP(nn.Module):
    """SwiGLU: down(SiLU(gate(x)) * up(x))."""

    def __init__(self, config: SambaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = SambaResidualLinear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SambaBlock(GradientCheckpointingLayer):
    """A mixer and the MLP behind it, each x + f(RMSNorm(x)); either may be missing."""

    def __init__(self, config: SambaConfig, block: Block, layer_idx: int) -> None:
        super().__init__()
        self.mixer = self.mlp = None
        if block.mixer is not None:
            self.mixer_norm = SambaRMSNorm(config)
            self.mixer = {MAMBA: SambaMamba, ATTENTION: SambaAttention}[block.mixer](config, layer_idx)
        if block.mlp_sublayer is not None:
            self.mlp_norm, self.mlp = SambaRMSNorm(config), SambaMLP(config)

    def forward(self, hidden_states: Tensor, context: SequenceContext) -> Tensor:
        if self.mixer is not None:
            mixed = self.mixer(self.mixer_norm(hidden_states), context)
            hidden_states = hidden_states + (mixed[0] if isinstance(mixed, tuple) else mixed)
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return hidden_states


class SambaPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial weights."""

    config_class = SambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ("SambaBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    # An error in the decay rates or step sizes grows over the tokens that a state lives.
    _keep_in_fp32_modules_strict = (r"mixer\.A_log$", r"mixer\.D$", r"mixer\.dt_proj\.bias$")
    _supports_sdpa = True
    _supports_flex_attn = True
    _is_stateful = True
    _can_record_outputs = {"hidden_states": SambaBlock, "attentions": SambaAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The paper's initialisation; see sambalm.model.initialization."""
        if isinstance(module, nn.Linear):
            writes = len(self.config.pattern) if isinstance(module, SambaResidualLinear) else 1
            bound = 1 / math.sqrt(module.in_features * writes)
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, SambaMamba):
            self._init_mamba(module)
        elif isinstance(module, SambaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)

    def _init_mamba(self, module: SambaMamba) -> None:
        config = self.config
        states = torch.arange(1, config.state_size + 1, dtype=torch.float32)
        init.copy_(module.A_log, states.log().expand_as(module.A_log))
        init.ones_(module.D)
        bound = 1 / math.sqrt(config.conv_kernel)
        init.uniform_(module.conv1d.weight, -bound, bound)
        init.uniform_(module.conv1d.bias, -bound, bound)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.empty(config.intermediate_size).uniform_(low, high).exp().clamp(min=config.time_step_floor)
        init.copy_(module.dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))


class SambaModel(SambaPreTrainedModel):
    """Tokens to the last hidden states."""

    def __init__(self, config: SambaConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SambaBlock(config, block, i) for i, block in enumerate(config.blocks)])
        self.norm_f = SambaRMSNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Args:
            input_ids: int64 [B, S]; or inputs_embeds [B, S, width].
            attention_mask: [B, past + S], 0 for padding; or a mask [B, H or 1, S, keys] for the attention alone.
            position_ids: int64 [B or 1, S]; without them they are counted from each row's first real token.
            past_key_values: the cache to continue from and to update, DynamicCache(config=...) or StaticCache.

        Returns:
            last_hidden_state [B, S, width], and the cache if one was given or use_cache is true.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        context = self._context(
            x, attention_mask, position_ids, past_key_values, output_attentions=kwargs.get("output_attentions")
        )
        for layer in self.layers:
            x = layer(x, context)
        if isinstance(past_key_values, AttentionFreeCache):
            past_key_values.seen_tokens += x.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=self.norm_f(x), past_key_values=past_key_values)

    def _context(
        self,
        x: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Cache | None,
        *,
        output_attentions: bool | None,
    ) -> SequenceContext:
        config, length = self.config, x.shape[1]
        real = mask[:, -length:].bool() if mask is not None and mask.ndim == 2 else None
        padding = None if real is None or real.all() else Padding.of(real)
        if ATTENTION not in config.pattern:
            return SequenceContext(cache, padding, None, None)
        if positions is None:
            positions = _positions(mask, past=cache.get_seq_length() if cache is not None else 0, like=x)
        cos, sin = rotary_tables(positions, head_dim=config.head_dim, base=config.rotary_base)
        if self._needs_mask(mask, length) or output_attentions or config.output_attentions:
            mask = create_sliding_window_causal_mask(
                config=config,
                inputs_embeds=x,
                attention_mask=mask,
                past_key_values=cache,
            )
        else:
            mask = None
        return SequenceContext(cache, padding, mask, (cos.unsqueeze(1), sin.unsqueeze(1)))

    def _needs_mask(self, mask: Tensor | None, length: int) -> bool:
        if self.config._attn_implementation not in DENSE_ATTENTION:
            return True
        if mask is None or mask.ndim != 2:
            return mask is not None
        in_reach = mask[:, -(length + self.config.sliding_window - 1) :]
        return not in_reach.all()


def _positions(mask: Tensor | None, *, past: int, like: Tensor) -> Tensor:
    """The positions [B or 1, S] of the tokens of `like` [B, S, width] after `past` others."""
    length = like.shape[1]
    if mask is not None and mask.ndim == 2:
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
    return torch.arange(past, past + length, device=like.device).unsqueeze(0)


def new_cache(config: SambaConfig) -> DynamicCache:
    """An empty cache for a model of this configuration."""
    return DynamicCache(config=config) if ATTENTION in config.pattern else AttentionFreeCache(config=config)


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
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
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
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """Leaves the mask as it is: the model makes what it needs, and without padding that is nothing."""
        return attention_mask

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        if ATTENTION in self.config.pattern or model_kwargs.get("past_key_values") is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = AttentionFreeCache(config=self.config)


__all__ = ["SambaForCausalLM", "SambaModel", "SambaPreTrainedModel"]
