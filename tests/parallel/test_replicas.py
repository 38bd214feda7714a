"""Weights that several ranks hold: one flipped bit on one rank is found and named, on a clean step nothing is."""

import pytest
import torch

from sambalm.parallel.replicas import Difference, _holders, position_factors, weights_hash
from tests.support.layout_runs import batches, run_values
from tests.support.worlds import run_world


def flip_bit(tensor: torch.Tensor, element: int, bit: int) -> None:
    """Flips one bit of an element in place."""
    bits = tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])
    place = tuple(int(n) for n in torch.unravel_index(torch.tensor(element), tensor.shape))
    flipped = torch.zeros_like(bits[place])
    flipped += 1
    bits[place] ^= flipped << bit


def on_rank(values: dict, bad_rank: int, name: str) -> tuple[list[str], bool, int, list[str], int]:
    """What a clean step's comparison found, and that of a step in which a rank holds one other bit."""
    from sambalm.model.registry import weight_copies
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.replicas import Replicas
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training
    from tests.parallel.test_host_waits import HostReads

    config = parse_config(values, source="test")
    with start_world(config.parallel, copies=weight_copies(config.model, tensor_ranks=config.parallel.tensor)) as world:
        training = build_training(config, world=world, checkpoint=None)
        replicas, guard = Replicas(training.chunks, world=world), training.executor.guard
        assert replicas.any
        found = []

        def compare():
            with HostReads() as reads:
                found.append((replicas.compare(), reads.count))

        guard.before_update.append(compare)
        training.executor.train_step(batches(0, config=config, world=world))

        def flip():
            held = next(tensor for key, tensor in zip(replicas.names, replicas._tensors, strict=True) if name in key)()
            flip_bit(held.data, 5, 0)

        if world.rank == bad_rank:
            guard.before_update.insert(0, flip)
        training.executor.train_step(batches(1, config=config, world=world))
        (clean, reads), (bad, _) = found
        names = [str(difference) for difference in replicas.differences(clean)]
        return names, bool(clean.differs), reads, [str(d) for d in replicas.differences(bad)], int(bad.differs)


LAYOUTS = {
    "data, a norm": (2, {"zero_stage": 1}, {}, "final_norm", "rank 0"),
    "data, compute weights": (2, {"zero_stage": 1}, {"precision": "bf16"}, "gate", "rank 0"),
    "data, ZeRO-2": (2, {"zero_stage": 2}, {}, "final_norm", "rank 0"),
    "tensor, a norm": (2, {"tensor": 2, "sequence": True}, {}, "final_norm", "rank 0"),
    "context": (2, {"context": 2}, {}, "embedding", "rank 0"),
    "pipeline, the tied embedding": (2, {"pipeline": 2}, {"model": {"tie_embeddings": True}}, "embedding", "rank 0"),
    # Ranks between the ends hold nothing that others hold.
    "pipeline, stages without a share": (
        4,
        {"pipeline": 4},
        {"model": {"tie_embeddings": True}},
        "embedding",
        "rank 0",
    ),
    "tensor, a copied kv head": (4, {"tensor": 4}, {}, "k.weight", "rank 2"),
    "tensor and data": (4, {"tensor": 2, "zero_stage": 1}, {}, "final_norm", "ranks 0, 1, 2"),
    "tensor and ZeRO-3": (4, {"tensor": 2, "zero_stage": 3}, {}, "final_norm", "ranks 0, 1, 2"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_flipped_bit_is_named_and_a_clean_step_is_not(layout):
    ranks, parallel, changes, name, others = LAYOUTS[layout]
    bad_rank = ranks - 1
    for names, differs, reads, found, bad in run_world(
        on_rank, run_values(parallel=parallel, **changes), bad_rank, name, ranks=ranks
    ):
        assert (names, differs, reads, bad) == ([], False, 0, 1)
        (only,) = found
        assert name in only
        assert f" {bad_rank}" in only
        assert others in only or ranks == 2


def test_the_hash_sees_any_flipped_bit_and_any_exchange():
    factors = position_factors(64, device=torch.device("cpu"))  # several chunks for the tensors below
    torch.manual_seed(0)
    for dtype, bits in ((torch.float32, 32), (torch.bfloat16, 16)):
        tensor = torch.randn(10, 20, dtype=dtype)
        hashes = {int(weights_hash(tensor, factors))}
        for element in range(200):
            for bit in range(bits):
                other = tensor.clone()
                flip_bit(other, element, bit)
                hashes.add(int(weights_hash(other, factors)))
        assert len(hashes) == 1 + 200 * bits
        assert int(weights_hash(tensor.flip(0), factors)) not in hashes
        assert weights_hash(tensor.t().contiguous().t(), factors) == weights_hash(tensor, factors)
    assert weights_hash(torch.zeros(3), factors) != weights_hash(-torch.zeros(3), factors)


def test_most_ranks_are_taken_to_be_right():
    found = [{"a": 5, "b": 1}, {"a": 7, "b": 1}, {"a": 5}, {"a": 5, "b": 2}, {"a": 8}]
    assert str(Difference("a", _holders("a", found))) == "a is not the same on rank 1 and rank 4 as on ranks 0, 2, 3"
    assert str(Difference("b", _holders("b", found))) == "b is not the same on rank 3 as on ranks 0, 1"
