"""The CUDA C++ kernels without a GPU: compiled for the CPU, between guard pages, against the references in float64."""

from types import SimpleNamespace

import pytest
import torch

from sambalm.model.ops.cuda import adamw as cuda_adamw
from sambalm.model.ops.cuda import conv as cuda_conv
from sambalm.model.ops.cuda import scan as cuda_scan
from sambalm.model.ops.cuda import scan_sizes as cuda_scan_sizes
from sambalm.model.ops.cuda.adamw import CHUNK, CudaAdamW
from sambalm.model.ops.cuda.conv import cuda_causal_conv_silu
from sambalm.model.ops.cuda.scan import _Shape, cuda_selective_scan
from sambalm.model.ops.reference.causal_conv import causal_conv_silu
from sambalm.model.ops.reference.selective_scan import gated_selective_scan
from sambalm.parallel.zero.compute_weights import ComputeWeights
from sambalm.parallel.zero.parameter_info import info_of
from tests.support.host_cuda import COMPILER, HostCuda, KernelFault, guarded
from tests.support.marks import slow_except
from tests.support.parameters import described

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ on Linux, which compiles the kernels for the CPU")

# By the dtype of a result: all is computed in fp32. With 16-bit inputs the scan rounds the states before each tile, to
# 2^-15 of the largest of some.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-3, torch.float16: 4e-4}
BORDER_TOLERANCE = 5e-5
H100_MULTIPROCESSORS = 132


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture(params=slow_except([True], [True, False], long=[False]), ids=["guarded-end", "guarded-start"])
def host(request, libraries, monkeypatch):
    """Kernels run on the CPU, into memory of NaNs: deterministic mode fills what torch.empty returns with them."""
    host = HostCuda(libraries, at_end=request.param)
    use(host, monkeypatch)
    device = SimpleNamespace(multi_processor_count=H100_MULTIPROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield host
    torch.use_deterministic_algorithms(False)


def use(host, monkeypatch):
    for module in (cuda_conv, cuda_scan, cuda_adamw):
        monkeypatch.setattr(module, "kernel", host.kernel)


def activation(batch, length, width, dtype, *, gap=0):
    """As the layers give them: a view of sequence-first memory, part of something wider where there is a gap."""
    return torch.randn(length, batch, width + gap).to(dtype).transpose(0, 1)[..., :width]


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-6)).item()


def compare(function, reference, inputs, *, used=slice(None)):
    """Outputs, and gradients of the used ones in all inputs that are not None."""
    given = {name: t for name, t in inputs.items() if t is not None}
    is_narrow = next(iter(given.values())).dtype != torch.float32
    tolerance = TOLERANCE | ({torch.float32: BORDER_TOLERANCE} if is_narrow else {})
    actual_inputs = {name: t.detach().requires_grad_() for name, t in given.items()}
    expected_inputs = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    actual, expected = function(**actual_inputs), reference(**expected_inputs)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, number
        assert relative(a, e) < tolerance[a.dtype], f"output {number}"
    weights = [torch.randn_like(a) for a in actual[used]]
    found, wanted = (
        torch.autograd.grad(
            outputs[used],
            list(leaves.values()),
            [w.to(o.dtype) for o, w in zip(outputs[used], weights, strict=True)],
            materialize_grads=True,
        )
        for outputs, leaves in ((actual, actual_inputs), (expected, expected_inputs))
    )
    for name, a, e in zip(given, found, wanted, strict=True):
        assert a.shape == e.shape, name
        assert relative(a, e) < tolerance[a.dtype], f"gradient of {name}"


def conv_inputs(batch, length, channels, dtype, *, taps=4, gap=0):
    x = activation(batch, length, channels, dtype, gap=gap)
    return {"x": x, "weight": torch.randn(channels, taps), "bias": torch.randn(channels)}


def compare_conv(inputs, *, resets=None):
    compare(
        lambda **given: [cuda_causal_conv_silu(**given, resets=resets)],
        lambda **given: [causal_conv_silu(**given, resets=resets)],
        inputs,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("batch", "length", "channels"),
    [(1, 1, 8), (2, 3, 512), (2, 6, 512), (3, 33, 72), (1, 97, 13), (2, 128, 40), (1, 131, 264)],
)
def test_conv(host, dtype, batch, length, channels):
    inputs = conv_inputs(batch, length, channels, dtype)
    compare_conv(inputs)
    inputs["x"] = inputs["x"].contiguous()
    compare_conv(inputs, resets=torch.rand(batch, length) < 0.1)


@pytest.mark.parametrize("taps", [2, 7])
def test_conv_of_other_taps_on_a_part_of_wider_memory(host, taps):
    for length in (taps - 1, 70):
        inputs = conv_inputs(2, length, 16, torch.float32, taps=taps, gap=24)
        compare_conv(inputs, resets=torch.rand(2, length) < 0.1)


def scan_inputs(batch, length, channels, states, dtype, *, start=True):
    return {
        "u": activation(batch, length, channels, dtype),
        "dt": activation(batch, length, channels, dtype),
        "A": -torch.exp(torch.randn(channels, states)),
        "B": activation(batch, length, states, dtype, gap=7),
        "C": activation(batch, length, states, dtype, gap=3),
        "D": torch.randn(channels),
        "z": activation(batch, length, channels, dtype, gap=channels),
        "dt_bias": torch.randn(channels) - 2,
        "initial_state": torch.randn(batch, channels, states) if start else None,
    }


def compare_scan(inputs, *, resets=None, used=slice(None)):
    compare(
        lambda **given: cuda_selective_scan(**given, resets=resets),
        lambda **given: gated_selective_scan(**given, resets=resets),
        inputs,
        used=used,
    )


@pytest.mark.parametrize("dtype", slow_except([torch.float32, torch.bfloat16], TOLERANCE))
@pytest.mark.parametrize(
    ("batch", "length", "channels", "states"),
    [
        (1, 1, 8, 16),
        (2, 3, 72, 16),
        (3, 6, 40, 16),
        (1, 33, 13, 3),  # neither channels nor states fit
        (2, 16, 104, 8),
        (2, 33, 24, 32),
        (1, 18, 40, 50),
    ],
)
def test_scan(host, dtype, batch, length, channels, states):
    compare_scan(scan_inputs(batch, length, channels, states, dtype))
    compare_scan(
        scan_inputs(batch, length, channels, states, dtype, start=False), resets=torch.rand(batch, length) < 0.1
    )


@pytest.mark.parametrize("dtype", slow_except([torch.bfloat16], TOLERANCE, long=[torch.float32, torch.float16]))
def test_scan_without_a_gate(host, monkeypatch, dtype):
    monkeypatch.setattr(cuda_scan_sizes, "MIN_SEGMENT_TILES", 1)
    inputs = scan_inputs(2, 33, 72, 16, dtype)
    del inputs["z"]
    compare(
        lambda **given: cuda_selective_scan(**given, z=None),
        lambda **given: gated_selective_scan(**given, z=None),
        inputs,
    )


def shifted(x):
    """Contiguous, and not aligned to 16 bytes."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


@pytest.mark.parametrize("length", [1, 5])
def test_contiguous_activations_that_are_not_aligned(host, length):
    inputs = conv_inputs(2, length, 16, torch.bfloat16)
    compare_conv(inputs | {"x": shifted(inputs["x"])})
    inputs = scan_inputs(2, length, 16, 16, torch.bfloat16)
    compare_scan(inputs | {name: shifted(inputs[name]) for name in ("u", "dt", "z")})


@pytest.mark.parametrize(
    ("dtype", "batch", "length", "channels", "states"),
    [
        *((dtype, 2, 33, 72, 16) for dtype in TOLERANCE),
        (torch.bfloat16, 1, 67, 40, 32),
        (torch.float32, 1, 35, 24, 64),
    ],
)
def test_scan_of_time_cut_into_segments(host, monkeypatch, dtype, batch, length, channels, states):
    monkeypatch.setattr(cuda_scan_sizes, "MIN_SEGMENT_TILES", 1)
    inputs = scan_inputs(batch, length, channels, states, dtype)
    assert _Shape.of(inputs["u"], inputs["A"]).segments > 2
    compare_scan(inputs)
    compare_scan(inputs | {"initial_state": None}, resets=torch.rand(batch, length) < 0.05)


def test_states_that_no_float16_holds(host):
    inputs = scan_inputs(1, 40, 24, 16, torch.float16)
    inputs |= {"u": inputs["u"] * 32, "B": inputs["B"] * 4096, "C": inputs["C"] / 4096, "z": inputs["z"] / 64}
    _, state = gated_selective_scan(**inputs)
    assert state.abs().max() > torch.finfo(torch.float16).max
    compare_scan(inputs, used=slice(1))


def test_scan_of_long_segments(host):
    inputs = scan_inputs(1, 700, 8, 16, torch.float32)
    assert _Shape.of(inputs["u"], inputs["A"]).segments > 4
    compare_scan(inputs, resets=torch.rand(1, 700) < 0.01)


@pytest.mark.parametrize(
    ("start", "used"), [(False, slice(None)), (False, slice(1, None)), (True, slice(1))], ids=["first", "ends", "last"]
)
def test_scan_of_context_parallel_ranks(host, start, used):
    """The first rank's; what a rank in between reaches from zero; and the last one's, whose final state is not used."""
    compare_scan(scan_inputs(2, 128, 512, 16, torch.bfloat16, start=start), used=used)


def test_scan_without_gradients(host):
    inputs = scan_inputs(2, 33, 40, 16, torch.float32)
    with torch.no_grad():
        actual, expected = cuda_selective_scan(**inputs), gated_selective_scan(**inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def guarded_optimizer(host, sizes, *, rounded=torch.bfloat16):
    """Ours and torch's in float64 with their weights; all that ours is given lies next to guard pages. All weights but
    the first have a copy that is rounded.
    """

    def guard(tensor):
        return guarded(tensor, at_end=host.at_end)

    weights = [described(guard(torch.randn(size)).requires_grad_()) for size in sizes]
    doubles = [weight.detach().double().requires_grad_() for weight in weights]
    settings = {"lr": 3e-2, "betas": (0.9, 0.95), "weight_decay": 0.3}
    ours, other = CudaAdamW(weights, **settings), torch.optim.AdamW(doubles, **settings)
    for weight, double in zip(weights, doubles, strict=True):
        weight.grad = guard(torch.randn_like(weight))
        double.grad = weight.grad.double()
        zeros = torch.zeros_like(weight)
        state = {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros}
        ours.state[weight] = {name: guard(tensor) for name, tensor in state.items()}
    copies = ComputeWeights(weights)
    for weight in weights[1:]:
        copies.copies_of[weight].append(guard(torch.full_like(weight, torch.nan, dtype=rounded, requires_grad=False)))
    return ours, other


@pytest.fixture
def no_pinned_memory(monkeypatch):
    """There is none without a GPU."""
    make = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *values, pin_memory=False, **options: make(*values, **options))


@pytest.mark.parametrize("rounded", [torch.bfloat16, torch.float16])
def test_adamw(host, no_pinned_memory, rounded):
    ours, other = guarded_optimizer(host, (1, 3, 4, 255, CHUNK - 1, CHUNK, CHUNK + 5, 2 * CHUNK + 8), rounded=rounded)
    for scale in (None, 7.0):
        ours.grad_scale = None if scale is None else torch.full((), scale)
        ours.step()
        for double in other.param_groups[0]["params"]:
            double.grad /= scale or 1.0
        other.step()
    for weight, double in zip(*(o.param_groups[0]["params"] for o in (ours, other)), strict=True):
        assert relative(weight, double) < 1e-5
        for name, value in other.state[double].items():
            assert relative(ours.state[weight][name], value) < 1e-5, name
        assert all(torch.equal(copy, weight.to(rounded)) for copy in info_of(weight).compute_weights.copies_of[weight])


def test_adamw_skips_what_is_not_finite(host, no_pinned_memory):
    ours, _ = guarded_optimizer(host, (5, CHUNK + 1))
    weights = ours.param_groups[0]["params"]
    ours.found_inf = torch.zeros(())
    ours.step()
    before = [tensor.clone() for weight in weights for tensor in (weight, *ours.state[weight].values())]
    ours.found_inf = torch.ones(())
    for weight in weights:
        weight.grad.fill_(torch.nan)
    ours.step()
    after = [tensor for weight in weights for tensor in (weight, *ours.state[weight].values())]
    assert all(map(torch.equal, before, after))


# Negative controls: what is known to be wrong is found.


def broken(host, right, wrong):
    """With kernels that have `wrong` for what is `right`."""

    def edit(source):
        assert right in source
        return source.replace(right, wrong)

    return HostCuda(host.folder, host.at_end, edit=edit)


at_end = pytest.mark.parametrize("host", [True], indirect=True, ids=["guarded-end"])


@pytest.mark.parametrize(
    ("host", "wrong", "side"),
    [(True, "time >= 0", "after the end"), (False, "time < length", "before the start")],
    indirect=["host"],
    ids=["after", "before"],
)
def test_a_convolution_of_tokens_that_do_not_exist_is_found(host, wrong, side, monkeypatch):
    inputs = [t.requires_grad_() for t in conv_inputs(2, 3, 512, torch.bfloat16).values()]
    y = cuda_causal_conv_silu(*inputs)
    use(broken(host, "time >= 0 && time < length", wrong), monkeypatch)
    access = rf"\d+ bytes {side} of argument 0, torch.bfloat16 \[2, 3, 512\]"
    with pytest.raises(KernelFault, match=f"conv_forward.*{access}"):
        cuda_causal_conv_silu(*inputs)
    with pytest.raises(KernelFault, match=f"conv_backward.*{access}"):
        y.sum().backward()


@at_end
def test_a_scan_that_reads_tokens_after_the_last_is_found(host, monkeypatch):
    inputs = {name: t.requires_grad_() for name, t in scan_inputs(1, 3, 40, 16, torch.float32).items()}
    y, _ = cuda_selective_scan(**inputs)
    use(broken(host, "bool inside = has_channels && time < length", "bool inside = has_channels"), monkeypatch)
    with pytest.raises(KernelFault, match=r"scan_forward.* after the end of argument"):
        cuda_selective_scan(**inputs)
    with pytest.raises(KernelFault, match=r"scan_backward.* after the end of argument"):
        y.sum().backward()


@at_end
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("states.value[4 * i + j] = h[i][j];", "states.value[4 * i + j] = low(pack(h[i][j], 0.f));"),
        ("UNITS = 32767.f", "UNITS = 1023.f"),
    ],
    ids=["in-a-tile", "before-it"],
)
def test_states_of_fewer_bits_are_found(host, right, wrong, monkeypatch):
    use(broken(host, right, wrong), monkeypatch)
    with pytest.raises(AssertionError, match="gradient of A"):
        compare_scan(scan_inputs(1, 40, 24, 16, torch.float16))


@at_end
def test_states_written_after_the_last_channel_are_found(host, monkeypatch):
    use(broken(host, "if (channel < channels) to[", "to["), monkeypatch)
    with pytest.raises(KernelFault, match=r"scan_forward.* after the end of argument 11, torch.float32 \[1, 8, 16\]"):
        cuda_selective_scan(**scan_inputs(1, 3, 8, 16, torch.float32))


@at_end
def test_a_combination_of_too_many_states_is_found(host, monkeypatch):
    reached, steps, A = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8), torch.randn(8, 16)
    shape = _Shape(torch.float32, batch=1, length=32, channels=8, states=16, segment_tiles=1)
    use(broken(host, "if (index >= channels * N) return;", ""), monkeypatch)
    with pytest.raises(KernelFault, match="scan_combine"):
        shape.at_segments(reached, steps, A, None, backwards=False)


@at_end
def test_adamw_of_too_many_elements_is_found(host, no_pinned_memory, monkeypatch):
    use(broken(host, "rest < CHUNK ? (int)rest : CHUNK", "CHUNK"), monkeypatch)
    ours, _ = guarded_optimizer(host, (3,))
    with pytest.raises(KernelFault, match="adamw"):
        ours.step()


@at_end
def test_a_missing_barrier_is_found(host, monkeypatch):
    use(broken(host, "__syncthreads();", ""), monkeypatch)
    with pytest.raises(AssertionError, match="gradient of weight"):
        compare_conv(conv_inputs(1, 128, 8, torch.float32))


@at_end
def test_a_barrier_that_not_all_threads_of_a_warp_reach_is_found(host, monkeypatch):
    use(broken(host, "__syncthreads();", "if (at.inside) __syncthreads(); else __syncwarp();"), monkeypatch)
    with pytest.raises(KernelFault, match="different barriers"):
        compare_conv(conv_inputs(1, 128, 8, torch.float32))


@pytest.mark.parametrize("host", [False], indirect=True, ids=["guarded-start"])
def test_memory_that_is_not_aligned_is_found(host):
    x = torch.randn(1, 3, 24).bfloat16()[..., 4:12]
    with pytest.raises(KernelFault, match="misaligned"):
        cuda_conv._Conv.apply(x, torch.randn(8, 4), torch.randn(8), None)


@at_end
def test_arguments_of_another_size_are_found(host, monkeypatch):
    use(broken(host, "int length, int channels,", "int64 length, int channels,"), monkeypatch)
    with pytest.raises(KernelFault, match="sizes are not the kernel's"):
        cuda_causal_conv_silu(**conv_inputs(1, 3, 8, torch.float32))
