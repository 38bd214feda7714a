"""Every CUDA kernel that can be chosen, against the PyTorch reference in float64: forward and every gradient."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from sambalm.model.ops.config import KernelConfig
from sambalm.model.ops.documents import Documents
from sambalm.model.ops.errors import KernelError
from sambalm.model.ops.implementations import KernelRequirements
from sambalm.model.ops.reference.causal_conv import causal_conv_silu
from sambalm.model.ops.reference.elementwise import swiglu
from sambalm.model.ops.reference.rms_norm import add_rms_norm
from sambalm.model.ops.reference.selective_scan import gated_selective_scan
from sambalm.model.ops.reference.window_attention import apply_rotary, rotary_tables, window_attention
from sambalm.model.ops.registry import build_kernels, why_unavailable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda")
# Of bf16 inputs and outputs, relative to the norm: rounding alone is 2e-3.
TOLERANCE = 1e-2
CONV_SIZES = [(2, 512, 256), (3, 77, 96), (1, 3, 64), (2, 300, 1304)]


def kernel(operation, name, **more):
    requirements = KernelRequirements("cuda", "bf16", **more)
    reason = why_unavailable(operation, name, requirements)
    if reason:
        pytest.skip(f"{name}: {reason}")
    return getattr(build_kernels(KernelConfig(**{operation: name}), requirements), operation)


def check(function, reference, inputs, *, fp32=()):
    """function on bf16 inputs (those numbered in fp32 excepted) against reference on the same values in float64."""
    rounded = [t.cuda() if i in fp32 else t.cuda().bfloat16() for i, t in enumerate(inputs)]
    actual_inputs = [t.detach().requires_grad_() for t in rounded]
    expected_inputs = [t.detach().double().requires_grad_() for t in rounded]
    actual, expected = function(*actual_inputs), reference(*expected_inputs)
    assert relative(actual, expected) < TOLERANCE
    weight = torch.randn_like(expected)
    (actual * weight.to(actual.dtype)).sum().backward()
    (expected * weight.to(actual.dtype).double()).sum().backward()
    for number, (a, e) in enumerate(zip(actual_inputs, expected_inputs, strict=True)):
        assert relative(a.grad, e.grad) < TOLERANCE, f"gradient of input {number}"


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("name", ["cuda", "mamba-ssm"])
@pytest.mark.parametrize(("batch", "length", "channels"), [(2, 512, 256), (1, 1000, 64), (3, 77, 96)])
def test_scan(name, batch, length, channels):
    scan = kernel("scan", name)
    inputs = (
        torch.randn(batch, length, channels),
        torch.randn(batch, length, channels),
        torch.arange(1, 17).log().repeat(channels, 1),
        torch.randn(batch, length, 16),
        torch.randn(batch, length, 16),
        torch.ones(channels),
        torch.randn(batch, length, channels),
        torch.randn(channels) - 3,
    )

    def run(implementation):
        def function(u, dt, a_log, B, C, D, z, bias):
            return implementation(u, dt, -torch.exp(a_log), B, C, D=D, z=z, dt_bias=bias)[0]

        return function

    check(run(scan), run(gated_selective_scan), inputs, fp32=(2, 5, 7))


@pytest.mark.parametrize("name", ["cuda", "causal-conv1d"])
@pytest.mark.parametrize(("batch", "length", "channels"), CONV_SIZES)
def test_conv(name, batch, length, channels):
    conv = kernel("conv", name)
    inputs = (torch.randn(batch, length, channels), torch.randn(channels, 4), torch.randn(channels))
    check(conv, causal_conv_silu, inputs, fp32=(1, 2))


def documents(batch, length):
    """Documents in three sizes, others in each row, of which some are shorter than a kernel's block."""
    begins = torch.stack([(torch.arange(length) * (row + 1)) % 97 == 0 for row in range(batch)])
    begins |= torch.arange(length) == length // 2
    return Documents((torch.arange(length) * begins).cummax(1).values, first=0, device=DEVICE)


@pytest.mark.parametrize("name", ["cuda", "causal-conv1d"])
@pytest.mark.parametrize(("batch", "length", "channels"), CONV_SIZES)
def test_conv_of_packed_documents(name, batch, length, channels):
    conv, resets = kernel("conv", name), documents(batch, length).resets
    inputs = (torch.randn(batch, length, channels), torch.randn(channels, 4), torch.randn(channels))
    check(*(partial(f, resets=resets) for f in (conv, causal_conv_silu)), inputs, fp32=(1, 2))


@pytest.mark.parametrize("name", ["flex", "torch-flash", "flash-attn"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "queries", "before", "window"),
    [(12, 12, 128, 700, 0, 256), (11, 1, 256, 333, 60, 100), (4, 2, 64, 130, 255, 256), (4, 2, 64, 130, 500, 256)],
)
def test_attention_of_packed_documents(name, heads, kv_heads, head_dim, queries, before, window):
    attention, length = kernel("attention", name, resets=True), before + queries
    packed = documents(2, length).attention(range(before, length), keys_before=before)
    shapes = ((2, heads, queries, head_dim), *(2 * [(2, kv_heads, length, head_dim)]))
    run = [lambda *t, f=f: f(*t, window=window, documents=packed) for f in (attention, window_attention)]
    check(*run, [torch.randn(shape) for shape in shapes])


def test_attention_that_cannot_keep_documents_apart_says_so():
    attention, packed = kernel("attention", "cudnn"), documents(2, 40).attention(range(40), keys_before=0)
    q, k, v = (torch.randn(2, 4, 40, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    with pytest.raises(KernelError, match="packed documents"):
        attention(q, k, v, window=8, documents=packed)


@pytest.mark.parametrize("name", ["cudnn", "flex", "torch-flash", "flash-attn"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "length", "window"),
    [(12, 12, 128, 700, 256), (11, 1, 256, 333, 100), (32, 4, 64, 600, 2048), (18, 18, 128, 513, 64)],
)
def test_attention(name, heads, kv_heads, head_dim, length, window):
    attention = kernel("attention", name)
    # As the layers give them: views of sequence-first memory.
    shapes = ((length, 2, heads, head_dim), *(2 * [(length, 2, kv_heads, head_dim)]))

    def run(implementation):
        return lambda *t: implementation(*(x.permute(1, 2, 0, 3) for x in t), window=window)

    check(run(attention), run(window_attention), [torch.randn(shape) for shape in shapes])


@pytest.mark.parametrize("name", ["cudnn", "flex", "torch-flash", "flash-attn"])
@pytest.mark.parametrize(("queries", "before"), [(130, 1), (130, 63), (130, 255), (127, 127), (1, 255)])
def test_attention_with_keys_from_before_the_first_query(name, queries, before):
    attention = kernel("attention", name)
    shapes = ((2, 4, queries, 64), *(2 * [(2, 2, queries + before, 64)]))
    run = [lambda *t, f=f: f(*t, window=256) for f in (attention, window_attention)]
    check(*run, [torch.randn(shape) for shape in shapes])


@pytest.mark.parametrize("name", ["compiled", "apex"])
@pytest.mark.parametrize("has_branch", [True, False])
def test_norm(name, has_branch):
    norm = kernel("norm", name)
    inputs = [torch.randn(64, 3, 1536), torch.randn(64, 3, 1536) / 8, torch.rand(1536) + 0.5]
    if has_branch:
        run = [lambda x, y, w, f=f: torch.cat(f(x, y, w, eps=1e-5)) for f in (norm, add_rms_norm)]
    else:
        run = [lambda x, w, f=f: torch.cat(f(x, None, w, eps=1e-5)) for f in (norm, add_rms_norm)]
        inputs = inputs[::2]
    check(*run, inputs, fp32=(len(inputs) - 1,))


def test_compiled_swiglu():
    fused = kernel("elementwise", "compiled").swiglu
    # Halves of one tensor, as the layer has them.
    check(*(lambda x, f=f: f(*x.chunk(2, dim=-1)) for f in (fused, swiglu)), [torch.randn(64, 3, 2 * 683)])


def test_compiled_rotary():
    fused, tables = kernel("elementwise", "compiled").rotary, rotary_tables(torch.arange(70), head_dim=64, base=1e4)
    tables = [t.to(DEVICE) for t in tables]
    check(
        *(lambda x, f=f: f(x.permute(1, 2, 0, 3), *tables) for f in (fused, apply_rotary)), [torch.randn(70, 2, 3, 64)]
    )


@pytest.mark.parametrize("rows", [1000, 1008])
def test_compiled_losses(rows):
    """Rows beyond the vocabulary, however large their logits, neither change a loss nor get a gradient."""
    fused, labels = kernel("elementwise", "compiled").token_losses, torch.randint(0, 1000, (77,), device=DEVICE)
    check(
        lambda x: fused(x, labels, 1000),
        lambda x: F.cross_entropy(x[:, :1000], labels, reduction="none"),
        [torch.randn(77, rows) * 3],
    )


def test_a_model_with_the_fastest_kernels_has_the_losses_of_the_reference():
    from sambalm.model.config import ModelConfig
    from sambalm.model.samba import Samba
    from sambalm.parallel.sharding import initialize_parameters

    config = ModelConfig(
        pattern="M-*- x 2",
        hidden_size=512,
        num_query_heads=4,
        num_kv_heads=2,
        mlp_size=1024,
        window=128,
        vocab_size=512,
    )
    tokens = torch.randint(0, 512, (2, 513), device=DEVICE)
    losses, gradients = {}, {}
    for choice in ("auto", "torch"):
        names = KernelConfig(**dict.fromkeys(KernelConfig.model_fields, choice))
        kernels = build_kernels(names, KernelRequirements("cuda", "bf16"))
        with DEVICE:
            model = Samba(config, kernels=kernels, dtype=torch.bfloat16)
        initialize_parameters(model, seed=0)
        losses[choice] = model(tokens[:, :-1], tokens[:, 1:]).mean()
        losses[choice].backward()
        gradients[choice] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert abs(losses["auto"] - losses["torch"]) < 2e-3
    for name, expected in gradients["torch"].items():
        assert F.cosine_similarity(gradients["auto"][name].flatten(), expected.flatten(), dim=0) > 0.99, name


def test_a_norm_stays_compiled_for_what_training_validation_and_evaluation_bring():
    norm = build_kernels(KernelConfig(norm="compiled"), KernelRequirements("cuda", "bf16")).norm
    weight = torch.ones(64, device=DEVICE, requires_grad=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            for batch, length in ((4, 128), (2, 256), (1, 512), (8, 1)):
                x = torch.randn(batch, length, 64, device=DEVICE).bfloat16()
                for stream in (x, x.float()):
                    for branch in (None, x):
                        with mode():
                            norm(stream, branch, weight, eps=1e-5)
