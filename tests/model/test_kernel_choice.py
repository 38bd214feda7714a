"""What `auto` takes and what is refused by name, on GPUs that are described and not there."""

import sys
from types import SimpleNamespace

import pytest
import torch

from sambalm.model.ops.cuda.conv import MAX_TAPS
from sambalm.model.ops.cuda.scan_sizes import backward_shared_bytes
from sambalm.model.ops.external import KernelError
from sambalm.model.ops.registry import KernelConfig

KIB = 1024
H100, A100, RTX_4090 = (kib * KIB for kib in (227, 163, 99))  # shared memory that a block may have


def scan_of(name, monkeypatch, *, block_memory_bytes, dtype=torch.bfloat16, d_state=16):
    """The scan that is chosen where cuda-bindings is installed and nothing else."""
    for module, content in {"cuda.bindings.nvrtc": SimpleNamespace(), "mamba_ssm": None}.items():
        monkeypatch.setitem(sys.modules, module, content)
    device = SimpleNamespace(shared_memory_per_block_optin=block_memory_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    others = dict.fromkeys(("conv", "attention", "norm", "elementwise"), "torch")
    kernels = KernelConfig(scan=name, **others).build(device=torch.device("cuda"), dtype=dtype, d_state=d_state)
    return kernels.names[0]


@pytest.mark.parametrize(
    ("block_memory_bytes", "dtype", "d_state", "chosen"),
    [
        (H100, torch.bfloat16, 16, "cuda"),
        (H100, torch.float32, 64, "cuda"),
        (H100, torch.bfloat16, 65, "torch"),
        (A100, torch.float32, 64, "cuda"),
        (A100, torch.float32, 32, "torch"),
        (RTX_4090, torch.bfloat16, 16, "cuda"),
        (RTX_4090, torch.float32, 16, "torch"),
        (RTX_4090, torch.float16, 50, "cuda"),
    ],
)
def test_auto_takes_the_cuda_scan_where_its_states_fit(monkeypatch, block_memory_bytes, dtype, d_state, chosen):
    found = scan_of("auto", monkeypatch, block_memory_bytes=block_memory_bytes, dtype=dtype, d_state=d_state)
    assert found == f"scan={chosen}"


def test_a_cuda_scan_that_does_not_fit_is_refused_by_name_before_anything_runs(monkeypatch):
    with pytest.raises(KernelError, match=r"kernels\.scan is 'cuda'.*model\.d_state is 65 and it holds at most 64"):
        scan_of("cuda", monkeypatch, block_memory_bytes=H100, d_state=65)
    with pytest.raises(KernelError, match=r"in float32 it needs 106,112 bytes .* this GPU has 101,376"):
        scan_of("cuda", monkeypatch, block_memory_bytes=RTX_4090, dtype=torch.float32)


def test_too_many_states_for_the_scan_leave_our_convolution(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", SimpleNamespace())
    others = dict.fromkeys(("scan", "attention", "norm", "elementwise"), "torch")
    kernels = KernelConfig(conv="cuda", **others).build(device=torch.device("cuda"), dtype=torch.float16, d_state=65)
    assert "conv=cuda" in kernels.names


def conv_of(name, monkeypatch, *, d_conv, installed=("cuda.bindings.nvrtc", "causal_conv1d")):
    """The convolution that is chosen on a GPU where some packages are installed."""
    for module in ("cuda.bindings.nvrtc", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace() if module in installed else None)
    others = dict.fromkeys(("scan", "attention", "norm", "elementwise"), "torch")
    kernels = KernelConfig(conv=name, **others).build(device=torch.device("cuda"), dtype=torch.bfloat16, d_conv=d_conv)
    return kernels.names[1]


@pytest.mark.parametrize(("d_conv", "chosen"), [(2, "causal-conv1d"), (4, "causal-conv1d"), (5, "cuda"), (12, "torch")])
def test_auto_takes_the_convolution_that_holds_its_taps(monkeypatch, d_conv, chosen):
    assert conv_of("auto", monkeypatch, d_conv=d_conv) == f"conv={chosen}"


def test_the_cuda_convolution_holds_11_taps(monkeypatch):
    alone = {"installed": ("cuda.bindings.nvrtc",)}
    assert MAX_TAPS == 11  # docs/gpu.md
    assert conv_of("auto", monkeypatch, d_conv=11, **alone) == "conv=cuda"
    assert conv_of("auto", monkeypatch, d_conv=12, **alone) == "conv=torch"


@pytest.mark.parametrize(("name", "taps"), [("causal-conv1d", 4), ("cuda", 11)])
def test_a_convolution_of_too_many_taps_is_refused_by_name_before_anything_runs(monkeypatch, name, taps):
    assert conv_of(name, monkeypatch, d_conv=taps) == f"conv={name}"
    message = rf"kernels\.conv is '{name}'.*model\.d_conv is {taps + 1} and it holds at most {taps} taps"
    with pytest.raises(KernelError, match=message):
        conv_of(name, monkeypatch, d_conv=taps + 1)


def test_three_blocks_of_the_backward_fit_a_multiprocessor_of_an_h100():
    assert 3 * (backward_shared_bytes(torch.bfloat16, 16) + KIB) <= 228 * KIB  # 1 KiB a block is the system's
