"""Matrix products with fp32 weights against plain float64 ones, forward and every gradient."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.layers.linear import fuse_gradient_accumulation, linear, linear_beside, linear_parts, overwriting
from sambalm.parallel.zero.parameter_info import info_of
from tests.support.parameters import described
from tests.support.worlds import run_world

SIZES = ((5,), (2, 7))  # of the parts of each weight
ROWS = [sum(sizes) for sizes in SIZES]
PARTS = [size for sizes in SIZES for size in sizes]


def joined(x, *weights):
    return F.linear(x, torch.cat(weights))


FUNCTIONS = {
    "one weight": (lambda x, w, _: [linear(x, w)], lambda x, w, _: [joined(x, w)]),
    "parts": (lambda x, *w: linear_parts(x, *w, sizes=SIZES), lambda x, *w: joined(x, *w).split(PARTS, dim=-1)),
    "beside": (lambda x, w, _: linear_beside(x, w), lambda x, w, _: [x, joined(x, w)]),
}


def run(function, inputs, weights):
    outputs = function(*inputs)
    sum((output.double() * weight).sum() for output, weight in zip(outputs, weights, strict=True)).backward()
    return [*outputs, *(tensor.grad for tensor in inputs if tensor.grad is not None)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_linear(name, dtype, transposed):
    torch.manual_seed(0)
    function, reference = FUNCTIONS[name]
    # Of values that bf16 holds, so that only sums and outputs are rounded.
    x = torch.randn(7, 3, 11).bfloat16()
    x = x.transpose(0, 1) if transposed else x
    weights = [torch.randn(rows, 11).bfloat16().float() for rows in ROWS]
    inputs = [x.to(dtype), *weights]
    expected_inputs = [tensor.double().requires_grad_() for tensor in inputs]
    factors = [torch.randn(output.shape).bfloat16().double() for output in reference(*expected_inputs)]
    expected = run(reference, expected_inputs, factors)
    actual = run(function, [tensor.detach().requires_grad_() for tensor in inputs], factors)
    assert len(actual) == len(expected)
    outputs = len(factors)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        in_fp32 = dtype == torch.float32 or number > outputs  # a weight's gradient is never rounded
        assert a.dtype == (torch.float32 if in_fp32 else dtype)
        assert (a.double() - e).norm() / e.norm() < (1e-6 if in_fp32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_that_are_there_are_added_to(name, dtype):
    """Where they lie; two uses of a weight in one graph, and another one that is no product, add up as well."""
    torch.manual_seed(0)
    function, reference = FUNCTIONS[name]
    inputs = [torch.randn(7, 3, 11).bfloat16(), *(torch.randn(rows, 11).bfloat16().float() for rows in ROWS)]
    there = [torch.randn(rows, 11) for rows in ROWS]

    def gradients(function, x, *weights):
        for weight, gradient in zip(weights, there, strict=True):
            weight.grad = gradient.to(weight.dtype, copy=True)
        places = [weight.grad.data_ptr() for weight in weights]
        for _ in range(2):
            outputs = [*function(x, *weights), *function(x, *weights), *(weight * 3 for weight in weights)]
            sum(output.double().sum() for output in outputs).backward()
        assert [weight.grad.data_ptr() for weight in weights] == places
        return [weight.grad for weight in weights]

    expected = gradients(reference, *(tensor.double().requires_grad_() for tensor in inputs))
    leaves = [inputs[0].to(dtype).requires_grad_(), *(described(tensor.requires_grad_()) for tensor in inputs[1:])]
    fuse_gradient_accumulation(leaves[1:])
    for a, e in zip(gradients(function, *leaves), expected, strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - e).norm() / e.norm() < 1e-6


def test_gradients_are_left_alone_unless_they_are_to_be_added_to():
    weight = torch.randn(5, 11, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    (found,) = torch.autograd.grad(linear(torch.ones(2, 11), weight).sum(), weight)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.equal(found, torch.full_like(weight, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_overwrite_what_is_there_and_then_add(dtype):
    weights = [described(torch.randn(rows, 11).bfloat16().float().requires_grad_()) for rows in ROWS]
    xs = [torch.randn(7, 11).to(dtype) for _ in range(2)]
    fuse_gradient_accumulation(weights)
    assert not any(info_of(weight).has_product for weight in weights)
    for weight in weights:
        weight.grad = torch.full_like(weight, torch.nan)
    with overwriting(weights):
        for x in xs:
            sum(y.double().sum() for y in linear_parts(x, *weights, sizes=SIZES)).backward()
    assert all(info_of(weight).has_product for weight in weights)
    expected = sum(x.double().sum(0) for x in xs)
    for weight in weights:
        assert (weight.grad - expected).abs().max() < 1e-5


def test_a_gradient_of_the_step_before_is_refused():
    weights = [described(torch.randn(5, 11, requires_grad=True)) for _ in range(2)]
    fuse_gradient_accumulation(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match="1 weights have gradients of the step before"), overwriting(weights):
        linear(torch.randn(3, 11), weights[0]).sum().backward()


RANKS, TOKENS, WIDTH = 2, (4, 3), 11


def bf16_values(*shape):
    """Values that bf16 holds."""
    return torch.randn(shape, dtype=torch.float64).bfloat16().double()


def column_parallel(dtype, sequence):
    """A rank's norms of what it gets wrong, over the norms: outputs, x's gradient, its weights' gradients."""
    torch.manual_seed(0)
    rank = dist.get_rank()
    x, weight = bf16_values(*TOKENS, WIDTH), bf16_values(RANKS * sum(PARTS), WIDTH)
    factors = bf16_values(*TOKENS, RANKS * sum(PARTS))
    expected_inputs = [x.requires_grad_(), weight.requires_grad_()]
    expected = run(lambda *inputs: [F.linear(*inputs)], expected_inputs, [factors])

    tp = TensorParallel(rank=rank, size=RANKS, sequence=sequence, group=dist.group.WORLD)
    tokens = slice(rank * TOKENS[0] // RANKS, (rank + 1) * TOKENS[0] // RANKS) if sequence else slice(None)
    rows = slice(rank * sum(PARTS), (rank + 1) * sum(PARTS))
    own = [weight.detach()[rows].split(ROWS)[number].float().requires_grad_() for number in range(len(ROWS))]
    leaf = x.detach()[tokens].to(dtype).requires_grad_()
    parts = linear_parts(leaf, *own, sizes=SIZES, tp=tp)
    sum((y.double() * f).sum() for y, f in zip(parts, factors[..., rows].split(PARTS, dim=-1), strict=True)).backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in own)
    found = [torch.cat(parts, dim=-1), leaf.grad, torch.cat([tensor.grad for tensor in own])]
    wanted = [expected[0][..., rows], expected[1][tokens], expected[2][rows]]
    return [((a.double() - e).norm() / e.norm()).item() for a, e in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_parallel_ranks(dtype, sequence):
    rounding = 1e-6 if dtype == torch.float32 else 6e-3  # of the output, and of x's gradient before and in its sum
    for outputs, grad_x, grad_weight in run_world(column_parallel, dtype, sequence, ranks=RANKS):
        assert outputs < rounding
        assert grad_x < rounding
        assert grad_weight < 1e-6  # a weight's gradient is never rounded
