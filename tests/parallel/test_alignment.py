"""Shares that are held with zeros behind them train as they are: the same gradients, and zeros that stay zeros.

Tiny shares are held as they are, so that one process as it is says what is right, and ranks hold theirs aligned.
"""

import numpy as np
import pytest
import torch

from sambalm.model.registry import weight_copies
from sambalm.pretrain.check_layout import local_slices, whole
from tests.support.layout_runs import STEPS, batches, differences, one_process, run_values, steps_on_rank
from tests.support.marks import slow_except
from tests.support.worlds import run_world

# Channels, MLP width and vocabulary are no multiples of 16, nor what two and four ranks have of them.
ODD = {"hidden_size": 44, "num_query_heads": 11, "num_kv_heads": 1, "mlp_size": 83, "vocab_size": 131}
TIED, UNTIED = {"tie_embeddings": True}, {"tie_embeddings": False}
SP2 = {"tensor": 2, "sequence": True}
LAYOUTS = {
    "alone": (1, {}, UNTIED),
    "alone, full": (1, {"recompute": "full"}, TIED),
    "TP2": (2, {"tensor": 2}, TIED),
    "TP2+SP": (2, SP2, UNTIED),
    "TP4+SP": (4, {"tensor": 4, "sequence": True}, TIED),
    "CP2xTP2+SP, selective": (4, SP2 | {"context": 2, "recompute": "selective"}, UNTIED),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}, TIED),
    "DP2, ZeRO-1": (2, {"zero_stage": 1}, UNTIED),
    "DP2, ZeRO-2": (2, {"zero_stage": 2}, TIED),
    "DP2xTP2+SP, ZeRO-3": (4, SP2 | {"zero_stage": 3}, UNTIED),
}


def every_share_is_aligned(monkeypatch):
    from sambalm.parallel import shard

    monkeypatch.setattr(shard, "LEAST_ALIGNED", 1)


@pytest.mark.parametrize("name", slow_except(["alone", "TP2+SP", "DP2, ZeRO-1"], LAYOUTS))
def test_an_aligned_layout_trains_like_one_process_as_it_is(name):
    ranks, parallel, tied = LAYOUTS[name]
    expected = one_process(ODD | tied)
    values = run_values(model=ODD | tied, parallel=parallel)
    results = run_world(steps_on_rank, values, STEPS, every_share_is_aligned, ranks=ranks)
    for result in results:
        assert result.losses == pytest.approx(expected.losses, rel=1e-5)
        assert result.norms == pytest.approx(expected.norms, rel=1e-5)
    worst = differences([result.gradients for result in results], whole(expected.gradients))
    assert {name: value for name, value in worst.items() if value > 1e-5} == {}


def aligned_with_numbers(monkeypatch):
    """Holds other numbers than zeros behind a share, as memory that nobody has cleared would."""
    from sambalm.parallel import sharding

    every_share_is_aligned(monkeypatch)
    monkeypatch.setattr(sharding.torch, "zeros", lambda *shape, **options: torch.full(shape, 0.1, **options))


def logits_without_tokens_take_part(monkeypatch):
    from sambalm.model import samba

    every_share_is_aligned(monkeypatch)
    losses = samba.cross_entropy

    def of_all_rows(logits, *arguments, vocabulary, **options):
        return losses(logits, *arguments, vocabulary=logits.shape[-1], **options)

    monkeypatch.setattr(samba, "cross_entropy", of_all_rows)


@pytest.mark.parametrize("mistake", [aligned_with_numbers, logits_without_tokens_take_part])
@pytest.mark.parametrize(("ranks", "parallel"), [(1, {}), (2, SP2)])
def test_other_numbers_than_zero_and_logits_of_no_token_change_gradients(mistake, ranks, parallel):
    results = run_world(steps_on_rank, run_values(model=ODD, parallel=parallel), 1, mistake, ranks=ranks)
    worst = differences([result.gradients for result in results], whole(one_process(ODD).gradients))
    assert max(worst.values()) > 0.01


def state_on_rank(values: dict, aligned: bool, save: bool) -> tuple[dict, float, int]:
    """Weights and moments after some steps, or as a checkpoint has them; the largest number where zeros should be."""
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.zero.engine import whole_moment, whole_parameter
    from sambalm.parallel.zero.parameter_info import info_of
    from sambalm.pretrain.checkpointing.load import find_resume_point
    from sambalm.pretrain.checkpointing.write import save_checkpoint
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training

    config = parse_config(values, source="test")
    with pytest.MonkeyPatch.context() as monkeypatch:
        if aligned:
            every_share_is_aligned(monkeypatch)
        copies = weight_copies(config.model, tensor_ranks=config.parallel.tensor)
        with start_world(config.parallel, copies=copies) as world:
            checkpoint = None if save else find_resume_point(config, world=world)
            training = build_training(config, world=world, checkpoint=checkpoint)
            if save:
                for step in range(3):
                    training.executor.train_step(batches(step, config=config, world=world))
                save_checkpoint(training.chunks, config=config, world=world, step=3, samples=0, data={})
            states = {"weights": whole_parameter}
            for key in ("exp_avg", "exp_avg_sq"):
                states[key] = lambda parameter, key=key: whole_moment(parameter, key)
            found = {key: local_slices(training.chunks, value) for key, value in states.items()}
            largest, zeros = 0.0, 0
            for parameter in (p for chunk in training.chunks for p in chunk.parameters()):
                for value in states.values():
                    rest = value(parameter).clone()
                    for piece in info_of(parameter).slices:
                        piece.of_local(rest).zero_()
                    largest = max(largest, rest.abs().max().item())
                    sizes = sum(np.prod(piece.sizes) for piece in info_of(parameter).slices)
                    zeros += rest.numel() - int(sizes)
    return found, largest, zeros


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    slow_except(
        [(2, SP2)], [(1, {}), (2, SP2), (2, {"zero_stage": 1}), (2, {"zero_stage": 2}), (2, {"zero_stage": 3})]
    ),
)
def test_zeros_stay_zeros_and_are_in_no_checkpoint(ranks, parallel, tmp_path):
    """What an aligned run saved, one as it is resumes to the same bits, and the other way round."""
    values = run_values(model=ODD, parallel=parallel, run_dir=str(tmp_path))
    trained = run_world(state_on_rank, values, True, True, ranks=ranks)
    assert [largest for _, largest, _ in trained] == [0.0] * ranks
    assert min(zeros for _, _, zeros in trained) > 1000
    resumed = run_world(state_on_rank, run_values(model=ODD, run_dir=str(tmp_path)), False, False, ranks=1)
    (state, _, zeros), *_ = resumed
    assert zeros == 0
    again = run_world(state_on_rank, values, True, False, ranks=ranks)
    assert [largest for _, largest, _ in again] == [0.0] * ranks
    for states in (trained, again):
        for key, slices in state.items():
            worst = differences([found[key] for found, _, _ in states], whole(slices))
            assert max(worst.values()) == 0.0


def test_shapes_of_checkpoints_and_counts_are_the_users():
    from sambalm.model.config import ModelConfig
    from sambalm.model.parameters import count_parameters
    from sambalm.model.samba import Samba
    from sambalm.parallel.sharding import canonical_slices

    sizes = {"hidden_size": 264, "num_query_heads": 11, "num_kv_heads": 1, "mlp_size": 519, "vocab_size": 523}
    config = ModelConfig(pattern="M*-", window=4, tie_embeddings=False, **sizes)
    model = Samba(config)
    shapes = {name: piece.shape for name, _, piece in canonical_slices(model)}
    assert shapes["layers.2.mixer.gate_up_proj.up.weight"] == (519, 264)
    assert shapes["head.weight"] == (523, 264)
    held = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(config)["total"] == sum(int(np.prod(shape)) for shape in shapes.values()) < held
    assert model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 523)
