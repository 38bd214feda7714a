"""Times the implementations of scan, convolution and attention side by side on a GPU.

    python benchmarks/kernels.py

Medians, forward and backward apart. mamba-ssm's scan includes the copies to its layout, which the layers need. The
scan's bytes are those that must move once: forward u, dt, z and the output, backward these, the output's gradient and
three gradients; its exponentials one a state and step forward, two backward. What is not installed shows as nan.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config

from sambalm.model.ops.config import KernelConfig
from sambalm.model.ops.implementations import AttentionCall, KernelRequirements
from sambalm.model.ops.registry import build_kernels, why_unavailable

SHAPES = ((1, 3072, 4096), (8, 3072, 4096), (4, 4608, 4096), (1, 5632, 4096), (4, 5632, 4096), (1, 5632, 131072))
D_STATE = 16
# Sequences, query heads, kv heads, head dim, tokens: the paper's sizes, and a long sequence.
HEADS = (
    (8, 12, 12, 128, 4096),
    (4, 18, 18, 128, 4096),
    (4, 32, 4, 64, 4096),
    (4, 11, 1, 256, 4096),
    (1, 18, 18, 128, 131072),
)
WINDOW = 2048
NOT_THERE = (float("nan"), float("nan"))


def inputs_of(batch: int, channels: int, length: int) -> list[torch.Tensor]:
    def activation(width: int) -> torch.Tensor:
        return torch.randn(length, batch, width, device="cuda", dtype=torch.bfloat16).transpose(0, 1)

    xz, bc = activation(2 * channels), activation(2 * D_STATE + 96)
    A = -torch.arange(1.0, D_STATE + 1, device="cuda").repeat(channels, 1)
    D, bias = torch.ones(channels, device="cuda"), torch.rand(channels, device="cuda") * 4 - 7
    u, dt = activation(channels), activation(channels)
    B, C = bc[..., 96 : 96 + D_STATE], bc[..., 96 + D_STATE :]
    return [t.requires_grad_() for t in (u, dt, A, B, C, D, xz[..., channels:], bias)]


def median_ms(function, *, repeats: int) -> float:
    """The time of one call among several that were launched together, as in training, where the CPU runs ahead."""
    for _ in range(2):
        function()
    calls, times = 5, []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(10_000_000)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def kernel(operation: str, name: str, *calls: AttentionCall) -> Callable[..., Any] | None:
    """The named implementation as a run computes with it; None where it cannot run here."""
    requirements = KernelRequirements("cuda", "bf16", attention_calls=calls)
    if why_unavailable(operation, name, requirements):
        return None
    kernels = build_kernels(KernelConfig(**{operation: name}), requirements)
    return getattr(kernels, operation)


def measure(scan, inputs: list[torch.Tensor], *, repeats: int) -> tuple[float, float]:
    u, dt, A, B, C, D, z, bias = inputs
    return measure_call(lambda: scan(u, dt, A, B, C, D=D, z=z, dt_bias=bias)[0], inputs, repeats=repeats)


def measure_call(forward, inputs: list[torch.Tensor], *, repeats: int) -> tuple[float, float]:
    """The times of forward and of backward, in ms."""
    y = forward()
    grad = torch.randn_like(y)
    backward = median_ms(lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True), repeats=repeats)
    return median_ms(forward, repeats=repeats), backward


def scans(repeats: int) -> None:
    print("| batch | channels | tokens | forward, backward ms | mamba-ssm | times faster | GB/s | exp/s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for batch, channels, length in SHAPES:
        inputs = inputs_of(batch, channels, length)
        (forward, backward), other = (
            measure(scan, inputs, repeats=repeats) if scan else NOT_THERE
            for scan in (kernel("scan", "cuda"), kernel("scan", "mamba-ssm"))
        )
        elements, seconds = batch * channels * length, (forward + backward) * 1e-3
        print(
            f"| {batch} | {channels} | {length} | {forward:.3f}, {backward:.3f} | {other[0]:.3f}, {other[1]:.3f} "
            f"| {sum(other) / (forward + backward):.2f} | {elements * 2 * 12 / seconds / 1e9:,.0f} "
            f"| {elements * D_STATE * 3 / seconds / 1e12:.2f}e12 |"
        )


def convolutions(repeats: int) -> None:
    print("\n| batch | channels | tokens | forward, backward ms | causal-conv1d | torch | times faster |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for batch, channels, length in SHAPES:
        x = inputs_of(batch, channels, length)[0]
        weight, bias = torch.randn(channels, 4, device="cuda"), torch.randn(channels, device="cuda")
        inputs = [x, weight.requires_grad_(), bias.requires_grad_()]
        own, other, torch_ms = (
            measure_call(lambda f=conv, i=inputs: f(*i), inputs, repeats=repeats) if conv else NOT_THERE
            for conv in (kernel("conv", name) for name in ("cuda", "causal-conv1d", "torch"))
        )
        print(
            f"| {batch} | {channels} | {length} | {own[0]:.3f}, {own[1]:.3f} | {other[0]:.3f}, {other[1]:.3f} "
            f"| {torch_ms[0]:.3f}, {torch_ms[1]:.3f} | {sum(other) / sum(own):.2f} |"
        )


def attentions(repeats: int) -> None:
    print("\n| batch | heads | head dim | tokens | window | cudnn forward, backward ms | flex | torch-flash |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for batch, heads, kv_heads, head_dim, length in HEADS:
        inputs = [
            torch.randn(length, batch, n, head_dim, device="cuda", dtype=torch.bfloat16).permute(1, 2, 0, 3)
            for n in (heads, kv_heads, kv_heads)
        ]
        inputs = [x.requires_grad_() for x in inputs]
        call = AttentionCall(batch, heads, kv_heads, queries=length, keys=length, head_dim=head_dim, window=WINDOW)
        times = [
            measure_call(lambda f=attention, i=inputs: f(*i, window=WINDOW), inputs, repeats=repeats)
            if attention
            else NOT_THERE
            for attention in (kernel("attention", name, call) for name in ("cudnn", "flex", "torch-flash"))
        ]
        columns = " | ".join(f"{forward:.3f}, {backward:.3f}" for forward, backward in times)
        print(f"| {batch} | {heads}/{kv_heads} | {head_dim} | {length} | {WINDOW} | {columns} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch._functorch.config.donated_buffer = False  # compiled backwards are called again and again on one graph
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, torch {torch.__version__}, bf16, medians of {arguments.repeats}\n")
    for table in (scans, convolutions, attentions):
        table(arguments.repeats)


if __name__ == "__main__":
    main()
