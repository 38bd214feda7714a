"""microsoft/Samba's model by lit-gpt's names: random weights, and its logits from the formulas, in plain PyTorch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def lit_gpt_weights(
    blocks: str, *, width: int, query_heads: int, kv_heads: int, mlp_size: int, vocabulary: int, tied: bool = True
) -> dict[str, Tensor]:
    """Random tensors of blocks "M" (Mamba) and "*" (attention), each with an MLP behind it."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    inner, states, rank, dim = 2 * width, 16, math.ceil(width / 16), width // query_heads
    weights = {"transformer.wte.weight": random(vocabulary, width)}
    for number, kind in enumerate(blocks):
        block = {"norm_1.weight": 1 + random(width), "norm_2.weight": 1 + random(width)}
        if kind == "M":
            block |= {
                "attn.in_proj.weight": random(2 * inner, width),
                "attn.conv1d.weight": random(inner, 1, 4),
                "attn.conv1d.bias": random(inner),
                "attn.x_proj.weight": random(rank + 2 * states, inner),
                "attn.dt_proj.weight": random(inner, rank),
                "attn.dt_proj.bias": random(inner) - 2,
                "attn.A_log": torch.arange(1.0, states + 1).log() + random(inner, states),
                "attn.D": 1 + random(inner),
                "attn.out_proj.weight": random(width, inner),
            }
        else:
            block |= {
                "attn.attn.weight": random((query_heads + 2 * kv_heads) * dim, width),
                "attn.proj.weight": random(width, width),
            }
        block |= {f"mlp.swiglu.w{i}.weight": random(mlp_size, width) for i in (1, 2)}
        block["mlp.swiglu.w3.weight"] = random(width, mlp_size)
        weights |= {f"transformer.h.{number}.{name}": tensor for name, tensor in block.items()}
    weights["transformer.ln_f.weight"] = 1 + random(width)
    weights["lm_head.weight"] = weights["transformer.wte.weight"] if tied else random(vocabulary, width)
    return weights


def lit_gpt_logits(
    weights: dict[str, Tensor], tokens: Tensor, *, query_heads: int, kv_heads: int, window: int
) -> Tensor:
    """Logits [B, S, vocabulary] of tokens [B, S], in the weights' dtype."""
    x = weights["transformer.wte.weight"][tokens]
    number = 0
    while f"transformer.h.{number}.norm_1.weight" in weights:
        place = f"transformer.h.{number}."
        block = {name.removeprefix(place): t for name, t in weights.items() if name.startswith(place)}
        normed = _norm(x, block["norm_1.weight"])
        if "attn.A_log" in block:
            x = x + _mamba(normed, block)
        else:
            x = x + _attention(normed, block, query_heads=query_heads, kv_heads=kv_heads, window=window)
        normed = _norm(x, block["norm_2.weight"])
        gate, up = (normed @ block[f"mlp.swiglu.w{i}.weight"].T for i in (1, 2))
        x = x + (F.silu(gate) * up) @ block["mlp.swiglu.w3.weight"].T
        number += 1
    return _norm(x, weights["transformer.ln_f.weight"]) @ weights["lm_head.weight"].T


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def _mamba(x: Tensor, block: dict[str, Tensor]) -> Tensor:
    u, z = (x @ block["attn.in_proj.weight"].T).chunk(2, dim=-1)
    taps, length = block["attn.conv1d.weight"][:, 0], x.shape[1]
    padded = F.pad(u, (0, 0, 3, 0))
    u = F.silu(sum(padded[:, i : i + length] * taps[:, i] for i in range(4)) + block["attn.conv1d.bias"])
    inner, states = block["attn.A_log"].shape
    rank = block["attn.dt_proj.weight"].shape[1]
    dt, B, C = (u @ block["attn.x_proj.weight"].T).split((rank, states, states), dim=-1)
    dt = F.softplus(dt @ block["attn.dt_proj.weight"].T + block["attn.dt_proj.bias"])
    A, h, outputs = -block["attn.A_log"].exp(), x.new_zeros(x.shape[0], inner, states), []
    for t in range(length):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + block["attn.D"] * u[:, t])
    return (torch.stack(outputs, dim=1) * F.silu(z)) @ block["attn.out_proj.weight"].T


def _attention(x: Tensor, block: dict[str, Tensor], *, query_heads: int, kv_heads: int, window: int) -> Tensor:
    rows, length, width = x.shape
    dim, per_group = width // query_heads, query_heads // kv_heads
    qkv = (x @ block["attn.attn.weight"].T).view(rows, length, kv_heads, per_group + 2, dim)
    heads = []
    for head in range(query_heads):
        group = qkv[:, :, head // per_group]
        q, k, v = group[:, :, head % per_group], group[:, :, per_group], group[:, :, per_group + 1]
        scores = _rotated(q) @ _rotated(k).transpose(1, 2) / math.sqrt(dim)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, dim=-1) @ block["attn.proj.weight"].T


def _rotated(x: Tensor) -> Tensor:
    """Turns [B, S, dim], of which one half is the real and the other the imaginary parts."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[1]).to(x), 10000.0 ** -(torch.arange(half).to(x) / half))
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )
