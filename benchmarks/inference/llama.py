"""A Llama of a Samba configuration's sizes for inference, with the kernels that are the best for it.

Prefill: products of cuBLAS, norm, rotation and SwiGLU compiled, causal attention of cuDNN (PyTorch's flash attention
where cuDNN declines). Decoding: a static cache, flash-attn's attention over it split over the keys, this project's
products with norm, SwiGLU and residual sum inside, all as one CUDA graph.

B: batch, S: sequence, H: heads, K: kv heads, d: head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sambalm.model.config import ModelConfig
from sambalm.model.ops.decode.linear import ResidualStream, RowLinear, Workspace, activations
from sambalm.model.ops.reference.elementwise import swiglu
from sambalm.model.ops.reference.rms_norm import rms_norm
from sambalm.model.ops.reference.window_attention import apply_rotary, rotary_tables

# Over how many programs flash-attn cuts the keys of a row. By itself (0) it chooses for a full cache, and leaves most
# of the device idle before.
KEY_SPLITS = (0, 8, 16, 32)
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)


class Llama:
    """Random weights in bf16: as many blocks of attention and MLP as the Samba has pairs of sublayers.

    Args:
        config: whose widths, heads and vocabulary it has; the MLP's width is rounded to a multiple of 64, which the
        fast
            kernels of its products ask for.
    """

    def __init__(self, config: ModelConfig, *, device: torch.device) -> None:
        self.config, self.device = config, device
        self.mlp_size = -(-config.mlp_size // 64) * 64
        width = config.hidden_size
        self.sizes = [width, config.kv_size, config.kv_size]
        shapes = {
            "qkv": (sum(self.sizes), width),
            "o": (width, width),
            "gate": (self.mlp_size, width),
            "up": (self.mlp_size, width),
            "down": (width, self.mlp_size),
        }
        self.layers = [
            {name: self._random(*shape) for name, shape in shapes.items()}
            | {name: torch.ones(width, device=device, dtype=torch.bfloat16) for name in ("norm", "mlp_norm")}
            for _ in range(len(config.pattern) // 2)
        ]
        self.final_norm = torch.ones(width, device=device, dtype=torch.bfloat16)
        self.embedding = self._random(config.vocab_size, width)
        self.compiled = {f.__name__: torch.compile(f) for f in (rms_norm, apply_rotary, swiglu)}

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16) / shape[1] ** 0.5

    @property
    def parameters(self) -> int:
        """Parameters, with the MLP's width as it is computed."""
        return self.embedding.numel() + sum(tensor.numel() for layer in self.layers for tensor in layer.values())

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Returns the logits after the last of the ids [B, S], and keys and values [B, S, K, d] of each layer."""
        config, norm = self.config, self.compiled["rms_norm"]
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(1)
        tables = rotary_tables(positions, head_dim=config.head_dim, base=config.rope_base)
        x, cache = F.embedding(ids, self.embedding), []
        for layer in self.layers:
            qkv = F.linear(norm(x, layer["norm"], eps=config.norm_eps), layer["qkv"])
            q, k, v = (t.unflatten(-1, (-1, config.head_dim)) for t in qkv.split(self.sizes, dim=-1))
            q, k = (self.compiled["apply_rotary"](t, *tables) for t in (q, k))
            cache.append((k, v))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            with sdpa_kernel(list(BACKENDS), set_priority=True):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + F.linear(y.transpose(1, 2).flatten(2), layer["o"])
            normed = norm(x, layer["mlp_norm"], eps=config.norm_eps)
            between = self.compiled["swiglu"](F.linear(normed, layer["gate"]), F.linear(normed, layer["up"]))
            x = x + F.linear(between, layer["down"])
        return F.linear(norm(x[:, -1], self.final_norm, eps=config.norm_eps), self.embedding), cache


class LlamaDecoder:
    """One token a row as one CUDA graph, over a static cache of so many tokens whose contents are random."""

    def __init__(self, model: Llama, *, rows: int, cache_tokens: int, splits: int) -> None:
        from flash_attn import flash_attn_with_kvcache

        config, device = model.config, model.device
        self.attend, self.config, self.model, self.splits = flash_attn_with_kvcache, config, model, splits
        workspace = Workspace(rows, device=device)
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int32, device=device)
        self.stream = ResidualStream(workspace, like=model.embedding)
        self.qkv = activations(rows, sum(model.sizes), like=model.embedding)
        self.between = activations(rows, model.mlp_size, like=model.embedding)
        self.layers = []
        for layer in model.layers:
            linears = (
                RowLinear(layer["qkv"], workspace=workspace),
                RowLinear(layer["o"], workspace=workspace),
                RowLinear(layer["gate"], workspace=workspace, up=layer["up"]),
                RowLinear(layer["down"], workspace=workspace),
            )
            shape = (2, rows, cache_tokens, config.num_kv_heads, config.head_dim)
            self.layers.append((linears, torch.randn(shape, device=device, dtype=torch.bfloat16)))
        self.norms = [layer[name] for layer in model.layers for name in ("norm", "mlp_norm")] + [model.final_norm]
        self.head = RowLinear(model.embedding, workspace=workspace)
        self.logits = model.embedding.new_empty(rows, config.vocab_size)
        places = torch.arange(cache_tokens, device=device)
        self.cos, self.sin = (
            table.to(torch.bfloat16) for table in rotary_tables(places, head_dim=config.head_dim, base=config.rope_base)
        )
        self._launch()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._launch()

    def _launch(self) -> None:
        eps, norms = self.config.norm_eps, iter(self.norms)
        self.stream.start(self.ids, self.model.embedding, next(norms))
        for (qkv, o, gate_up, down), cache in self.layers:
            heads = (
                qkv.of_stream(self.stream, self.qkv, eps=eps)[:, : qkv.columns]
                .unflatten(1, (-1, self.config.head_dim))
                .unsqueeze(1)
            )
            q, k, v = heads.split([size // self.config.head_dim for size in self.model.sizes], dim=2)
            y = self.attend(
                q,
                *cache,
                k,
                v,
                self.cos,
                self.sin,
                self.positions,
                causal=True,
                rotary_interleaved=False,
                num_splits=self.splits,
            )
            o.into_stream(y.flatten(1), self.stream, next(norms))
            down.into_stream(gate_up.of_stream(self.stream, self.between, eps=eps), self.stream, next(norms))
        self.head.of_stream(self.stream, self.logits, eps=eps)
        self.positions += 1

    def load(self, *, seen_tokens: int) -> None:
        """Goes on after so many tokens of each row."""
        self.positions.fill_(seen_tokens)

    def __call__(self, ids: Tensor) -> Tensor:
        """Takes one token of every row; returns the logits after it, [B, V]."""
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits.clone()
