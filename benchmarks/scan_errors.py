"""How far the implementations of the selective scan are from exact, side by side: outputs, states and every gradient.

    python benchmarks/scan_errors.py

First the cases of mamba's own test of its scan (tests/ops/test_selective_scan.py of github.com/state-spaces/mamba): its
inputs, its tolerances and its reference, a loop over tokens in fp32 that rounds SiLU(z) to the inputs' dtype. For that
some cases fail: the last column counts the cases held where the reference takes SiLU(z) in fp32 too. Then errors
against the scan in float64 at growing lengths, the norm of the difference over the norm, for inputs as Samba's layers
have them. Without a GPU only the scan in plain PyTorch runs.
"""

import argparse
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sambalm.model.ops.config import KernelConfig
from sambalm.model.ops.implementations import KernelRequirements
from sambalm.model.ops.reference.selective_scan import gated_selective_scan
from sambalm.model.ops.registry import build_kernels, why_unavailable

Scan = Callable[..., tuple[Tensor, Tensor]]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CASE_LENGTHS = (1, 8, 16, 32, 64, 128, 256, 372, 512, 784, 1024, 1134, 2048, 4096)
TOLERANCES = {"fp32": (6e-4, 2e-3), "fp16": (3e-3, 5e-3), "bf16": (3e-2, 5e-2)}  # relative and absolute
LOOSER = {"u": (2, 2), "dt": (5, 10), "A": (1, 5)}  # factors for these gradients
WEIGHTS_RTOL = 1e-3  # at least, for gradients of what has no tokens, and of z
LENGTHS = (256, 1024, 4096, 16384)
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")


def scans(device: str, precision: str) -> dict[str, Scan]:
    """The implementations that run here, by name."""
    requirements = KernelRequirements(device, precision)
    names = (name for name in ("cuda", "mamba-ssm", "torch") if not why_unavailable("scan", name, requirements))
    return {name: build_kernels(KernelConfig(scan=name), requirements).scan for name in names}


def results(
    scan: Scan, inputs: Mapping[str, Tensor], grad: Tensor, *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Output, final state and all gradients, by name; of the inputs in another dtype if it is given."""
    leaves = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in inputs.items()}
    out, state = scan(*(leaves[name] for name in NAMES[:5]), **{name: leaves[name] for name in NAMES[5:]})
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return {"out": out.detach(), "state": state.detach(), **dict(zip(leaves, gradients, strict=True))}


def case_inputs(length: int, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of a case and the gradient of its output, drawn in the test's order and layout."""
    batch, channels, states = 2, 4, 8

    def drawn(draw: Callable[..., Tensor], *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return draw(*shape, device=device, dtype=dtype)

    A = -0.5 * drawn(torch.rand, channels, states, dtype=torch.float32)
    B, C = (drawn(torch.randn, batch, states, length) for _ in range(2))
    D = drawn(torch.randn, channels, dtype=torch.float32)
    z = drawn(torch.randn, batch, channels, length)
    dt_bias = 0.5 * drawn(torch.rand, channels, dtype=torch.float32)
    u = drawn(torch.randn, batch, channels, length)
    dt = 0.5 * drawn(torch.rand, batch, channels, length)
    grad = drawn(torch.randn, batch, channels, length)
    tokens = {name: t.transpose(1, 2) for name, t in {"u": u, "dt": dt, "B": B, "C": C, "z": z}.items()}
    given = tokens | {"A": A, "D": D, "dt_bias": dt_bias}
    return {name: given[name] for name in NAMES}, grad.transpose(1, 2)


def reference(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor, z: Tensor, dt_bias: Tensor, gate: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in fp32, with SiLU(z) in the dtype of `gate`."""
    steps, inputs = F.softplus(dt.float() + dt_bias), u.float()
    state, outputs = inputs.new_zeros(len(u), *A.shape), []
    decays = torch.exp(steps.unsqueeze(-1) * A)
    additions = (steps * inputs).unsqueeze(-1) * B.float().unsqueeze(-2)
    for decay, addition, c in zip(decays.unbind(1), additions.unbind(1), C.float().unbind(1), strict=True):
        state = decay * state + addition
        outputs.append((state * c.unsqueeze(-2)).sum(-1))
    y = torch.stack(outputs, dim=1) + D * inputs
    return (y * F.silu(z.to(gate))).to(u.dtype), state


def over_tolerance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], precision: str) -> dict[str, float]:
    """By how much of its tolerance each result is off, of those that are off by more than it allows."""
    over = {}
    for name, wanted in expected.items():
        rtol, atol = TOLERANCES[precision]
        if name in ("A", "D", "z", "dt_bias"):
            rtol = max(rtol, WEIGHTS_RTOL)
        more_rtol, more_atol = LOOSER.get(name, (1, 1))
        allowed = atol * more_atol + rtol * more_rtol * wanted.double().abs()
        share = ((found[name].double() - wanted.double()).abs() / allowed).max().item()
        if not share <= 1:
            over[name] = share
    return over


def print_cases(device: str, seeds: Iterable[int]) -> None:
    print("| seed | scan | held in fp32 | fp16 | bf16 | of 42 | SiLU in fp32 |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for seed in seeds:
        held: dict[str, Counter[str]] = defaultdict(Counter)
        failures = []
        for precision, length in itertools.product(DTYPES, CASE_LENGTHS):
            torch.manual_seed(seed)
            dtype = DTYPES[precision]
            inputs, grad = case_inputs(length, dtype, device)
            rounded, exact = (results(partial(reference, gate=gate), inputs, grad) for gate in (dtype, torch.float32))
            for name, scan in scans(device, precision).items():
                found = results(scan, inputs, grad)
                over = over_tolerance(found, rounded, precision)
                held[name][precision] += not over
                held[name]["exact"] += not over_tolerance(found, exact, precision)
                if over:
                    shares = ", ".join(f"{result} {share:.2f}" for result, share in over.items())
                    failures.append(f"{name}, {precision}, {length} tokens: {shares}")
        for name, counts in held.items():
            by_precision = [counts[precision] for precision in DTYPES]
            cells = [seed, name, *by_precision, sum(by_precision), counts["exact"]]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
        print("\nover tolerance, in shares of it:", *failures, "", sep="\n")


def layer_inputs(length: int, channels: int, states: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Inputs as the layers give them at the start of training: step sizes from 0.001 to 0.1, rates from -1 to -N."""

    def activation(width: int) -> Tensor:
        return torch.randn(length, 1, width, device=device).to(dtype).transpose(0, 1)

    steps = torch.exp(torch.empty(channels, device=device).uniform_(-6.9, -2.3))
    given = {"u": F.silu(activation(channels)), "dt": 0.5 * activation(channels)}
    given["A"] = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
    given |= {"B": activation(states), "C": activation(states), "D": torch.ones(channels, device=device)}
    return given | {"z": activation(channels), "dt_bias": torch.log(torch.expm1(steps))}


def print_errors(device: str, *, channels: int, states: int, lengths: Iterable[int]) -> None:
    print(f"{channels} channels, {states} states, one sequence\n")
    columns = ("out", "state", *NAMES)
    print(f"| inputs | tokens | scan | {' | '.join(columns)} |\n| --- | ---: | --- |{' ---: |' * len(columns)}")
    for precision in ("bf16", "fp16"):
        for length in lengths:
            torch.manual_seed(0)
            inputs = layer_inputs(length, channels, states, DTYPES[precision], device)
            grad = torch.randn_like(inputs["u"])
            exact = results(gated_selective_scan, inputs, grad, dtype=torch.float64)
            for name, scan in scans(device, precision).items():
                found = results(scan, inputs, grad)
                errors = ((found[c].double() - exact[c]).norm() / exact[c].norm() for c in columns)
                print(f"| {precision} | {length} | {name} | {' | '.join(f'{e:.1e}' for e in errors)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--states", type=int, default=16)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    print(f"{name}, torch {torch.__version__}\n")
    print_cases(device, arguments.seeds)
    print_errors(device, channels=arguments.channels, states=arguments.states, lengths=arguments.lengths)


if __name__ == "__main__":
    main()
