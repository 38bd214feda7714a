"""Samba from the paper's formulas, in float64 and plain loops over tokens and heads.

Shares no code with the package.
"""

import math

import torch

from sambalm.model.config import ModelConfig


def reference_logits(config: ModelConfig, tensors: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """[length, vocabulary] for one sequence."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    x = torch.stack([weights["embedding.weight"][token] for token in tokens])
    for i, letter in enumerate(config.pattern):
        of_layer = {k.removeprefix(f"layers.{i}."): v for k, v in weights.items() if k.startswith(f"layers.{i}.")}
        normed = rms_norm(x, of_layer["norm.weight"], config.norm_eps)
        x = x + LAYERS[letter](config, of_layer, normed)
    head = weights["embedding.weight"] if config.tie_embeddings else weights["head.weight"]
    return rms_norm(x, weights["final_norm.weight"], config.norm_eps) @ head.T


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def silu(x):
    return x / (1 + torch.exp(-x))


def mamba(config, weights, x):
    rank, states = config.dt_rank_size, config.d_state
    x_part, gate = x @ weights["mixer.in_proj.x.weight"].T, x @ weights["mixer.in_proj.z.weight"].T
    A = -torch.exp(weights["mixer.A_log"])
    h = torch.zeros_like(A)
    outputs = []
    for t in range(len(x)):
        u = weights["mixer.conv.bias"].clone()
        for back in range(config.d_conv):
            if t - back >= 0:
                u += weights["mixer.conv.weight"][:, config.d_conv - 1 - back] * x_part[t - back]
        u = silu(u)
        projected = weights["mixer.x_proj.weight"] @ u
        step, B, C = projected[:rank], projected[rank : rank + states], projected[rank + states :]
        dt = torch.log1p(torch.exp(weights["mixer.dt_proj.weight"] @ step + weights["mixer.dt_proj.bias"]))
        h = torch.exp(dt[:, None] * A) * h + (dt * u)[:, None] * B[None, :]
        outputs.append((h @ C + weights["mixer.D"] * u) * silu(gate[t]))
    return torch.stack(outputs) @ weights["mixer.out_proj.weight"].T


def rotate(x, position, base):
    if base is None:
        return x
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * base ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
        out[half + i] = x[half + i] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def attention(config, weights, x, *, window=None):
    dim, group = config.head_dim, config.num_query_heads // config.num_kv_heads
    q, k, v = (x @ weights[f"mixer.qkv_proj.{name}.weight"].T for name in "qkv")
    output, window = torch.zeros_like(q), window or config.window
    for head in range(config.num_query_heads):
        own, shared = slice(head * dim, (head + 1) * dim), slice(head // group * dim, (head // group + 1) * dim)
        queries = [rotate(q[t, own], t, config.rope_base) for t in range(len(x))]
        keys = [rotate(k[t, shared], t, config.rope_base) for t in range(len(x))]
        for t in range(len(x)):
            seen = range(max(0, t - window + 1), t + 1)
            scores = torch.stack([queries[t] @ keys[s] / math.sqrt(dim) for s in seen])
            output[t, own] = torch.softmax(scores, dim=0) @ v[list(seen), shared]
    return output @ weights["mixer.o_proj.weight"].T


def swiglu(config, weights, x):
    gate, up = (x @ weights[f"mixer.gate_up_proj.{name}.weight"].T for name in ("gate", "up"))
    return (silu(gate) * up) @ weights["mixer.down_proj.weight"].T


def full_attention(config, weights, x):
    return attention(config, weights, x, window=len(x))


LAYERS = {"M": mamba, "*": attention, "F": full_attention, "-": swiglu, "=": swiglu}
