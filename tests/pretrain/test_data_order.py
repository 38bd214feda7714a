"""A step consumes the same samples in the same order on every layout."""

import pytest
import torch
from whole_runs import changed, train
from worlds import run_world


def batches_on_rank(values: dict) -> tuple[int, int, list]:
    """This rank's data and context rank and the tokens of its micro-batches, step by step, as training used them."""
    from sambalm.parallel.state import start_world
    from sambalm.pretrain.config import parse_config
    from sambalm.pretrain.trainer import Trainer

    config, steps = parse_config(values, source="test"), []
    with start_world(config.parallel) as world:
        trainer = Trainer(config, world)
        execution = trainer.training.execution
        train_step = execution.train_step

        def recorded(micro_batches):
            steps.append([(batch.tokens.numpy(), batch.labels.numpy()) for batch in micro_batches])
            return train_step(micro_batches)

        execution.train_step = recorded
        trainer.fit()
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
    for step in range(values["train"]["steps"]):
        of_data_ranks = [
            torch.cat([shares[data, context][step] for context in range(context_size)], dim=-1)
            for data in range(data_size)
        ]
        in_turn = torch.stack(of_data_ranks, dim=1).flatten(0, 1)  # micro-batch by micro-batch, rank after rank
        result.append(in_turn.transpose(0, 1).flatten(1, 2))
    return result


@pytest.fixture(scope="module")
def alone():
    """What one process reads, filled by the first test."""
    return {}


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {}),
        (4, {"zero_stage": 2}),
        (4, {"context": 2}),
        (4, {"pipeline": 2}),
        (4, {"tensor": 2}),
        (2, {"context": 2}),
    ],
)
def test_the_order_of_samples_does_not_depend_on_the_layout(ranks, parallel, run_values, alone, tmp_path):
    values = changed(run_values, train={"steps": 3}, validation={"every_steps": 3})
    if not alone:
        alone["samples"] = samples_by_step(changed(values, run={"dir": str(tmp_path / "alone")}), 1)
    expected = alone["samples"]
    assert expected[0].shape == (2, 8, 32)
    assert not torch.equal(expected[0], expected[1])
    found = samples_by_step(changed(values, parallel=parallel), ranks)
    for step, (samples, wanted) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(samples, wanted), step


@pytest.mark.parametrize(
    ("ranks", "parallel"), [(2, {"context": 2}), (2, {"pipeline": 2}), (4, {"tensor": 2, "sequence": True})]
)
def test_a_run_that_resets_at_documents_has_the_same_losses_on_every_layout(ranks, parallel, run_values, tmp_path):
    values = changed(run_values, data={"reset_at_document": True})
    alone = train(changed(values, run={"dir": str(tmp_path / "alone")}))
    assert alone != train(changed(run_values, run={"dir": str(tmp_path / "stream")}))
    for record, expected in zip(train(changed(values, parallel=parallel), ranks=ranks), alone, strict=True):
        assert record == pytest.approx(expected, rel=1e-4)
