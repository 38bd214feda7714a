"""AdamW's kernel against torch's AdamW in float64: sizes and addresses of all kinds, clipping, decay, resumed steps."""

import pytest
import torch

from sambalm.model.ops.cuda.adamw import CHUNK, CudaAdamW
from sambalm.parallel.zero.compute_weights import ComputeWeights
from tests.support.parameters import described

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SIZES = (2, 3, 255, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 7)
SETTINGS = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def parameters(*, shift):
    """Tensors of SIZES within one buffer, so that most addresses are no multiples of 16 bytes, or each aligned."""
    if not shift:
        return [described(torch.randn(size, device="cuda", requires_grad=True)) for size in SIZES]
    buffer = torch.randn(sum(SIZES) + shift, device="cuda")[shift:]
    return [described(part.detach().requires_grad_()) for part in buffer.split(SIZES)]


def optimizers(weights):
    """Ours, and torch's of the same weights in float64; the first half of the weights decays."""
    doubles = [weight.detach().double().requires_grad_() for weight in weights]
    half = len(weights) // 2

    def groups(tensors):
        return [{"params": tensors[:half], "weight_decay": 0.3}, {"params": tensors[half:], "weight_decay": 0.0}]

    return CudaAdamW(groups(weights), **SETTINGS), torch.optim.AdamW(groups(doubles), **SETTINGS), doubles


def set_gradients(weights, doubles, *, scale=1.0):
    for weight, double in zip(weights, doubles, strict=True):
        weight.grad = torch.randn_like(weight) * 10.0 ** torch.randint(-4, 3, (), device="cuda")
        double.grad = weight.grad.double() / scale


def compare(weights, doubles, ours, other, *, tolerance=1e-5):
    for weight, double in zip(weights, doubles, strict=True):
        here, there = ours.state[weight], other.state[double]
        pairs = [(weight, double), *((here[key], there[key]) for key in ("exp_avg", "exp_avg_sq"))]
        for actual, expected in pairs:
            assert (actual.double() - expected).norm() / expected.norm() < tolerance
        assert here["step"].item() == there["step"].item()


@pytest.mark.parametrize("shift", [0, 1])
def test_several_steps(shift):
    weights = parameters(shift=shift)
    ours, other, doubles = optimizers(weights)
    for step in range(5):
        set_gradients(weights, doubles)
        for optimizer in (ours, other):
            for group in optimizer.param_groups:
                group["lr"] = SETTINGS["lr"] / (step + 1)
            optimizer.step()
    compare(weights, doubles, ours, other)


def test_gradients_are_divided_and_stay():
    weights = parameters(shift=0)
    ours, other, doubles = optimizers(weights)
    ours.grad_scale = torch.tensor(7.0, device="cuda")
    set_gradients(weights, doubles, scale=7.0)
    before = [weight.grad.clone() for weight in weights]
    ours.step()
    other.step()
    compare(weights, doubles, ours, other)
    assert all(torch.equal(weight.grad, gradient) for weight, gradient in zip(weights, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0, 1])
def test_rounded_copies_are_written(shift, dtype):
    weights = parameters(shift=shift)
    ours, other, doubles = optimizers(weights)
    copies = ComputeWeights(weights)
    with copies.kept():
        found = [copies.of((weight,), dtype) for weight in weights[1:]]
    set_gradients(weights, doubles)
    for optimizer in (ours, other):
        optimizer.step()
    compare(weights, doubles, ours, other)
    assert copies.written == set(weights[1:])
    assert all(torch.equal(copy, weight.to(dtype)) for copy, weight in zip(found, weights[1:], strict=True))


@pytest.mark.parametrize("kind", [CudaAdamW, torch.optim.AdamW])
def test_gradients_that_are_not_finite_are_skipped(kind):
    weights = parameters(shift=0)
    optimizer = kind(weights, **SETTINGS, fused=True)
    for number in range(3):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.found_inf = torch.full((), float(number == 2), device="cuda")
        if number == 2:
            before = [tensor.clone() for w in weights for tensor in (w, *optimizer.state[w].values())]
            weights[3].grad[7] = torch.inf
        optimizer.step()
    after = [tensor for w in weights for tensor in (w, *optimizer.state[w].values())]
    assert all(map(torch.equal, before, after))


def test_weights_without_a_gradient_stay():
    weights = parameters(shift=0)
    ours, other, doubles = optimizers(weights)
    set_gradients(weights, doubles)
    weights[1].grad = doubles[1].grad = None
    before = weights[1].clone()
    ours.step()
    other.step()
    assert torch.equal(weights[1], before)
    del weights[1], doubles[1]
    compare(weights, doubles, ours, other)


def test_gradients_with_other_strides():
    weight = torch.randn(65, 130, device="cuda", requires_grad=True)
    double = weight.detach().double().requires_grad_()
    weight.grad = torch.randn(130, 65, device="cuda").t()
    double.grad = weight.grad.double()
    ours, other = CudaAdamW([weight], **SETTINGS), torch.optim.AdamW([double], **SETTINGS)
    ours.step()
    other.step()
    compare([weight], [double], ours, other)


def test_a_step_hook_sets_the_scale():
    """Clipping sets it so (parallel/zero/clipping.py)."""
    weights = parameters(shift=0)
    ours, other, doubles = optimizers(weights)
    ours.register_step_pre_hook(lambda optimizer, *_: setattr(optimizer, "grad_scale", torch.full((), 3.0).cuda()))
    set_gradients(weights, doubles, scale=3.0)
    ours.step()
    other.step()
    compare(weights, doubles, ours, other)


def test_torch_goes_on_from_its_state():
    weights = parameters(shift=0)
    ours, other, doubles = optimizers(weights)
    set_gradients(weights, doubles)
    ours.step()
    other.step()
    resumed = torch.optim.AdamW(ours.param_groups, fused=True)
    resumed.load_state_dict(ours.state_dict())
    set_gradients(weights, doubles)
    resumed.step()
    other.step()
    compare(weights, doubles, resumed, other)
