"""Tensor and sequence parallelism against one process, by gradients: several mistakes leave the loss as it is."""

from collections.abc import Callable

import pytest
import torch
from worlds import run_world

from sambalm.model.config import ModelConfig
from sambalm.parallel.config import ParallelConfig

CONFIG = dict(hidden_size=48, num_query_heads=6, num_kv_heads=6, mlp_size=80, window=7, vocab_size=96)
GROUPED = CONFIG | dict(num_query_heads=12, num_kv_heads=2)


def no_copy_before_the_state_projection_feeds_each_rank(monkeypatch):
    from sambalm.model import layers

    monkeypatch.setattr(layers.StateProjection, "forward", _projection(copies=0))


def copied_twice(monkeypatch):
    from sambalm.model import layers

    monkeypatch.setattr(layers.StateProjection, "forward", _projection(copies=2))


def _projection(*, copies: int) -> Callable:
    import torch.nn.functional as F

    from sambalm.parallel.tensor_parallel import copy_to_region, reduce_from_region

    def forward(self, u):
        result = reduce_from_region(F.linear(u, self.weight), self.tp)
        for _ in range(copies):
            result = copy_to_region(result, self.tp)
        return result

    return forward


def plain_norm_under_sequence_parallelism(monkeypatch):
    from sambalm.model import layers

    monkeypatch.setattr(layers, "replicated_weight", lambda weight, tp: weight)


def gradients_on_rank(values: dict, layout: dict, mistake: Callable | None) -> tuple[float, list]:
    """Loss, and name, offsets and gradient of every canonical slice that this rank holds."""
    from sambalm.model.samba import Samba
    from sambalm.parallel.sharding import canonical_slices, initialize_parameters
    from sambalm.parallel.state import start_world

    with start_world(ParallelConfig(**layout)) as world, pytest.MonkeyPatch.context() as monkeypatch:
        if mistake:
            mistake(monkeypatch)
        model = Samba(ModelConfig(**values), tp=world.tensor)
        initialize_parameters(model, seed=5)
        tokens = torch.randint(0, values["vocab_size"], (2, 33), generator=torch.Generator().manual_seed(1))
        loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
        loss.backward()
        slices = [(n, s.offsets, s.of_local(p.grad).numpy()) for n, p, s in canonical_slices(model)]
    return loss.item(), slices


def single_process(values: dict) -> tuple[float, dict[str, torch.Tensor]]:
    ((loss, slices),) = run_world(gradients_on_rank, values, {}, None, ranks=1)
    return loss, {name: torch.from_numpy(gradient) for name, _, gradient in slices}


def compare(values: dict, layout: dict, mistake: Callable | None = None) -> tuple[float, float]:
    """Difference of the loss and the largest relative difference of a slice's gradient from one process."""
    expected_loss, expected = single_process(values)
    worst_loss = worst_gradient = 0.0
    seen = dict.fromkeys(expected, 0)
    for loss, slices in run_world(gradients_on_rank, values, layout, mistake, ranks=layout["tensor"]):
        worst_loss = max(worst_loss, abs(loss - expected_loss))
        for name, offsets, gradient in slices:
            region = tuple(slice(o, o + n) for o, n in zip(offsets, gradient.shape, strict=True))
            whole = expected[name]
            difference = (torch.from_numpy(gradient) - whole[region]).norm() / whole[region].norm()
            worst_gradient = max(worst_gradient, difference.item())
            seen[name] += gradient.size
    assert all(seen[name] >= whole.numel() for name, whole in expected.items()), "a part of a tensor is on no rank"
    return worst_loss, worst_gradient


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("values", "layout"),
    [
        (CONFIG, dict(tensor=2)),
        (CONFIG, dict(tensor=2, sequence=True)),
        (GROUPED, dict(tensor=2, sequence=True)),
        (CONFIG | dict(num_query_heads=8, num_kv_heads=4), dict(tensor=4, sequence=True)),
    ],
)
def test_every_gradient_equals_one_process(values, layout, tied):
    loss, gradient = compare(values | dict(pattern="M-*-M", tie_embeddings=tied), layout)
    assert loss < 1e-6
    assert gradient < 1e-5


@pytest.mark.parametrize(
    ("mistake", "layout"),
    [
        (no_copy_before_the_state_projection_feeds_each_rank, dict(tensor=2)),
        (copied_twice, dict(tensor=2)),
        (plain_norm_under_sequence_parallelism, dict(tensor=2, sequence=True)),
    ],
)
def test_known_mistakes_change_gradients_and_not_the_loss(mistake, layout):
    loss, gradient = compare(CONFIG | dict(pattern="M-*-"), layout, mistake)
    assert loss < 1e-6
    assert gradient > 0.1


def weights_on_rank(values: dict, layout: dict) -> list:
    from sambalm.model.samba import Samba
    from sambalm.parallel.sharding import canonical_slices, initialize_parameters
    from sambalm.parallel.state import start_world

    with start_world(ParallelConfig(**layout)) as world:
        model = Samba(ModelConfig(**values), tp=world.tensor)
        initialize_parameters(model, seed=5)
        return [(n, s.offsets, s.of_local(p.detach()).numpy()) for n, p, s in canonical_slices(model)]


def test_initial_weights_do_not_depend_on_the_layout():
    values = CONFIG | dict(pattern="M-*-", tie_embeddings=False)
    (whole,) = run_world(weights_on_rank, values, {}, ranks=1)
    expected = {name: torch.from_numpy(weight) for name, _, weight in whole}
    for slices in run_world(weights_on_rank, values, dict(tensor=2), ranks=2):
        for name, offsets, weight in slices:
            region = tuple(slice(o, o + n) for o, n in zip(offsets, weight.shape, strict=True))
            assert torch.equal(torch.from_numpy(weight), expected[name][region]), name


def reduce_transposed_gradient(_: None) -> float:
    """The gradient that arrives at copy_to_region from a transposed use."""
    from sambalm.parallel.state import start_world
    from sambalm.parallel.tensor_parallel import copy_to_region

    with start_world(ParallelConfig(tensor=2)) as world:
        x = torch.ones(3, 4, requires_grad=True)
        (copy_to_region(x, world.tensor).t() * torch.arange(12.0).view(4, 3)).sum().backward()
        return (x.grad / torch.arange(12.0).view(4, 3).t()).nanmean().item()


def test_a_gradient_that_is_not_contiguous_is_reduced_too():
    assert run_world(reduce_transposed_gradient, None, ranks=2) == [2.0, 2.0]
