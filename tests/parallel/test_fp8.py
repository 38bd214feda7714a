"""Products in FP8: their arithmetic against float64, and whole steps of layouts against one process."""

import math

import pytest
import torch
import torch.distributed as dist

from sambalm.parallel.layers import fp8
from sambalm.parallel.layers.fp8 import FORMATS, GRADIENTS, INPUTS, Fp8Store
from sambalm.parallel.layers.fp8_rounding import round_both_ways
from sambalm.parallel.layers.linear import fuse_gradient_accumulation, linear, linear_parts, overwriting
from sambalm.parallel.shard import Shard
from sambalm.parallel.sharding import sharded_parameter
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from tests.support.layout_runs import run_values, steps_on_rank
from tests.support.marks import slow_except
from tests.support.worlds import run_world

E4M3, E5M2 = FORMATS


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_matrix_is_rounded_to_the_nearest_both_ways(dtype):
    torch.manual_seed(0)
    parts = [torch.randn(48, 32) * 20, torch.randn(48, 16) * 1e-3]
    scale, largest = torch.tensor(4.0), torch.tensor(0.0)
    rows, columns = round_both_ways(parts, scale, largest=largest, dtype=dtype)
    whole = torch.cat(parts, dim=1)
    assert largest == whole.abs().max()
    assert torch.equal(columns.float(), rows.float().t())
    assert rows.is_contiguous()
    assert columns.is_contiguous()
    exponent = torch.floor(torch.log2(4 * whole.abs())).clamp(min=math.log2(torch.finfo(dtype).smallest_normal))
    half_a_step = 0.5 * torch.finfo(dtype).eps * 2**exponent
    assert ((rows.float() - 4 * whole).abs() <= half_a_step).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_a_format_cannot_hold_is_its_largest_and_nan_stays(dtype):
    values = torch.tensor([[1e9, -1e9, math.inf, math.nan]])
    rows, _ = round_both_ways([values], torch.tensor(1.0), largest=None, dtype=dtype)
    limit = torch.finfo(dtype).max
    assert rows.float()[0, :3].tolist() == [limit, -limit, limit]
    assert rows.float()[0, 3].isnan()


def weights_in_fp8(*sizes, width):
    """Parameters [size, width] that take FP8, and their store."""
    parameters = []
    for size in sizes:
        parameter = sharded_parameter(
            (0, width), {"w": Shard(size, 0, size)}, init=torch.nn.init.zeros_, takes_fp8=True
        )
        torch.nn.init.normal_(parameter)
        parameters.append(parameter)
    store = Fp8Store(parameters, groups=[], device=torch.device("cpu"))
    return parameters, store


def taken_steps(parameters, store, x, gradient, *, steps=2):
    """The last step's output and gradients; the first finds the scales."""
    fuse_gradient_accumulation(parameters)
    for _ in range(steps):
        x.grad = None
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        with store.kept(), store.renewing():
            sizes = [[16, len(parameters[0]) - 16], *([len(p)] for p in parameters[1:])]
            outputs = linear_parts(x, *parameters, sizes=sizes)
            y = torch.cat(outputs, dim=-1)
            y.backward(gradient)
        store.finish_step()
    return y.detach(), x.grad, torch.cat([parameter.grad for parameter in parameters])


def rounded(tensor, dtype, *, margin):
    """In float64 what a tensor is in FP8, by the scale of its own largest number."""
    limit = torch.finfo(dtype).max / margin
    scale = 2.0 ** math.floor(math.log2(limit / tensor.abs().max().item()))
    return (tensor.double() * scale).to(dtype).double() / scale


def test_products_are_those_of_rounded_matrices():
    torch.manual_seed(1)
    parameters, store = weights_in_fp8(48, 32, width=64)
    x, gradient = torch.randn(3, 16, 64, requires_grad=True), torch.randn(3, 16, 80) * 1e-4
    y, grad_x, grad_weight = taken_steps(parameters, store, x, gradient)
    w8 = rounded(torch.cat(parameters).detach(), E4M3, margin=fp8.MARGIN)
    x8 = rounded(x.detach().flatten(0, 1), E4M3, margin=fp8.MARGIN)
    g8 = rounded(gradient.flatten(0, 1), E5M2, margin=fp8.MARGIN)
    for found, expected in ((y, x8 @ w8.t()), (grad_x, g8 @ w8), (grad_weight, g8.t() @ x8)):
        torch.testing.assert_close(found.double().reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


def test_the_first_step_is_not_in_fp8_and_the_scales_come_from_it():
    torch.manual_seed(2)
    parameters, store = weights_in_fp8(32, width=48)
    x, gradient = torch.randn(16, 1, 48, requires_grad=True), torch.randn(16, 1, 32)
    y, grad_x, _ = taken_steps(parameters, store, x, gradient, steps=1)
    torch.testing.assert_close(y, x.detach() @ parameters[0].detach().t())
    torch.testing.assert_close(grad_x, gradient @ parameters[0].detach())
    for kind, tensor in ((INPUTS, x), (GRADIENTS, gradient)):
        reach = torch.finfo(FORMATS[kind]).max / store.scales[0, kind]
        assert fp8.MARGIN <= reach / tensor.abs().max() < 2 * fp8.MARGIN
        assert store.inverses[0, kind] * store.scales[0, kind] == 1


def test_ranks_send_and_cublas_takes_numbers_where_they_lie():
    _, store = weights_in_fp8(32, 32, width=48)
    assert store.largest.is_contiguous()  # NCCL sends nothing else
    assert {store.inverses[n, kind].data_ptr() % 16 for n in range(2) for kind in (INPUTS, GRADIENTS)} == {0}


def test_scales_are_those_of_the_largest_number_of_any_rank(monkeypatch):
    _, store = weights_in_fp8(32, width=48)
    store.groups = ["replicas", "tensor"]
    others = {"replicas": torch.tensor([[3.0, 1.0]]), "tensor": torch.tensor([[1.0, 6.0]])}  # ranks of each, as if

    def all_reduce(tensor, op=dist.ReduceOp.SUM, *, group):
        tensor.copy_(torch.maximum(tensor, others[group]) if op == dist.ReduceOp.MAX else tensor + others[group])

    monkeypatch.setattr(fp8.dist, "all_reduce", all_reduce)
    store.largest.copy_(torch.tensor([[2.0, 2.0]]))
    store.finish_step()
    for kind, largest in ((INPUTS, 3.0), (GRADIENTS, 6.0)):
        scale = 2.0 ** math.floor(math.log2(torch.finfo(FORMATS[kind]).max / fp8.MARGIN / largest))
        assert store.scales[0, kind] == scale
    assert store.largest.max() == 0, "the step after next is to know nothing of this one"


def test_validation_tells_the_next_step_nothing():
    parameters, store = weights_in_fp8(32, width=48)
    x = torch.randn(16, 1, 48, requires_grad=True)
    taken_steps(parameters, store, x, torch.randn(16, 1, 32))
    with torch.no_grad():
        linear(100 * x, parameters[0])
    assert store.largest.max() == 0


def test_weights_are_rounded_once_a_step_and_anew_outside(monkeypatch):
    parameters, store = weights_in_fp8(32, width=48)
    x = torch.randn(16, 1, 48)
    taken_steps(parameters, store, x.requires_grad_(), torch.randn(16, 1, 32))
    rounds, round_ = [], fp8.round_both_ways
    monkeypatch.setattr(
        fp8, "round_both_ways", lambda parts, *a, **o: (rounds.append(parts[0].shape), round_(parts, *a, **o))[1]
    )

    def outputs(times):
        return [linear(x.detach(), parameters[0]).detach() for _ in range(times)]

    with store.kept():
        with store.renewing():
            first = outputs(2)
        place = store.weights[0].rows.data_ptr()
        with torch.no_grad():
            parameters[0].mul_(2)
        later = outputs(2)  # a step's other micro-batches
    assert rounds.count(torch.Size([32, 48])) == 1
    assert all(torch.equal(y, first[0]) for y in (*first, *later))
    torch.testing.assert_close(outputs(1)[0], 2 * first[0])  # validation after the step
    with store.kept(), store.renewing():
        (y,) = outputs(1)
    torch.testing.assert_close(y, 2 * first[0])
    assert store.weights[0].rows.data_ptr() == place, "CUDA graphs look for the weight where it was"


def test_a_gradient_is_written_over_or_added_to():
    parameters, store = weights_in_fp8(32, width=48)
    x, gradient = torch.randn(16, 1, 48, requires_grad=True), torch.randn(16, 1, 32)
    *_, once = taken_steps(parameters, store, x, gradient)
    (parameter,) = parameters
    for written_over, expected in ((True, once), (False, once + 5)):
        parameter.grad = torch.full_like(parameter, 5.0)
        with store.kept(), overwriting(parameters if written_over else []):
            linear(x, parameter).backward(gradient)
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize(("rows", "features", "width"), [(16, 32, 40), (16, 40, 32), (24, 32, 32)])
def test_sizes_that_fp8_products_do_not_take_are_multiplied_as_they_are(rows, features, width):
    (parameter,), store = weights_in_fp8(features, width=width)
    store.is_new = False
    x = torch.randn(rows, 1, width)
    assert torch.equal(linear(x, parameter), x @ parameter.t())


SIZES = {"hidden_size": 64, "num_query_heads": 4, "num_kv_heads": 2, "mlp_size": 128}
SP2 = {"tensor": 2, "sequence": True}
LAYOUTS = {
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, SP2),
    "TP4+SP": (4, {"tensor": 4, "sequence": True}),
    "CP2": (2, {"context": 2}),
    "PP2xVPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "DP2, ZeRO-1": (2, {"zero_stage": 1}),
    "DP2, ZeRO-2": (2, {"zero_stage": 2}),
    "DP2xTP2+SP": (4, SP2 | {"zero_stage": 1}),
    "alone, full": (1, {"recompute": "full"}),
    "alone, selective": (1, {"recompute": "selective"}),
}


def fp8_values(parallel, **train):
    values = run_values(model=SIZES, parallel=parallel)
    return values | {"train": values["train"] | {"matmul_precision": "fp8"} | train}


@pytest.fixture(scope="module")
def one_process():
    (steps,) = run_world(steps_on_rank, fp8_values({}), 6, ranks=1)
    return steps


@pytest.mark.parametrize("name", slow_except(["TP2+SP", "PP2xVPP2", "DP2, ZeRO-1"], LAYOUTS))
def test_a_layout_takes_the_steps_of_one_process(name, one_process):
    """Later steps are those of weights a little different: a number between two others in FP8 goes to either."""
    ranks, parallel = LAYOUTS[name]
    for result in run_world(steps_on_rank, fp8_values(parallel), 6, ranks=ranks):
        assert result.losses[:2] == pytest.approx(one_process.losses[:2], rel=1e-4)
        # The second step is the first in FP8. Ranks round gradients of copies of a kv head apart, and then sum them.
        assert result.norms[:2] == pytest.approx(one_process.norms[:2], rel=5e-3)
        assert result.losses == pytest.approx(one_process.losses, rel=2e-3)
        assert result.norms == pytest.approx(one_process.norms, rel=3e-2)


def test_fp8_is_no_other_precision(one_process):
    (exact,) = run_world(steps_on_rank, run_values(model=SIZES), 6, ranks=1)
    assert exact.losses[0] == one_process.losses[0]
    distance = max(abs(a - b) for a, b in zip(exact.losses, one_process.losses, strict=True))
    assert 1e-3 < distance < 0.05


def gradients_are_scaled_by_inputs(monkeypatch):
    round_ = fp8.ProductScales.round
    monkeypatch.setattr(fp8.ProductScales, "round", lambda self, parts, kind, **o: round_(self, parts, INPUTS, **o))


def test_known_mistakes_are_seen(one_process):
    (result,) = run_world(steps_on_rank, fp8_values({}), 6, gradients_are_scaled_by_inputs, ranks=1)
    assert result.norms[1] != pytest.approx(one_process.norms[1], rel=5e-3)


def test_zero_3_takes_no_fp8():
    parse_config(fp8_values({"zero_stage": 2}), source="test").check_world(2)
    config = parse_config(fp8_values({"zero_stage": 3}), source="test")
    config.check_world(1)
    with pytest.raises(
        ConfigError, match=r"train.matmul_precision is 'fp8', which parallel.zero_stage 3 does not take"
    ):
        config.check_world(2)


def test_only_large_products_take_fp8():
    from sambalm.model.config import ModelConfig
    from sambalm.model.samba import Samba

    model = Samba(ModelConfig(pattern="M*-", window=4, vocab_size=64, **SIZES))
    named = {name for name, parameter in model.named_parameters() if info_of(parameter).takes_fp8}
    kinds = {"0.mixer.in_proj", "0.mixer.out_proj", "1.mixer.qkv_proj", "1.mixer.o_proj"}
    kinds |= {"2.mixer.gate_up_proj", "2.mixer.down_proj"}
    assert {name.removeprefix("layers.").rpartition(".")[0] for name in named} == kinds
