"""Where a run is: its phase, tokens, batch and learning rate as functions of the samples that it has consumed.

A run without `data.phases` is one phase. Samples are numbered over the whole run, so that the position of a run is one
number on every layout, whatever lengths its phases have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from sambalm.pretrain.errors import ConfigError

if TYPE_CHECKING:
    from sambalm.pretrain.config import RunConfig
    from sambalm.pretrain.optimizer import OptimizerConfig


@dataclass(frozen=True)
class LearningRateCurve:
    """A curve over the tokens of some phases together.

    done_tokens: of these phases, before the one at hand.
    """

    optimizer: "OptimizerConfig"
    tokens: int
    done_tokens: int


@dataclass(frozen=True)
class RunPhase:
    """A stretch of a run.

    Attributes:
        number: from 0.
        config: of a run that is this phase alone.
        first_sample, first_token: of the run, where it begins.
        samples: that it has; the last phase goes on beyond them, where a run leaves samples out.
        stops: whether the run leaves where it ends.
        curve: None in a run without phases, whose learning rate is a function of the step.
    """

    number: int
    config: "RunConfig"
    first_sample: int
    first_token: int
    samples: int
    curve: LearningRateCurve | None
    stops: bool = False

    @property
    def end_sample(self) -> int:
        return self.first_sample + self.samples

    @property
    def tokens(self) -> int:
        """Tokens that it has."""
        return self.samples * self.length

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return self.config.data.sequence_length

    @property
    def key(self) -> str:
        """What messages call the phase."""
        return f"data.phases.{self.number}"


class RunSchedule:
    """The phases of a run, in order."""

    def __init__(self, config: "RunConfig") -> None:
        self.config = config
        self.is_phased = config.data.phases is not None

    @cached_property
    def phases(self) -> Sequence[RunPhase]:
        return list(self._phases())

    def at(self, samples: int) -> RunPhase:
        """Returns the phase of the step after so many samples."""
        return next((phase for phase in self.phases if samples < phase.end_sample), self.phases[-1])

    def tokens(self, samples: int) -> int:
        """Returns the tokens of the first samples of the run."""
        phase = self.at(samples)
        return phase.first_token + (samples - phase.first_sample) * phase.length

    def samples(self, tokens: int) -> int:
        """Returns the samples that make the first tokens of the run."""
        phase = next(phase for phase in reversed(self.phases) if tokens >= phase.first_token)
        return phase.first_sample + (tokens - phase.first_token) // phase.length

    def step_samples(self, samples: int) -> int:
        """Returns the samples of the step that comes after so many."""
        phase = self.at(samples)
        return phase.config.batch_schedule.step_samples(samples - phase.first_sample)

    def consumed_samples(self, steps: int) -> int:
        """Returns the samples of the first steps."""
        for phase in self.phases[:-1]:
            if steps < phase.config.train.steps:
                return phase.first_sample + phase.config.batch_schedule.consumed_samples(steps)
            steps -= phase.config.train.steps
        return self.phases[-1].first_sample + self.phases[-1].config.batch_schedule.consumed_samples(steps)

    def check_position(self, samples: int, *, step: int) -> None:
        """Raises ConfigError unless the phases lead to a position in as many steps as the run has taken."""
        if self.is_phased and (found := self.consumed_samples(step)) != samples:
            raise ConfigError(
                f"the run has consumed {samples} samples in {step} steps, and data.phases make {found} of them: give "
                "the phases that have begun their former batches, and begin a phase with another batch here"
            )

    def stretch(self, samples: int) -> Sequence[RunPhase]:
        """Returns the phases that a start at a position goes through: up to the next one that stops."""
        first = self.at(samples).number
        last = next((phase.number for phase in self.phases[first:] if phase.stops), len(self.phases) - 1)
        return self.phases[first : last + 1]

    def check_stretch(self, samples: int, *, world_size: int) -> Sequence[RunPhase]:
        """Returns `stretch`. Raises ConfigError or ParallelError unless it fits a number of processes."""
        found = self.stretch(samples)
        for phase in found if self.is_phased else ():
            try:
                phase.config.check_world(world_size)
            except ConfigError as error:
                raise ConfigError(f"in {phase.key}, {error}") from None
        return found

    def fitting(self, world_size: int) -> list[RunPhase]:
        """Returns the phases of all stretches that fit a number of processes.

        Raises:
            ConfigError, ParallelError: none does.
        """
        starts = [0, *(phase.end_sample for phase in self.phases[:-1] if phase.stops)]
        fitting: list[RunPhase] = []
        failure: ConfigError | None = None
        for start in starts:
            try:
                fitting += self.check_stretch(start, world_size=world_size)
            except ConfigError as error:
                failure = failure or error
        if failure and not fitting:
            raise failure
        return fitting

    def learning_rate(self, step: int, *, samples: int) -> float:
        """Returns the learning rate of a step.

        Args:
            step: its number, from 1.
            samples: before it.
        """
        phase = self.at(samples)
        if phase.curve is None:
            return self.config.optimizer.learning_rate(step, steps=self.config.train.steps)
        end = self.tokens(samples + self.step_samples(samples)) - phase.first_token + phase.curve.done_tokens
        return phase.curve.optimizer.learning_rate(min(end, phase.curve.tokens), steps=phase.curve.tokens)

    def _phases(self) -> Iterator[RunPhase]:
        config = self.config
        if config.data.phases is None:
            samples = config.batch_schedule.consumed_samples(config.train.steps)
            yield RunPhase(0, config, first_sample=0, first_token=0, samples=samples, curve=None)
            return
        shared = sum(phase.tokens for phase in config.data.phases if phase.learning_rate is None)
        sample = token = done = 0
        for number, phase in enumerate(config.data.phases):
            own = config.of_phase(phase)
            if phase.learning_rate is None:
                curve = LearningRateCurve(config.optimizer, tokens=shared, done_tokens=done)
                done += phase.tokens
            else:
                curve = LearningRateCurve(own.optimizer, tokens=phase.tokens, done_tokens=0)
            samples = phase.tokens // own.data.sequence_length
            yield RunPhase(
                number,
                own,
                first_sample=sample,
                first_token=token,
                samples=samples,
                curve=curve,
                stops=phase.stop_at_end,
            )
            sample, token = sample + samples, token + phase.tokens


def phase_line(schedule: RunSchedule, phase: RunPhase) -> str:
    """Returns what a phase is, as part of a sentence."""
    train = phase.config.train
    return (
        f"phase {phase.number + 1} of {len(schedule.phases)}: {phase.tokens:,} tokens in {train.steps:,} steps of "
        f"{train.global_batch_tokens:,}, sequences of {phase.length:,}"
    )


def steps_of_phases(config: "RunConfig") -> int:
    """Returns the optimizer steps that a config's phases make, each of which is checked as a run of its own.

    Raises:
        ValueError: a phase cannot be run, or another key says otherwise how long or how large the run's steps are.
    """
    given, steps = config.train.steps, 0
    if config.train.batch_ramp is not None:
        raise ValueError(
            "train.batch_ramp is set with data.phases: give the growing batches as phases, with global_batch_tokens "
            "each, or remove it"
        )
    for number, phase in enumerate(config.data.phases or ()):
        own = config.of_phase(phase)
        batch = own.train.global_batch_tokens
        if rest := phase.tokens % batch:
            below = phase.tokens - rest
            nearest = f"{below} or {below + batch}" if below else str(batch)
            raise ValueError(
                f"data.phases.{number}.tokens is {phase.tokens}, which is not a multiple of the phase's global batch "
                f"of {batch} tokens: make it {nearest}"
            )
        try:
            own.check_shapes()
        except ValueError as error:
            raise ValueError(f"in data.phases.{number}, {error}") from None
        steps += own.train.steps
    if given not in (0, steps):
        raise ValueError(
            f"train.steps is {given}, and the tokens of data.phases make {steps} steps: remove train.steps"
        )
    return steps
