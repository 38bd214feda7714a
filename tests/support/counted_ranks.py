"""What a model really keeps for its backward and hands to other ranks, for tests of what mixers and planner count."""

from collections import Counter
from typing import Any

import torch

from sambalm.model.build import build_chunks
from sambalm.model.ops.registry import TORCH_KERNELS
from sambalm.model.registry import weight_copies
from sambalm.model.samba import Samba
from sambalm.parallel.groups import start_world
from sambalm.parallel.micro_batch import MicroBatch
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.planner.kernels import TORCH_ON_CPU
from sambalm.pretrain.precision import DTYPES
from sambalm.pretrain.training import build_training
from tests.support.mixers import assert_keeps_what_it_says, assert_sends_what_it_says
from tests.support.plan_counters import HandedBytes, LiveBytes
from tests.support.planned_runs import config_of
from tests.support.worlds import Call, SharedWorlds


def counted_activations(config: RunConfig) -> tuple[int, int]:
    """Bytes that a real forward leaves for its backward, and at most during both."""
    recompute = config.parallel.recompute
    model = Samba(
        config.model,
        kernels=TORCH_KERNELS.recomputing() if recompute == "selective" else TORCH_KERNELS,
        dtype=DTYPES[config.train.precision],
        recompute_layers=recompute == "full",
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(0, config.model.vocab_size, (config.train.micro_batch_size, config.data.sequence_length))
    with LiveBytes() as live:
        live.leave_out([*model.parameters(), *(parameter.grad for parameter in model.parameters()), tokens])
        loss = model(tokens, tokens).mean()
        kept = live.now_bytes
        loss.backward()
    return kept, live.peak_bytes


def kept_on_rank(values: dict) -> int:
    """Bytes that the rank's real forward leaves for its backward, without the weights."""
    config = RunConfig.model_validate(values)
    with start_world(config.parallel, copies=weight_copies(config.model, tensor_ranks=config.parallel.tensor)) as world:
        (model,) = build_chunks(
            config.model,
            config.parallel,
            world=world,
            kernels=TORCH_KERNELS,
            dtype=DTYPES[config.train.precision],
            sequence_length=config.data.sequence_length,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        shape = config.train.micro_batch_size, config.data.sequence_length // world.context.size
        tokens = torch.randint(0, 64, shape)
        with LiveBytes() as live:
            live.leave_out([*model.parameters(), tokens])
            loss = model(tokens, tokens).mean()
            kept = live.now_bytes
        loss.backward()  # no rank leaves while another still communicates
    return kept


def handed_on_rank(values: dict) -> tuple[int, Counter]:
    """The rank's pipeline stage, and what it hands over in its second step."""
    config = RunConfig.model_validate(values)
    with start_world(config.parallel, copies=weight_copies(config.model, tensor_ranks=config.parallel.tensor)) as world:
        training = build_training(config, world=world, checkpoint=None)
        shape = config.train.micro_batch_size, config.data.sequence_length // world.context.size
        tokens = torch.randint(0, 64, shape)
        micro_batches = [MicroBatch(tokens, tokens)] * config.accumulation_steps(data_size=world.data_size)
        training.executor.train_step(micro_batches)
        with HandedBytes() as handed:
            training.executor.train_step(micro_batches)
    return world.pipeline.rank, handed.by_operation


class CountedRanks:
    """What ranks of a small model send and keep, on two layouts, for a module's shared worlds.

    Args:
        model: keys of the section, its pattern among them.
    """

    LAYOUTS = ((2, {"tensor": 2, "sequence": True}, "selective"), (4, {"context": 4}, "full"))
    """Ranks, layout and, for what is sent, what is recomputed."""

    def __init__(self, **model: Any) -> None:
        self._sent: dict[int, tuple[RunConfig, Call]] = {}
        self._kept: dict[int, tuple[RunConfig, Call]] = {}
        for ranks, parallel, recompute in self.LAYOUTS:
            config = config_of(parallel=parallel | {"recompute": recompute}, hidden_size=48, vocab_size=64, **model)
            self._sent[ranks] = config, Call(handed_on_rank, (config.model_dump(),), ranks)
            config = config_of(parallel=parallel, hidden_size=48, vocab_size=64, **model)
            self._kept[ranks] = config, Call(kept_on_rank, (config.model_dump(),), ranks)

    @property
    def calls(self) -> list[Call]:
        return [call for found in (self._sent, self._kept) for _, call in found.values()]

    def check(self, ranks: int, *, worlds: SharedWorlds) -> None:
        """Compares what the ranks of one of the layouts did with what is counted."""
        config, call = self._sent[ranks]
        assert_sends_what_it_says(config, worlds[call])
        config, call = self._kept[ranks]
        assert_keeps_what_it_says(config, worlds[call], kernels=TORCH_ON_CPU, tolerance=0.05)
