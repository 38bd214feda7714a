"""A global batch that grows: sizes, gradients against a plain loop, and the same samples whatever reads them."""

import math

import numpy as np
import pytest
import torch

from sambalm.parallel.zero.buckets import GradientBucket
from sambalm.pretrain.batch_schedule import BatchSchedule
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.optimizer import OptimizerConfig
from tests.support.marks import slow_except
from tests.support.whole_runs import changed, train
from tests.support.worlds import run_world

RAMP = {"start_tokens": 128, "increment_tokens": 128, "ramp_tokens": 1536}


@pytest.fixture
def ramp_values(run_values) -> dict:
    """Batches of 4, 4, 4, 8, 8, 12, ... up to 16 samples of 32 tokens."""
    train = {"steps": 10, "global_batch_tokens": 512, "micro_batch_size": 1, "batch_ramp": RAMP}
    return changed(run_values, train=train, validation={"every_steps": 10}, checkpoint={"every_steps": 1, "keep": 20})


def _sizes(schedule: BatchSchedule, steps: int) -> list[int]:
    consumed, sizes = 0, []
    for step in range(steps):
        assert schedule.consumed_samples(step) == consumed
        sizes.append(schedule.step_samples(consumed))
        consumed += sizes[-1]
    return sizes


def test_sizes_grow_by_the_samples_consumed(ramp_values):
    schedule = parse_config(ramp_values, source="test").batch_schedule
    assert schedule.sizes() == [4, 8, 12, 16]
    longer = changed(ramp_values, train={"batch_ramp": RAMP | {"ramp_tokens": 1537}})
    longer_schedule = parse_config(longer, source="test").batch_schedule
    assert (schedule.ramp_samples, longer_schedule.ramp_samples) == (48, 49)
    # Each size below the last holds for a third of 48 samples, and until the step that goes beyond it ends.
    assert _sizes(schedule, 10) == [4, 4, 4, 4, 8, 8, 12, 12, 16, 16]
    assert _sizes(longer_schedule, 10) == [4, 4, 4, 4, 4, 8, 8, 12, 12, 16]  # of 49 samples, rounded up
    ten_steps = parse_config(changed(ramp_values, train={"steps": 10}), source="test")
    assert ten_steps.run_tokens == (4 * 4 + 2 * 8 + 2 * 12 + 2 * 16) * 32
    random = np.random.RandomState(0)
    for _ in range(100):
        start, increment, stages, ramp = random.randint(1, 50, size=4).tolist()
        final = start + increment * stages
        sizes = _sizes(BatchSchedule(final=final, start=start, increment=increment, ramp_samples=40 * ramp), 300)
        assert sizes == sorted(sizes)
        assert sizes[0] == start


def test_without_a_ramp_all_steps_are_alike(run_values):
    config = parse_config(run_values, source="test")
    assert config.batch_schedule.sizes() == [8]
    assert _sizes(config.batch_schedule, 5) == [8] * 5
    assert config.run_tokens == 6 * 256


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ({"start_tokens": 130}, r"^test: train.batch_ramp.start_tokens is 130, .* data.sequence_length 32$"),
        ({"increment_tokens": 16}, r"^test: train.batch_ramp.increment_tokens is 16, .* data.sequence_length 32$"),
        (
            {"increment_tokens": 160},
            r"^test: train.batch_ramp.increment_tokens is 160, .* 128 to train.global_batch_tokens 512",
        ),
        (
            {"start_tokens": 512},
            r"^test: train.batch_ramp.increment_tokens is 128, .* 512 to train.global_batch_tokens 512",
        ),
        ({"ramp_tokens": 0}, r"^test: train.batch_ramp.ramp_tokens is 0"),
    ],
)
def test_a_ramp_that_leads_nowhere_is_refused(ramp, message, ramp_values):
    with pytest.raises(ConfigError, match=message):
        parse_config(changed(ramp_values, train={"batch_ramp": RAMP | ramp}), source="test")


def test_every_size_must_suit_the_ranks(ramp_values):
    config = parse_config(ramp_values, source="test")
    config.check_world(4)
    with pytest.raises(
        ConfigError, match=r"^a global batch of train.batch_ramp is 384, which is not a multiple of .* 8 "
    ):
        config.check_world(8)


# Two of ten steps of warm-up to 3e-3, then a cosine to a tenth of it.
LEARNING_RATES = [1.5e-3, *(3e-4 + 2.7e-3 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(9))]


def plain_loop(values: dict) -> list[tuple[float, float]]:
    """Losses and gradient norms of AdamW on whole batches: no engine, no accumulation, no loader."""
    from sambalm.data_pipeline.dataset import build_train_dataset
    from sambalm.data_pipeline.sources import open_sources
    from sambalm.model.build import build_chunks
    from sambalm.model.ops.implementations import KernelRequirements
    from sambalm.model.ops.registry import build_kernels
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.sharding import initialize_parameters

    config, found = parse_config(values, source="test"), []
    with start_world(config.parallel) as world:
        kernels = build_kernels(config.kernels, KernelRequirements(world.device.type, "fp32"))
        (model,) = build_chunks(
            config.model,
            config.parallel,
            world=world,
            kernels=kernels,
            dtype=torch.float32,
            sequence_length=config.data.sequence_length,
        )
        initialize_parameters(model, seed=config.run.seed)
        decayed, others = [], []
        for name, parameter in model.named_parameters():  # by the paper's recipe, not by the product's groups
            vector = parameter.dim() == 1 or name.endswith("A_log")
            (others if vector else decayed).append(parameter)
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
        dataset = build_train_dataset(config.data, open_sources(config.data), seed=config.run.seed)
        numbers = iter(range(10**6))
        for step, size in enumerate([4, 4, 4, 4, 8, 8, 12, 12, 16, 16], start=1):
            samples = [dataset[next(numbers)] for _ in range(size)]
            tokens, labels = (torch.stack([sample[part] for sample in samples]) for part in (0, 1))
            loss = model(tokens, labels).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATES[step - 1]
            optimizer.step()
            optimizer.zero_grad()
            found.append((loss.item(), norm.item()))
    return found


def _losses_and_norms(records: list[dict]) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in records]


@pytest.fixture(scope="module")
def plain():
    """The plain loop's result, filled by the first test."""
    return {}


LAYOUTS = {
    "one": (1, {}),
    "DP2 ZeRO-1": (2, {"zero_stage": 1}),
    "DP2 ZeRO-2": (2, {"zero_stage": 2}),
    "DP2 ZeRO-3": (2, {"zero_stage": 3}),
    "PP2": (2, {"pipeline": 2}),
}


@pytest.mark.parametrize("layout", slow_except(["DP2 ZeRO-1"], LAYOUTS))
def test_steps_of_every_size_are_those_of_a_plain_loop(layout, ramp_values, plain):
    if not plain:
        (plain["found"],) = run_world(plain_loop, ramp_values, ranks=1)
    ranks, parallel = LAYOUTS[layout]
    records = train(changed(ramp_values, parallel=parallel), ranks=ranks)
    assert np.array(_losses_and_norms(records)) == pytest.approx(np.array(plain["found"]), rel=2e-5)
    assert [record["batch_tokens"] for record in records] == [128] * 4 + [256] * 2 + [384] * 2 + [512] * 2
    assert [record["tokens"] for record in records] == np.cumsum([r["batch_tokens"] for r in records]).tolist()


def test_adamw_takes_every_number_of_the_config():
    """Others than PyTorch's defaults, which the runs above partly share."""
    optimizer = OptimizerConfig(peak_lr=0.3, beta1=0.8, beta2=0.7, eps=1e-4, weight_decay=0.2)
    buckets = [GradientBucket((torch.nn.Parameter(torch.zeros(2)),), weight_decay=decays) for decays in (True, False)]
    groups = optimizer.build(buckets, adamw=torch.optim.AdamW).param_groups
    found = [(group["lr"], group["betas"], group["eps"], group["weight_decay"]) for group in groups]
    assert found == [(0.3, (0.8, 0.7), 1e-4, decay) for decay in (0.2, 0.0)]
