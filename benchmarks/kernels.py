"""Times the selective scan's implementations side by side on a GPU, and says how near they are to the device's limits.

    python benchmarks/kernels.py

Medians, forward and backward apart. Bytes are those that must move once: forward u, dt, z and the output, backward
these, the output's gradient and three gradients. Exponentials: one a state and step forward, two backward.
"""

import argparse
import statistics

import torch

from sambalm.model.ops import cuda
from sambalm.model.ops.cuda_scan import cuda_selective_scan

SHAPES = ((1, 3072, 4096), (8, 3072, 4096), (4, 4608, 4096), (1, 5632, 4096), (4, 5632, 4096), (1, 5632, 131072))
D_STATE = 16


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
    for _ in range(2):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(scan, inputs: list[torch.Tensor], *, repeats: int) -> tuple[float, float]:
    u, dt, A, B, C, D, z, bias = inputs

    def forward() -> torch.Tensor:
        return scan(u, dt, A, B, C, D=D, z=z, dt_bias=bias)[0]

    y = forward()
    grad = torch.randn_like(y)
    backward = median_ms(lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True), repeats=repeats)
    return median_ms(forward, repeats=repeats), backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, torch {torch.__version__}, bf16, d_state {D_STATE}, medians of {arguments.repeats}\n")
    print(
        "| batch | channels | tokens | forward, backward ms | mamba-ssm's forward, backward ms | times faster | GB/s "
        "| exp/s |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    peer = cuda.why_unavailable("mamba-ssm", cuda.Circumstances(torch.device("cuda"), torch.bfloat16)) is None
    for batch, channels, length in SHAPES:
        inputs = inputs_of(batch, channels, length)
        forward, backward = measure(cuda_selective_scan, inputs, repeats=arguments.repeats)
        other = measure(cuda.mamba_ssm_scan, inputs, repeats=arguments.repeats) if peer else (float("nan"),) * 2
        elements, seconds = batch * channels * length, (forward + backward) * 1e-3
        print(
            f"| {batch} | {channels} | {length} | {forward:.3f}, {backward:.3f} | {other[0]:.3f}, {other[1]:.3f} "
            f"| {sum(other) / (forward + backward):.2f} | {elements * 2 * 12 / seconds / 1e9:,.0f} "
            f"| {elements * D_STATE * 3 / seconds / 1e12:.2f}e12 |"
        )


if __name__ == "__main__":
    main()
