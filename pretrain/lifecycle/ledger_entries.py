"""Tells the ledger what the hooks of a run hear: the first step, each step's end, saves and the end."""

from pathlib import Path

from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook
from sambalm.pretrain.lifecycle.ledger import Ledger
from sambalm.pretrain.training import Training


class LedgerEntries(Hook):
    """Keeps the ledger of a process. Belongs after the guards, which may skip a step, and before the checkpointer.

    Args:
        done_steps: those that this attempt goes on from.
    """

    def __init__(self, ledger: Ledger, *, done_steps: int) -> None:
        self.ledger, self.done_steps = ledger, done_steps

    def on_start(self, training: Training) -> None:
        self.ledger.begin(self.done_steps)

    def after_step(self, step: FinishedStep) -> None:
        self.ledger.finish_step(step.number)

    def before_save(self, step: int) -> None:
        self.ledger.write()

    def after_save(self, checkpoint: Path) -> None:
        self.ledger.saved(int(checkpoint.name.removeprefix("step_")))

    def on_end(self, exit_code: ExitCode | None) -> None:
        self.ledger.leave(in_order=exit_code is not None)
