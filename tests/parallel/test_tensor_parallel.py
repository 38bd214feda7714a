"""How tensor-parallel ranks share a model: who holds which heads and rows, and what that leaves as it was.

That gradients come out right is in test_layouts.
"""

from collections import Counter

import numpy as np
import pytest
import torch

from sambalm.model.config import ModelConfig
from sambalm.model.mixers.attention.heads import kv_copies, share_heads
from sambalm.model.registry import weight_copies
from sambalm.parallel.config import ParallelConfig
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.shard import equal_shard, shard
from sambalm.pretrain.check_layout import local_slices, whole
from tests.support.layout_runs import run_values
from tests.support.marks import slow_except
from tests.support.worlds import run_world


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("size", [8, 11, 64, 82, 300, 2732, 8196, 9984])
def test_shares_follow_one_another_and_fill_a_dimension(size, ranks):
    shares = [shard(size, TensorParallel(rank=rank, size=ranks)) for rank in range(ranks)]
    assert [share.start for share in shares] == list(np.cumsum([0] + [share.length for share in shares[:-1]]))
    assert sum(share.length for share in shares) == size
    lengths = [share.length for share in shares]
    assert lengths == sorted(lengths, reverse=True)  # the first rank has most of all, which plans count with
    assert lengths[0] - lengths[-1] < (32 if size >= 256 * ranks else 16)
    assert all(share.length > 0 for share in shares)
    if size % ranks and size >= 8 * ranks:
        assert all(share.start % 8 == 0 for share in shares), "matrix products want multiples of 8"
    assert all(share.held % 16 == 0 for share in shares if share.length >= 256), "and those in FP8 of 16"
    assert all(share.padding < (64 if share.length >= 4096 else 16) for share in shares)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("size", [50, 96, 2048, 32_000, 32_001, 50_257, 50_304])
def test_shares_of_a_vocabulary_are_held_alike_and_fill_it(size, ranks):
    shares = [equal_shard(size, TensorParallel(rank=rank, size=ranks)) for rank in range(ranks)]
    assert len({share.held for share in shares}) == 1
    assert [share.start for share in shares] == [rank * shares[0].held for rank in range(ranks)]
    assert sum(share.length for share in shares) == size
    assert all(share.length > 0 for share in shares)
    assert all(share.held % 16 == 0 for share in shares if size >= 256 * ranks)


@pytest.mark.parametrize(("size", "ranks"), [(9, 8), (6, 4)])  # three of 4 ranks would hold all 6
def test_a_vocabulary_of_which_a_rank_would_hold_nothing_is_refused(size, ranks):
    with pytest.raises(ValueError, match=f"{size} cannot be cut over {ranks}"):
        equal_shard(size, TensorParallel(rank=0, size=ranks))


def test_copies_of_a_slice_are_on_neighbouring_ranks():
    group = object()
    for rank, copy in enumerate((0, 1, 0, 1)):
        held = TensorParallel(rank=rank, size=4, copy_groups={2: group}).copies(2)
        assert (held.rank, held.size, held.group) == (copy, 2, group)
    assert TensorParallel(rank=3, size=4).copies(1) == TensorParallel()


HEADS = [(11, 1, 256), (12, 12, 128), (18, 18, 128), (32, 4, 64)]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(("query_heads", "kv_heads", "head_dim"), HEADS)
def test_each_query_head_is_on_one_rank_together_with_the_kv_head_that_it_reads(query_heads, kv_heads, head_dim, ranks):
    config = ModelConfig(
        pattern="*",
        hidden_size=query_heads * head_dim,
        num_query_heads=query_heads,
        num_kv_heads=kv_heads,
        mlp_size=1,
        window=1,
        vocab_size=8,
    )
    seen, owned, held, copies = [], [], Counter(), set()
    for rank in range(ranks):
        share = share_heads(config, TensorParallel(rank=rank, size=ranks))
        queries, keys = (_heads(part, head_dim) for part in (share.query, share.kv))
        seen += queries
        owned += keys if share.owns_kv else []
        # The kernel lets local query head h read local kv head h // (query heads / kv heads).
        local_group = len(queries) // len(keys)
        for number, query in enumerate(queries):
            assert keys[number // local_group] == query // (query_heads // kv_heads)
        held.update(keys)
        copies.add(share.kv_copies)
        assert share.kv_heads == len(keys)
    assert sorted(seen) == list(range(query_heads))
    assert sorted(owned) == list(range(kv_heads)), "one copy of each kv head counts"
    assert copies == set(held.values()) == {kv_copies(config, ranks)}


def _heads(part, head_dim):
    assert part.start % head_dim == part.length % head_dim == 0
    return list(range(part.start // head_dim, (part.start + part.length) // head_dim))


@pytest.mark.parametrize(("query_heads", "kv_heads", "ranks"), [(12, 2, 3), (8, 4, 6), (4, 2, 8), (11, 1, 12)])
def test_ranks_that_heads_cannot_be_dealt_to_are_refused(query_heads, kv_heads, ranks):
    sizes = {"hidden_size": 8 * query_heads, "num_query_heads": query_heads, "num_kv_heads": kv_heads}
    config = ModelConfig(pattern="M*", mlp_size=1, window=1, vocab_size=8, **sizes)
    with pytest.raises(ValueError, match=f"{query_heads} query heads with {kv_heads} kv heads .* {ranks} tensor"):
        kv_copies(config, ranks)


MODELS = {
    "3.8B": {"hidden_size": 44, "num_query_heads": 11, "num_kv_heads": 1, "mlp_size": 4 * 23},
    "1.3B": {"hidden_size": 36, "num_query_heads": 18, "num_kv_heads": 18, "mlp_size": 37},
    "1.7B": {"hidden_size": 64, "num_query_heads": 32, "num_kv_heads": 4, "mlp_size": 4 * 3 * 7},
}


def state_on_rank(values: dict, save_to: str | None, load: bool) -> dict:
    """Canonical slices of weights and moments: initial ones, or a checkpoint's; after one step when they are saved."""
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.zero.engine import whole_moment, whole_parameter
    from sambalm.pretrain.checkpointing.load import find_resume_point
    from sambalm.pretrain.checkpointing.write import save_checkpoint
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training
    from tests.support.layout_runs import batches

    config = parse_config(values, source="test")
    with start_world(config.parallel, copies=weight_copies(config.model, tensor_ranks=config.parallel.tensor)) as world:
        checkpoint = find_resume_point(config, world=world) if load else None
        assert (checkpoint is not None) == load
        training = build_training(config, world=world, checkpoint=checkpoint)
        if save_to:
            training.executor.train_step(batches(0, config=config, world=world))
            save_checkpoint(training.chunks, config=config, world=world, step=1, samples=0, data={})
        state = {"weights": local_slices(training.chunks, whole_parameter)}
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = local_slices(training.chunks, lambda parameter, key=key: whole_moment(parameter, key))
    return state


@pytest.mark.parametrize("ranks", slow_except([2], [2, 4, 8]))
@pytest.mark.parametrize("size", slow_except(["1.3B"], MODELS))
def test_initial_weights_do_not_depend_on_the_ranks(size, ranks):
    values = run_values(model=MODELS[size] | {"pattern": "M*-"})
    (expected,) = run_world(state_on_rank, values, None, False, ranks=1)
    results = run_world(state_on_rank, values | {"parallel": {"tensor": ranks}}, None, False, ranks=ranks)
    _assert_equal(results, expected, keys=["weights"])


@pytest.mark.parametrize("size", MODELS)
@pytest.mark.parametrize(("saved", "loaded"), slow_except([(2, 4)], [(4, 1), (2, 4), (8, 1)]))
def test_a_state_saved_on_some_ranks_is_the_same_on_others(size, saved, loaded, tmp_path):
    values = run_values(model=MODELS[size] | {"pattern": "M*-"}, run_dir=str(tmp_path))
    writers = run_world(state_on_rank, values | {"parallel": {"tensor": saved}}, str(tmp_path), False, ranks=saved)
    readers = run_world(state_on_rank, values | {"parallel": {"tensor": loaded}}, None, True, ranks=loaded)
    expected = {key: _joined([writer[key] for writer in writers]) for key in writers[0]}
    assert all(np.abs(tensor).max() > 0 for tensor in expected["exp_avg"].values())
    for reader in readers:
        for key, slices in reader.items():
            for name, offsets, values in slices:
                assert np.array_equal(values, expected[key][name][_region(offsets, values)]), (key, name)


def _joined(ranks: list) -> dict[str, np.ndarray]:
    """Whole tensors from the slices of all ranks; copies must agree."""
    wholes: dict[str, np.ndarray] = {}
    for name, offsets, values in (piece for slices in ranks for piece in slices):
        ends = [o + n for o, n in zip(offsets, values.shape, strict=True)]
        known = wholes.get(name, np.full([0] * values.ndim, np.nan, np.float32))
        larger = np.full([max(pair) for pair in zip(known.shape, ends, strict=True)], np.nan, np.float32)
        larger[tuple(slice(n) for n in known.shape)] = known
        before = larger[_region(offsets, values)]
        assert (np.isnan(before) | (before == values)).all(), f"copies of {name} differ"
        larger[_region(offsets, values)] = values
        wholes[name] = larger
    assert not any(np.isnan(tensor).any() for tensor in wholes.values())
    return wholes


def _region(offsets, values):
    return tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))


def _assert_equal(results: list[dict], expected: dict, *, keys: list[str]) -> None:
    for key in keys:
        joined, tensors = _joined([result[key] for result in results]), whole(expected[key])
        assert joined.keys() == tensors.keys()
        assert [name for name in tensors if not np.array_equal(joined[name], tensors[name])] == []


def reduce_transposed_gradient() -> float:
    """The gradient that arrives at copy_to_region from a transposed use."""
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.layers.tensor_parallel import copy_to_region

    with start_world(ParallelConfig(tensor=2)) as world:
        x = torch.ones(3, 4, requires_grad=True)
        (copy_to_region(x, world.tensor).t() * torch.arange(12.0).view(4, 3)).sum().backward()
        return (x.grad / torch.arange(12.0).view(4, 3).t()).nanmean().item()


def test_a_gradient_that_is_not_contiguous_is_reduced_too():
    assert run_world(reduce_transposed_gradient, ranks=2) == [2.0, 2.0]
