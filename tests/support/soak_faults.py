"""Faults within the processes of a long run: what is in its data, and what one of its ranks does after a while."""

import time

import torch

from tests.support.hangs import hang_at, is_rank

BAD_EVERY_STEPS = 97
FAULTY_RANK = 1


def poison_micro_batches() -> None:
    """Every 97th step one rank's gradients of one micro-batch are NaN, in a clean run too: as of bad data."""
    from sambalm.parallel.zero.parameter_info import info_of

    def poison(trainer) -> None:
        if (trainer.step + 1) % BAD_EVERY_STEPS or trainer.world.rank != FAULTY_RANK:
            return
        parameter = next(p for p in trainer.training.chunks[0].parameters() if info_of(p).owned and p.dim() == 1)

        def spoil(gradient):
            hook.remove()
            return torch.full_like(gradient, torch.nan)

        hook = parameter.register_hook(spoil)

    _before_each_step(poison)


def hang_later(*, where: str, rank: int, after_s: float) -> None:
    """Some time after its start, a rank hangs once it fetches a batch, starts a save, or writes a save's files."""
    from sambalm.data_pipeline.loader import BatchLoader
    from sambalm.pretrain.checkpointing import write

    poison_micro_batches()
    start_s = time.monotonic()
    owner, name = {
        "fetch": (BatchLoader, "next_micro_batch"),
        "save": (write.CheckpointWriter, "start"),
        "writing": (write, "write_shards"),
    }[where]
    hang_at(owner, name, rank=rank, when=lambda *_, **__: time.monotonic() - start_s > after_s, in_c=where != "fetch")


def flip_a_bit_later(*, after_s: float) -> None:
    """Some time after its start, one rank's copy of a norm's weight gets another bit, once, before a forward."""
    from sambalm.parallel.replicas import _weight

    poison_micro_batches()
    start_s, watched = time.monotonic(), []

    def watch(trainer) -> None:
        norm = trainer.training.chunks[0].final_norm
        if norm not in watched and is_rank(FAULTY_RANK):
            watched.append(norm)  # a rollback makes another one
            norm.register_forward_pre_hook(flip)

    def flip(norm: torch.nn.Module, _: object) -> None:
        nonlocal start_s
        if torch.is_grad_enabled() and time.monotonic() - start_s > after_s:
            start_s = float("inf")
            _weight(norm.weight).data.view(torch.int32)[3] ^= 1 << 20

    _before_each_step(watch)


def _before_each_step(act) -> None:
    """Calls act(trainer) before the trainer takes a step."""
    from sambalm.pretrain import trainer

    pass_over = trainer.Trainer._pass_over_left_out

    def act_and_pass_over(self):
        act(self)
        return pass_over(self)

    trainer.Trainer._pass_over_left_out = act_and_pass_over
