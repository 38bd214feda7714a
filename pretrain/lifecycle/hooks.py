"""What happens around the steps of a run: validation, reports, checkpoints and whatever else is to come.

The loop (`Trainer.fit`) fetches batches and takes steps; everything else is a hook. `Trainer._hooks` lists the hooks of
a run in their order, and no other file decides it. To add one, derive from `Hook`, override what it needs, and put it
into the list. A guard belongs before the checkpointer, so that it can end a run before a bad state is saved. What adds
to the metrics of a step belongs before the report, which writes them.

Every rank has the same hooks and calls them at the same points, so every method may communicate, on all ranks alike. A
thread of a hook communicates over a group of its own, which no other thread uses: see `World.save_group`. What it has
to tell the main threads of all ranks goes through `vote`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from sambalm.parallel.groups import World
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.launched_step import StepResult
from sambalm.pretrain.lifecycle.phases import Phase
from sambalm.pretrain.lifecycle.signals import Request
from sambalm.pretrain.training import Training


@dataclass(frozen=True)
class FinishedStep:
    """A step whose results are known, the same on every rank."""

    number: int  # from 1
    result: StepResult
    request: Request  # what the run is asked for
    votes: Mapping["Hook", int] = field(default_factory=dict)  # of each hook, the largest of all ranks' `vote`
    metrics: dict[str, float] = field(default_factory=dict)  # by name: hooks add theirs, and later hooks read them


class Hook:
    """What a run calls at certain points of its life. Every method does nothing unless a hook overrides it.

    A hook is made before the model is built, so that wrong inputs end the run early. An exception from any method ends
    the run on the rank where it is raised; raise the same one on every rank, from what all know, for a clean end.

    Attributes:
        phase: that a process is in during `after_step`, for the watchdog's limits and the ledger; None: the step's.
        name: what a checkpoint calls the hook's `state`; empty where it has none.
    """

    phase: Phase | None = None
    name: ClassVar[str] = ""

    def state(self) -> dict[str, Any]:
        """Returns what the hook needs to go on from a checkpoint, the same on every rank, as JSON has it.

        It is asked for after the step that is saved, once all hooks before the checkpointer have taken note of it.
        """
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned; called before `on_start`, and not where a checkpoint has none of it."""

    def on_start(self, training: Training) -> None:
        """Prepares for the first step of this attempt.

        Args:
            training: what is trained, as it was initialised or loaded.
        """

    def vote(self) -> int:
        """Returns a number of this rank's, at the launch of each step; `FinishedStep.votes` has all ranks' largest.

        It travels with what the run is asked for, so it costs no message. Nothing else may communicate here.
        """
        return 0

    def before_step(self, number: int) -> None:
        """Prepares for a step that is about to be launched; the host must not wait for the device.

        Args:
            number: from 1. The results of the step before it need not be known yet.
        """

    def acts_on(self, step: int) -> bool:
        """Says whether `after_step` needs the weights as a step leaves them; called before the next step is launched.

        The host then reads the step's results at once, while the device waits: answer True as seldom as possible. The
        answer is the same on every rank, whenever and however often it is asked for.

        Args:
            step: its number, from 1.
        """
        return False

    def after_step(self, step: FinishedStep) -> None:
        """Takes note of a step; called once for each, in order.

        Results are read one step late, so that the device always has work: the next step is then already under way, and
        the weights change. They are the step's own where `acts_on` has said True, where the step has a request, and
        after the last step.
        """

    def before_save(self, step: int) -> None:
        """Prepares for a checkpoint, of the state after a step, that is about to be written."""

    def after_save(self, checkpoint: Path) -> None:
        """Takes note of a checkpoint.

        Args:
            checkpoint: its folder, complete and committed; removed once enough newer ones are there.
        """

    def on_end(self, exit_code: ExitCode | None) -> None:
        """Ends what `on_start` began; called for hooks in reverse order, and for each hook that started.

        Args:
            exit_code: why the run ends. None after an error, which may be one of this rank alone: do not communicate.
        """


MakeHook = Callable[[RunConfig, World], Hook]  # how the program hands in a hook of a folder that this one does not know


def is_due(step: int, *, every_steps: int, last_step: int) -> bool:
    """Whether something happens after a step that happens every so many steps and after the last."""
    return step % every_steps == 0 or step == last_step
