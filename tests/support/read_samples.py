"""The samples that a run reads, step by step, on any layout."""

import pytest
import torch

from tests.support.worlds import run_world


def batches_on_rank(values: dict) -> tuple[int, int, list]:
    """This rank's data and context rank and the tokens of its micro-batches, step by step, as training used them."""
    from sambalm.pretrain import trainer
    from sambalm.pretrain.config_file import parse_config

    steps, worlds, build = [], [], trainer.build_training

    def build_recorded(config, *, world, **options):
        worlds.append(world)
        training = build(config, world=world, **options)
        train_step = training.executor.train_step

        def recorded(micro_batches):
            steps.append([(batch.tokens.numpy(), batch.labels.numpy()) for batch in micro_batches])
            return train_step(micro_batches)

        training.executor.train_step = recorded
        return training

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainer, "build_training", build_recorded)
        trainer.train(parse_config(values, source="test"))
    (world,) = worlds
    return world.data_rank, world.context.rank, steps


def samples_by_step(values: dict, ranks: int) -> list[torch.Tensor]:
    """For each step tokens and labels of its samples in global order, [2, samples, sequence]."""
    shares: dict[tuple[int, int], list] = {}
    for data_rank, context_rank, steps in run_world(batches_on_rank, values, ranks=ranks):
        steps = [torch.stack([torch.stack([torch.from_numpy(t) for t in batch]) for batch in step]) for step in steps]
        # [micro-batches, 2, batch, this rank's tokens]; ranks of one model copy must have read the same.
        known = shares.setdefault((data_rank, context_rank), steps)
        assert all(torch.equal(a, b) for a, b in zip(known, steps, strict=True))
    data_size, context_size = (1 + max(numbers) for numbers in zip(*shares, strict=True))
    result = []
    for step in range(len(next(iter(shares.values())))):
        of_data_ranks = [
            torch.cat([shares[data, context][step] for context in range(context_size)], dim=-1)
            for data in range(data_size)
        ]
        in_turn = torch.stack(of_data_ranks, dim=1).flatten(0, 1)  # micro-batch by micro-batch, rank after rank
        result.append(in_turn.transpose(0, 1).flatten(1, 2))
    return result
