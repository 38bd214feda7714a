"""What the planner counts against real runs on the CPU: parameters, bytes that are kept, and messages."""

import gc
from dataclasses import replace

import pytest
import torch

from sambalm.model.registry import weight_copies
from sambalm.model.samba import Samba
from sambalm.parallel.groups import TensorParallel
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.gradient_buckets import gradient_buckets
from sambalm.pretrain.optimizer import BUCKET_ELEMENTS
from sambalm.pretrain.planner.buckets import ReducedGroup, reduced_groups
from sambalm.pretrain.planner.kernels import TORCH_ON_CPU
from sambalm.pretrain.planner.memory import chunks_in_flight, stage_memories
from sambalm.pretrain.planner.sizes import stage_chunks, stage_parameters
from tests.support.counted_ranks import counted_activations, handed_on_rank, kept_on_rank
from tests.support.marks import slow_except
from tests.support.mixers import assert_keeps_what_it_says, assert_sends_what_it_says
from tests.support.plan_counters import LiveBytes
from tests.support.planned_runs import config_of
from tests.support.worlds import run_world


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "model",
    [
        {"pattern": "M-*- x 2"},
        {"pattern": "M-", "d_state": 8},
        {"pattern": "*-", "num_kv_heads": 4, "window": 200},
        {"pattern": "M*", "num_kv_heads": 1, "mlp_size": 40},
        {"pattern": "=F-", "mixers": {"mlp2": {"size": 77}}},
        {"pattern": "F*", "rope_base": None},
        {"pattern": "G-", "mixers": {"gated_deltanet": {"num_heads": 5, "head_dim": 12}}},
        {"pattern": "K-", "mixers": {"kimi_delta": {"num_heads": 3, "head_dim": 24}}},
        {"pattern": "A-", "mixers": {"gla": {"num_heads": 5, "head_dim": 12}}},
        {"pattern": "R-", "mixers": {"retnet": {"num_heads": 3, "head_dim": 24}}},
    ],
    ids=lambda model: model["pattern"],
)
def test_activations_are_what_a_real_run_keeps(model, precision, recompute):
    config = config_of(parallel={"recompute": recompute}, train={"precision": precision}, **model)
    kept, peak = counted_activations(config)
    memory, *_ = stage_memories(config, world_size=1, kernels=TORCH_ON_CPU)
    saved = memory.rounded_bytes + memory.saved_bytes  # a model alone keeps no copies of its weights
    assert saved == pytest.approx(kept, rel=0.02)
    assert saved + memory.workspace_bytes == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("precision", slow_except(["bf16"], ["bf16", "fp32"]))
@pytest.mark.parametrize(
    "parallel",
    slow_except(
        [{"tensor": 2, "sequence": True}, {"context": 4}],
        [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"context": 2}, {"context": 4}],
    ),
    ids=str,
)
def test_activations_of_layouts_are_what_a_real_rank_keeps(parallel, precision, recompute):
    config = config_of(parallel=parallel | {"recompute": recompute}, train={"precision": precision})
    ranks = config.parallel.model_ranks
    kept = run_world(kept_on_rank, config.model_dump(), ranks=ranks)
    assert_keeps_what_it_says(config, kept, kernels=TORCH_ON_CPU, tolerance=0.05)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "parallel",
    [{}, {"tensor": 2}, {"tensor": 4}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2}],
    ids=str,
)
def test_parameters_are_those_of_the_real_parts(parallel, tied):
    config = config_of(parallel=parallel, tie_embeddings=tied, mlp_size=100)
    tensor = TensorParallel(rank=0, size=config.parallel.tensor, copy_groups={2: None})
    for stage, parts in enumerate(stage_chunks(config)):
        with torch.device("meta"):
            modules = [Samba(config.model, layers=part, tp=tensor) for part in parts]
        count = sum(p.numel() for module in modules for p in module.parameters())
        assert stage_parameters(config, stage) == count


def states_on_rank(values: dict) -> tuple[int, int, int]:
    """Live bytes before a step, between a step's micro-batches and after it, without DeepSpeed's bucket."""
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.micro_batch import MicroBatch
    from sambalm.pretrain.training import build_training

    config, counts = RunConfig.model_validate(values), []

    def count(*_) -> None:
        gc.collect()
        counts.append(live.now_bytes % (4 * 500_000_000))

    with start_world(config.parallel) as world, LiveBytes() as live:
        training = build_training(config, world=world, checkpoint=None)
        training.chunks[0].register_forward_pre_hook(count)
        tokens = torch.randint(0, 64, (config.train.micro_batch_size, config.data.sequence_length))
        micro_batches = config.accumulation_steps(data_size=world.data_size)
        training.executor.train_step([MicroBatch(tokens, tokens)] * micro_batches)
        count()
    return counts[0], counts[1], counts[2]


STATES = [(stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2)]


@pytest.mark.parametrize(("stage", "ranks"), slow_except([], STATES, long=[(1, 1), (2, 1), (2, 2), (3, 1)]))
def test_states_are_what_deepspeed_holds(stage, ranks):
    train = {"global_batch_tokens": 2 * 2 * ranks * 192}
    config = config_of(
        parallel={"zero_stage": stage}, train=train, pattern="M-*- x 2", hidden_size=256, mlp_size=512, vocab_size=4096
    )
    memory, *_ = stage_memories(config, world_size=ranks, kernels=TORCH_ON_CPU)
    for before, between, after in run_world(states_on_rank, config.model_dump(), ranks=ranks):
        # Before the first gradient: ranks have room for theirs, and rounded weights; a rank alone has none.
        flat = memory.gradients_bytes + memory.rounded_bytes if ranks > 1 else 0
        assert before == pytest.approx(memory.weights_bytes + flat + memory.optimizer_bytes, rel=0.1)
        assert between == pytest.approx(memory.state_bytes, rel=0.1)
        assert after <= memory.state_bytes * 1.1


LAYOUTS = [
    (2, {"zero_stage": 1}),
    (2, {"zero_stage": 2}),
    (2, {"zero_stage": 3}),
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"tensor": 2, "sequence": True, "recompute": "full"}),
    (4, {"tensor": 4}),
    (4, {"tensor": 2, "zero_stage": 2}),
    (2, {"context": 2}),
    (2, {"context": 2, "recompute": "full"}),
    (2, {"pipeline": 2}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
]


# In `make test` TP2 + SP and PP2.
@pytest.mark.parametrize(("ranks", "parallel"), slow_except([LAYOUTS[4], LAYOUTS[10]], LAYOUTS), ids=str)
def test_communication_is_what_a_real_step_hands_over(ranks, parallel):
    train = {"global_batch_tokens": 8 * 192}  # two micro-batches of two replicas
    config = config_of(parallel=parallel, train=train, hidden_size=128, mlp_size=256, vocab_size=1024)
    handed = run_world(handed_on_rank, config.model_dump(), ranks=ranks)
    for stage in {of_rank for of_rank, _ in handed}:
        assert_sends_what_it_says(config, handed, stage=stage)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern", ["M-*-", "M-*- x 6"])
def test_gradients_are_reduced_in_the_buckets_of_a_run(pattern, tied, tensor):
    config = config_of(parallel={"tensor": tensor}, tie_embeddings=tied, mlp_size=100, pattern=pattern)
    groups = reduced_groups(config)
    assert sum(group.elements for group in groups) == stage_parameters(config, 0)
    copies = weight_copies(config.model, tensor_ranks=tensor)  # four ranks hold each of two kv heads twice
    with torch.device("meta"):
        model = Samba(config.model, tp=TensorParallel(rank=0, size=tensor, copy_groups={copies: None}))
    buckets = gradient_buckets([model], max_elements=BUCKET_ELEMENTS)
    assert groups == tuple(
        ReducedGroup(sum(each.numel() for each in bucket.parameters), bucket.completed_by is not None)
        for bucket in buckets
    )


def test_a_stage_has_no_more_forwards_in_flight_than_micro_batches():
    config = config_of(parallel={"pipeline": 4})  # 2 micro-batches
    assert [len(chunks_in_flight(config, stage=stage, world_size=4)) for stage in range(4)] == [2, 2, 2, 1]


def test_what_sequence_parallelism_gathers_has_a_buffer():
    cut, whole = (
        stage_memories(config_of(parallel={"tensor": 2, "sequence": cut}), world_size=2, kernels=TORCH_ON_CPU)[0]
        for cut in (True, False)
    )
    assert cut.communication_bytes == 2 * 192 * 64 * 2  # 2 sequences of 192 tokens, 64 wide, in bf16
    assert whole.communication_bytes == 0
    for memory in (cut, whole):
        assert replace(memory, communication_bytes=memory.communication_bytes + 8).total_bytes == memory.total_bytes + 8
