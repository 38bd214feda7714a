"""Ranks that are slower than the others: all wait for them in every step, so step times do not tell who they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median, median_low
from typing import NamedTuple

from sambalm.parallel.groups import World
from sambalm.parallel.own_time import OwnTime
from sambalm.pretrain.config import StragglerSection
from sambalm.pretrain.errors import print_line
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook

MEASURED_STEPS = 10  # for each comparison, spread over the steps before it


class Pace(NamedTuple):
    """What a rank tells the others."""

    stage: int  # of the pipeline: ranks of others have other work
    own_s: float  # that a step takes it, fetching included and without waits for messages


class Stragglers(Hook):
    """Compares the ranks of each pipeline stage every so many steps, and names those that are slower by a factor.

    A rank is named once it was slow in two comparisons in a row: what else a machine does for a moment is no straggler.
    """

    def __init__(self, config: StragglerSection, *, world: World) -> None:
        self.config, self.world, self.own_time = config, world, OwnTime(world.device)
        self.were_slow: set[int] = set()

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Goes around what a rank does in a step."""
        every = self.config.every_steps
        if self.world.size == 1 or not every or step % max(1, every // MEASURED_STEPS):
            yield
            return
        with self.own_time.measured(step):
            yield

    def after_step(self, step: FinishedStep) -> None:
        if self.world.size == 1 or not self.config.every_steps or step.number % self.config.every_steps:
            return
        measured_s = self.own_time.take(step.number)
        pace = Pace(self.world.pipeline.rank, median(measured_s) if measured_s else 0.0)
        paces: list[Pace] = self.world.all_gather_object(pace)
        ratios = slowness(paces)
        are_slow = {rank for rank, ratio in enumerate(ratios) if ratio > self.config.factor}
        slow, self.were_slow = sorted(are_slow & self.were_slow), are_slow
        step.metrics.update(slowest_rank_ratio=max(ratios), stragglers=len(slow))
        for rank in slow if self.world.is_main else ():
            step.metrics[f"straggler/rank_{rank}"] = ratios[rank]
            print_line(
                f"step {step.number}: rank {rank} is slow: its own work takes {paces[rank].own_s:.3g} s a step, "
                f"{ratios[rank]:.1f} times the median of its like"
            )


def slowness(paces: Sequence[Pace]) -> list[float]:
    """Each rank's own time over the median of its stage, the lower of two in the middle."""
    typical = {stage: median_low(pace.own_s for pace in paces if pace.stage == stage) for stage, _ in paces}
    return [pace.own_s / typical[pace.stage] if typical[pace.stage] else 1.0 for pace in paces]
