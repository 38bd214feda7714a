"""What the adapter takes from DeepSpeed beyond its public interface is there, and does what the adapter says."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sambalm.parallel.config import ParallelConfig
from tests.support.deepspeed_contract import MEMBERS, breaches, owners
from tests.support.worlds import run_world

LR, ROWS, WIDTH = 0.25, 5, 3


class Without:
    """An object that lacks a member, or has another."""

    def __init__(self, whole: Any, name: str, **changed: Any) -> None:
        self._whole, self._name = whole, name
        self.__dict__.update(changed)

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._whole, name)


class Tiny(nn.Module):
    """A matrix that every tensor-parallel rank has a share of, and a vector that the first rank's copy counts of."""

    def __init__(self, *, first: bool) -> None:
        from sambalm.parallel.shard import Shard
        from sambalm.parallel.sharding import sharded_parameter

        super().__init__()
        self.matrix = sharded_parameter((0, WIDTH), {"m": Shard(ROWS, 0, ROWS)}, init=nn.init.ones_)
        self.vector = sharded_parameter((0,), {"v": Shard(WIDTH, 0, WIDTH)}, init=nn.init.ones_, owned=first)
        nn.init.ones_(self.matrix)
        nn.init.ones_(self.vector)

    def forward(self, factor: float) -> Tensor:
        return factor * (2 * self.matrix.sum() + 3 * self.vector.sum())


def tiny_engine(world):
    from sambalm.parallel.zero.engine import create_moments, zero_engine

    model = Tiny(first=world.tensor.rank == 0)
    groups = [{"params": [model.matrix]}, {"params": [model.vector]}]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.0)
    engine = zero_engine([model], optimizer, world=world, micro_batch_size=1)
    create_moments(engine, done_steps=0)
    return engine


def breaches_on_rank(stage: int) -> tuple[list[str], dict[tuple[str, str], list[list[str]]]]:
    """Sentences about this version's engine, and by member those about one that lacks it and one that has another."""
    from sambalm.parallel.groups import start_world

    with start_world(ParallelConfig()) as world:
        found = owners(tiny_engine(world))
        controls = {}
        for member in (member for member in MEMBERS if stage in member.stages):
            owner = found[member.owner]
            doubles = (Without(owner, member.name), Without(owner, "", **{member.name: Without(object(), "")}))
            controls[member.owner, member.name] = [
                list(breaches(found | {member.owner: double}, stage=stage)) for double in doubles
            ]
        return list(breaches(found, stage=stage)), controls


@pytest.mark.parametrize("stage", [0, 1])
def test_members_are_there(stage):
    for sentences, controls in run_world(breaches_on_rank, stage, ranks=2 if stage else 1):
        assert sentences == []
        assert len(controls) == sum(stage in member.stages for member in MEMBERS)
        for (owner, name), (lacking, other) in controls.items():
            assert [f"{owner}.{name} " in sentence for sentence in lacking] == [True], "one sentence names the member"
            assert "is gone" in lacking[0]
            assert "is no longer what it was" in other[0]


def steps_of_stage_1_on_rank() -> dict[str, Any]:
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.zero.deepspeed_adapter import ShardedOptimizer

    with start_world(ParallelConfig()) as world:
        engine = tiny_engine(world)
        optimizer = ShardedOptimizer(engine)
        matrix, vector = optimizer.flat_weights()
        optimizer.leave_gather()
        half = matrix.bfloat16()
        optimizer.replace_weights(0, half.chunk(2))
        calls = []

        def reduced():
            calls.append(world.rank)
            return [torch.ones_like(buffer.chunk(2)[world.rank]) for buffer in (matrix, vector)], torch.tensor(7.0)

        optimizer.replace_reduction(reduced)
        for _ in range(2):
            engine.step()
        return {
            "rank": world.rank,
            "calls": len(calls),
            "norm": float(engine.get_global_grad_norm()),
            "matrix": matrix.tolist(),
            "half": [share.unique().tolist() for share in half.chunk(2)],
            "vector": [share.unique().tolist() for share in vector.chunk(2)],
            "places": [list(group.offsets) for group in optimizer.groups],
        }


def test_stage_1_takes_gradients_and_leaves_weights_where_the_adapter_says():
    """AdamW's steps with a gradient of one are of the learning rate."""
    for result in run_world(steps_of_stage_1_on_rank, ranks=2):
        assert result["calls"] == 2
        assert result["norm"] == 7.0
        assert result["places"] == [[0], [0]]
        assert result["matrix"][: ROWS * WIDTH] == [1.0] * (ROWS * WIDTH)
        own, other = result["rank"], 1 - result["rank"]
        stepped = 1.0 - 2 * LR
        for shares in (result["half"], result["vector"]):
            assert any(value == pytest.approx(stepped, abs=1e-5) for value in shares[own])
            assert 1.0 not in shares[own]
            assert 1.0 in shares[other]


def gradient_without_zero_on_rank(leaves: bool) -> float:
    """A weight after a step with a gradient of this rank's own, of another sign on each, without ZeRO."""
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.zero import deepspeed_adapter

    with start_world(ParallelConfig()) as world:
        model = Tiny(first=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
        config = {"train_micro_batch_size_per_gpu": 1, "managed_gradient_accumulation": False}
        engine = deepspeed_adapter.start_engine(model, optimizer, config=config, timeout=world.timeout)
        if leaves:
            deepspeed_adapter.leave_gradients(engine)
        model(1.0 if world.rank else -1.0).backward()
        engine.step()
        return model.vector[0].item()


def test_an_engine_without_zero_reduces_nothing_once_it_is_told():
    assert run_world(gradient_without_zero_on_rank, True, ranks=2) == pytest.approx([1.0 + LR, 1.0 - LR])
    assert run_world(gradient_without_zero_on_rank, False, ranks=2) == pytest.approx([1.0, 1.0])
