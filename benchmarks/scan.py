"""What the CPU operations cost, side by side in one run: the scan against a token loop, and attention over length.

python benchmarks/scan.py
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sambalm.model.ops.reference.selective_scan import selective_scan
from sambalm.model.ops.reference.window_attention import window_attention

SCAN_LENGTH, SCAN_STATES, SCAN_WIDTHS = 2048, 16, (64, 256, 1024)
WINDOW, ATTENTION_LENGTHS, HEADS, HEAD_DIM = 512, (2048, 4096, 8192, 16384), 4, 64


def loop_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, one token at a time; autograd keeps every state."""
    state = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for t in range(u.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1), state


def scan_inputs(width: int) -> list[Tensor]:
    shape = (1, SCAN_LENGTH, width)
    projections = (torch.randn(1, SCAN_LENGTH, SCAN_STATES) for _ in range(2))
    inputs = (torch.randn(shape), torch.rand(shape) * 0.1, -torch.rand(width, SCAN_STATES) - 0.1, *projections)
    return [tensor.requires_grad_() for tensor in inputs]


def time_step_s(function: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Seconds of one forward and backward."""
    for tensor in inputs:
        tensor.grad = None
    start_s = time.perf_counter()
    function(*inputs).sum().backward()
    return time.perf_counter() - start_s


def medians_s(functions: list[Callable[..., Tensor]], inputs: list[list[Tensor]], *, repeats: int) -> list[float]:
    """Medians of functions that take turns, so that whatever else the machine does meets them alike."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for number, function in enumerate(functions):
            duration_s = time_step_s(function, inputs[number])
            if repeat:  # the first turn warms up
                times[number].append(duration_s)
    return [statistics.median(durations) for durations in times]


def print_scan(*, repeats: int) -> None:
    print(f"Selective scan, forward and backward, fp32, batch 1, {SCAN_LENGTH} tokens, {SCAN_STATES} states\n")
    print("| channels | token loop, ms | selective_scan, ms | times faster |")
    print("| ---: | ---: | ---: | ---: |")
    for width in SCAN_WIDTHS:
        inputs = scan_inputs(width)
        torch.testing.assert_close(selective_scan(*inputs)[0], loop_scan(*inputs)[0], rtol=1e-4, atol=1e-4)
        functions = [lambda *x: loop_scan(*x)[0], lambda *x: selective_scan(*x)[0]]
        loop_s, scan_s = medians_s(functions, [inputs, inputs], repeats=repeats)
        print(f"| {width} | {loop_s * 1e3:.0f} | {scan_s * 1e3:.1f} | {loop_s / scan_s:.0f} |", flush=True)


class LargestAllocation(torch.utils._python_dispatch.TorchDispatchMode):
    """Watches the bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest_bytes = max(self.largest_bytes, tensor.numel() * tensor.element_size())
        return out


def print_attention(*, repeats: int) -> None:
    print(f"\nwindow_attention, forward and backward, fp32, window {WINDOW}, {HEADS} heads of {HEAD_DIM}\n")
    print("| tokens | ms | over half the length | largest tensor, MB | over half the length |")
    print("| ---: | ---: | ---: | ---: | ---: |")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, window=WINDOW)

    inputs = [
        [torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3)] for length in ATTENTION_LENGTHS
    ]
    times_s = medians_s([attention] * len(inputs), inputs, repeats=repeats)
    before_s = before_bytes = None
    for length, qkv, time_s in zip(ATTENTION_LENGTHS, inputs, times_s, strict=True):
        with LargestAllocation() as watch:
            attention(*qkv).sum().backward()
        growth = f"{time_s / before_s:.2f}" if before_s else ""
        memory_growth = f"{watch.largest_bytes / before_bytes:.2f}" if before_bytes else ""
        print(f"| {length} | {time_s * 1e3:.0f} | {growth} | {watch.largest_bytes / 1e6:.1f} | {memory_growth} |")
        before_s, before_bytes = time_s, watch.largest_bytes


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "an unnamed CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each; the median counts")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {cpu_name()}, threads: {torch.get_num_threads()}\n")
    print_scan(repeats=arguments.repeats)
    print_attention(repeats=arguments.repeats)


if __name__ == "__main__":
    main()
