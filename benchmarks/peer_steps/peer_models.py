"""Sambas of other origins for step.py, of the sizes of one of our configs. They need a CUDA device.

Each function gives a model in training mode on the device and the function from tokens, int64 [sequences, length + 1],
to their mean loss; Unavailable says what is missing.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sambalm.model.config import ModelConfig
from sambalm.model.hf.names import hf_config
from sambalm.model.ops.external import torch_flash_window
from sambalm.model.ops.reference.window_attention import rotary_tables

LossOf = Callable[[Tensor], Tensor]


class Unavailable(Exception):
    """A model that cannot run on this machine."""


def imported(module: str, package: str) -> Any:
    if not torch.cuda.is_available():
        raise Unavailable("it needs a CUDA device")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"it needs {package} ({error})") from None


def fla_samba(config: ModelConfig, *, recompute: bool) -> tuple[nn.Module, LossOf]:
    """flash-linear-attention's, in bf16."""
    # Without the first two its Mamba runs token by token in Python; without the third it does not construct.
    for package in ("mamba-ssm", "causal-conv1d", "flash-attn"):
        imported(package.replace("-", "_"), package)
    samba = imported("fla.models.samba", "flash-linear-attention")
    described = hf_config(config)
    if described.fla_obstacle:
        raise Unavailable(f"it cannot express this model: {described.fla_obstacle}")
    with torch.device("cuda"):
        model = samba.SambaForCausalLM(samba.SambaConfig.from_dict(described.to_dict()))
    model.to(torch.bfloat16).train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def loss_of(tokens: Tensor) -> Tensor:
        inputs = tokens[:, :-1].contiguous()
        return model(input_ids=inputs, labels=inputs).loss  # which shifts the labels itself

    return model, loss_of


def plain_samba(config: ModelConfig, *, recompute: bool) -> tuple[nn.Module, LossOf]:
    """PyTorch with mamba-ssm, fp32 weights under bf16 autocast."""
    imported("causal_conv1d", "causal-conv1d")
    mamba = imported("mamba_ssm", "mamba-ssm").Mamba
    with torch.device("cuda"):
        model = PlainSamba(config, mamba=mamba, recompute=recompute)

    def loss_of(tokens: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return model(tokens[:, :-1], tokens[:, 1:])

    return model, loss_of


@torch.compile
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


@torch.compile
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, length, heads, head dim], by the angles of [length, 1, head dim / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@torch.compile
def swiglu_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


@torch.compile
def mean_loss(hidden: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, embedding).flatten(0, 1).float(), labels.flatten())


class PlainAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.window, self.head_dim = config.window, config.head_dim
        self.sizes = [config.hidden_size, config.kv_size, config.kv_size]
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.qkv_proj(x).split(self.sizes, dim=-1))
        q, k, v = (t.transpose(1, 2) for t in (rotary(q, *tables), rotary(k, *tables), v))
        return self.o_proj(torch_flash_window(q, k, v, window=self.window).transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu_mlp(x, self.gate_up.weight, self.down.weight)


class PlainSublayer(nn.Module):
    """x + f(RMSNorm(x))."""

    def __init__(self, config: ModelConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.eps, self.weight, self.mixer = config.norm_eps, nn.Parameter(torch.ones(config.hidden_size)), mixer

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        normed = rms_norm(x, self.weight, self.eps)
        return x + (self.mixer(normed, tables) if isinstance(self.mixer, PlainAttention) else self.mixer(normed))


class PlainSamba(nn.Module):
    """Tokens and labels to their mean loss. `mamba` is the class mamba_ssm.Mamba."""

    def __init__(self, config: ModelConfig, *, mamba: type[nn.Module], recompute: bool) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        self.head = self.embedding.weight
        if not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False).weight
        states = {"d_state": config.d_state, "d_conv": config.d_conv, "expand": config.expand}
        mixers = {
            "M": lambda: mamba(config.hidden_size, dt_rank=config.dt_rank_size, **states),
            "*": lambda: PlainAttention(config),
            "-": lambda: PlainMLP(config),
        }
        self.layers = nn.ModuleList(PlainSublayer(config, mixers[letter]()) for letter in config.pattern)
        self.final_weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(1)
        tables = rotary_tables(positions, head_dim=self.config.head_dim, base=self.config.rope_base)
        x = self.embedding(tokens).to(torch.bfloat16)
        for layer in self.layers:
            x = checkpoint(layer, x, tables, use_reentrant=False) if self.recompute else layer(x, tables)
        return mean_loss(rms_norm(x, self.final_weight, self.config.norm_eps), self.head, labels)
