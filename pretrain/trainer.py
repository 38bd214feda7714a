"""The training loop: fetch, forward and backward, step, and the hooks that do everything else."""

import gc
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from sambalm.data_pipeline.loader import BatchLoader
from sambalm.data_pipeline.phases import build_train_datasets
from sambalm.data_pipeline.shared import shared_sources
from sambalm.data_pipeline.sources import Source, check_separate, check_vocabulary, open_sources
from sambalm.data_pipeline.token_stream import allow_open_files
from sambalm.model.registry import weight_copies
from sambalm.parallel.cuda_graphs import UNCAPTURED_STEPS
from sambalm.parallel.environment import is_main_process, world_size
from sambalm.parallel.groups import World, start_world
from sambalm.parallel.micro_batch import MicroBatch, weighted
from sambalm.parallel.zero.engine import gradient_norm
from sambalm.pretrain.checkpointing.data_record import data_record
from sambalm.pretrain.checkpointing.initial_weights import (
    STARTED_FROM,
    InitialWeights,
    check_started_from,
    find_initial_weights,
)
from sambalm.pretrain.checkpointing.load import check_data, find_resume_point
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.data_parts import open_data, sources_of
from sambalm.pretrain.errors import ConfigError, ExitCode, print_line, print_warning
from sambalm.pretrain.launched_step import LaunchedStep, Moment
from sambalm.pretrain.lifecycle.checkpointer import Checkpointer, SaveOutcomes
from sambalm.pretrain.lifecycle.guards import Guards
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook, MakeHook
from sambalm.pretrain.lifecycle.ledger_entries import LedgerEntries
from sambalm.pretrain.lifecycle.phases import Marks, Phase
from sambalm.pretrain.lifecycle.profile import Profiler
from sambalm.pretrain.lifecycle.replicas import ReplicaCheck
from sambalm.pretrain.lifecycle.rollback import RollBack, Rollbacks, set_newer_checkpoints_aside
from sambalm.pretrain.lifecycle.run_folder import ENDINGS, Ending, LeaseGuard, RunFolder, open_run_folder
from sambalm.pretrain.lifecycle.signals import Request, Signals, take_switches
from sambalm.pretrain.lifecycle.stragglers import Stragglers
from sambalm.pretrain.lifecycle.watchdog import watching
from sambalm.pretrain.optimizer import set_learning_rate
from sambalm.pretrain.reporting.console import start_lines
from sambalm.pretrain.reporting.metrics import RunReport
from sambalm.pretrain.run_phases import RunPhase, phase_line
from sambalm.pretrain.training import build_training
from sambalm.pretrain.validation import Validator

COMPILING_STEPS = UNCAPTURED_STEPS + 1  # an attempt's first steps, in which kernels are compiled and captured


def train(config: RunConfig, *, signals: Signals | None = None, evaluation: MakeHook | None = None) -> ExitCode:
    """Runs to train.steps or until it is asked to leave, from the newest good checkpoint of run.dir where there is one.

    Args:
        evaluation: makes the hook for the section `evaluation`, which this folder knows nothing of.

    Raises:
        ConfigError, ParallelError, DataError, KernelError, CheckpointError, NoProgressError, StoppedError,
        DivergedError, ReplicasDifferError, RunInUseError: one sentence each, for the user.
    """
    config.check_world(world_size())
    allow_open_files()
    if config.evaluation.tasks and evaluation is None:
        raise ConfigError("evaluation.tasks is set, which only `sambalm train` measures: start it so, or leave it out")
    signals, marks = signals or Signals(), Marks()
    with watching(config, signals=signals, marks=marks) as watchdog:
        initial: InitialWeights | None = None
        if is_main_process():  # the others wait for it where the process group is made
            _check_data(config)
            initial = find_initial_weights(config)
        with open_run_folder(config, marks) as folder:
            if is_main_process():
                watchdog.watch_in(folder.attempt, ledger=folder.ledger, processes=folder.processes)
                if folder.checkpoint is None:
                    _warn_unless_convertible(config)
            copies = weight_copies(config.model, tensor_ranks=config.parallel.tensor)
            with start_world(config.parallel, copies=copies) as world, folder.shared(world) as folder:
                watchdog.watch_in(folder.attempt, ledger=folder.ledger, processes=folder.processes)
                initial = world.broadcast_object(initial)
                ending, step = _train(
                    config, world, initial, folder=folder, signals=signals, marks=marks, evaluation=evaluation
                )
                folder.end(ending, step=step, world=world)
                return ending.exit_code


def _check_data(config: RunConfig) -> None:
    """
    Raises:
        DataError: data are missing, damaged, not of the model's vocabulary, or validated on and trained on as well.
    """
    separate = config.data.separate_validation
    sources, parts = open_data(config, open_sources)
    validation = open_sources(separate) if separate else []
    trained = sources_of(sources, parts)
    check_vocabulary(config.data, [*trained, *validation], vocab_size=config.model.vocab_size)
    check_separate(trained, validation)


def _warn_unless_convertible(config: RunConfig) -> None:
    """Tells the user before a new run trains, instead of after it."""
    from sambalm.pretrain.checkpointing.to_hf import conversion_refusal  # here: imports transformers, for seconds

    if refusal := conversion_refusal(config):
        print_warning(f"`sambalm convert to-hf` would refuse this run's model: {refusal}")


def _train(
    config: RunConfig,
    world: World,
    initial: InitialWeights | None,
    *,
    folder: RunFolder,
    signals: Signals,
    marks: Marks,
    evaluation: MakeHook | None,
) -> tuple[Ending, int]:
    """Trains, again after each way back to an earlier checkpoint; returns how the attempt ends, and at which step."""
    rollback: RollBack | None = None
    while True:
        trainer = Trainer(
            config,
            world,
            folder=folder,
            signals=signals,
            marks=marks,
            initial=initial,
            rollback=rollback,
            evaluation=evaluation,
        )
        try:
            return trainer.fit(), trainer.step
        except RollBack as found:
            rollback = found.with_traceback(None)  # which would hold on to the model
        marks.enter(Phase.START_UP)
        set_newer_checkpoints_aside(Path(config.run.dir), rollback, folder=folder, world=world)
        trainer.training.executor.release()
        del trainer
        _free_memory()


def _free_memory() -> None:
    """Gives the device back what a trainer that is no longer used held: a run builds its model anew to go back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Trainer:
    """One rank's part of a run, from its newest good checkpoint on.

    Args:
        marks: told of the phases that this rank comes through.
        initial: what a run without a checkpoint starts from; None: it draws its weights.
        rollback: why an earlier trainer of the attempt ended; None for the attempt's first.
        evaluation: as in `train`.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        *,
        folder: RunFolder,
        signals: Signals,
        marks: Marks,
        initial: InitialWeights | None = None,
        rollback: RollBack | None = None,
        evaluation: MakeHook | None = None,
    ) -> None:
        self.evaluation = evaluation
        self.config, self.world, self.folder, self.signals, self.marks = config, world, folder, signals, marks
        self.compiling_steps = COMPILING_STEPS  # from here on
        checkpoint = find_resume_point(config, world=world, opened=None if rollback else folder.checkpoint)
        sources, parts = open_data(config, shared_sources)
        record = data_record(config, sources, parts)
        self.schedule = config.schedule
        if checkpoint:
            check_started_from(checkpoint, config)
            check_data(checkpoint, record, config=config)
            started_from = checkpoint.state.get(STARTED_FROM)
        else:
            started_from = initial.record() if initial else None
        self.step: int = checkpoint.step if checkpoint else 0
        self.samples: int = checkpoint.state["samples"] if checkpoint else 0
        self.rollbacks = Rollbacks(config.train.max_rollbacks)
        self.stragglers = Stragglers(config.stragglers, world=world)
        self.hooks = self._hooks(sources, record, started_from)
        states = checkpoint.state.get("hooks", {}) if checkpoint else {}  # none in one of an older version
        for hook in self.hooks:
            if hook.name in states:
                hook.load_state(states[hook.name])
        if rollback:
            self.rollbacks.load_state(rollback.record)
            folder.ledger.roll_back(self.step)
        self.schedule.check_stretch(self.samples, world_size=world.size)
        if not self.rollbacks.left_out:
            self.schedule.check_position(self.samples, step=self.step)
        self.training = build_training(config, world=world, checkpoint=checkpoint, initial=initial)
        if world.is_main:
            if rollback:
                print_line(f"{rollback}; instead, the run goes back to step {self.step}")
            lines = start_lines(
                config, world=world, training=self.training, checkpoint=checkpoint, started_from=started_from
            )
            print_line("\n".join(lines))
        self.datasets = build_train_datasets(parts, seed=config.run.seed)
        for dataset in self.datasets if world.is_main and not rollback else ():
            for prefix, count in dataset.cut_documents().items():
                print_warning(
                    f"{count:,} documents of {prefix} have more tokens than data.sequence_length "
                    f"{dataset.sequence_length} and one label, and lose their ends: raise it, or leave them out"
                )
        for dataset in self.datasets:
            dataset.check_labels_count()
        self.phase = self.schedule.at(self.samples)
        self.loader = self._loader()

    def _loader(self) -> BatchLoader[MicroBatch]:
        """What reads the phase at hand from the sample at hand on."""
        return BatchLoader(
            self.datasets[self.phase.number],
            make_batch=MicroBatch,
            micro_batch_samples=self.phase.config.train.micro_batch_size,
            data_rank=self.world.data_rank,
            data_size=self.world.data_size,
            start_sample=self.samples,
            vocab_size=self.config.model.vocab_size,
            workers=self.config.data.workers,
        )

    def _begin(self, phase: RunPhase) -> None:
        """Goes over to another phase, whose micro-batches may have another size."""
        self.loader.close()
        self.phase = phase
        self.loader = self._loader()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()  # graphs that are under way must end before they are given up
        self.training.executor.begin_anew()
        self.compiling_steps = COMPILING_STEPS
        if self.world.is_main:
            print_line(f"step {self.step + 1} begins {phase_line(self.schedule, phase)}")

    def _hooks(
        self, sources: Sequence[Source], record: dict[str, Any], started_from: Mapping[str, Any] | None
    ) -> list[Hook]:
        """What happens around the steps, in this order: a record of a step holds its validation and precedes a save."""
        config, world, ledger = self.config, self.world, self.folder.ledger
        separate = config.data.separate_validation
        hooks: list[Hook] = []
        folder = self.folder
        guards = Guards(config, world=world, rollbacks=self.rollbacks, ledger=ledger)
        checkpointer = Checkpointer(
            config,
            world=world,
            data=record,
            started_from=started_from,
            folder=folder,
            guards=guards,
            marks=self.marks,
            hooks=hooks,
        )
        hooks += [
            LeaseGuard(folder, world=world),
            Profiler(config.train.profile_steps, run_dir=Path(config.run.dir), world=world),
            SaveOutcomes(checkpointer),
            Validator(config, sources, separate=shared_sources(separate) if separate else (), world=world),
            *([self.evaluation(config, world)] if self.evaluation and config.evaluation.tasks else []),
            self.stragglers,
            RunReport(config, world=world, done_steps=self.step),
            self.rollbacks,
            guards,
            ReplicaCheck(config, world=world, rollbacks=self.rollbacks),
            LedgerEntries(ledger, done_steps=self.step),
            checkpointer,
        ]
        return hooks

    def fit(self) -> Ending:
        """Trains to the last step or to a request to leave, and calls the hooks on the way."""
        ending: Ending | None = None
        with closing(self.training.executor), ExitStack() as ends:
            ends.callback(lambda: self.loader.close())  # that of the last phase
            for hook in self.hooks:
                hook.on_start(self.training)
                ends.push(lambda error, *_, hook=hook: hook.on_end(None if error or not ending else ending.exit_code))
            ends.callback(self.marks.enter, Phase.LEAVE)
            self.signals.training_starts()
            unread: LaunchedStep | None = None  # a step that the device may still be at
            while self.step < self.config.train.steps:
                self.marks.enter(Phase.FIRST_STEP if self.compiling_steps else Phase.STEP, step=self.step + 1)
                launched, request = self._launch_step(), Request.NOTHING
                self.compiling_steps = max(0, self.compiling_steps - 1)
                if unread:  # only now, so that the device always has work
                    self._finish(unread)
                    request = unread.request()
                unread = launched
                if request or self._finishes_at_once(launched):
                    request = max(request, launched.request(), self._request_of_phase())
                    self._finish(launched, request)
                    unread = None
                if request > Request.SAVE and self.step < self.config.train.steps:
                    ending = ENDINGS[request]
                    return ending
            ending = ENDINGS[Request.NOTHING]
        return ending

    def _finishes_at_once(self, step: LaunchedStep) -> bool:
        """Whether a step's results are read before the next step is launched."""
        is_last = step.number == self.config.train.steps or self.samples == self.phase.end_sample
        return is_last or step.is_finished or any(hook.acts_on(step.number) for hook in self.hooks)

    def _request_of_phase(self) -> Request:
        """What the phase at hand asks for after the step at hand."""
        ends = self.samples == self.phase.end_sample and self.step < self.config.train.steps
        return Request.STOP if ends and self.phase.stops else Request.NOTHING

    def _finish(self, step: LaunchedStep, request: Request = Request.NOTHING) -> None:
        """Tells the hooks of a step. Waits for the device."""
        votes = dict(zip(self.hooks, step.votes(), strict=True))
        finished = FinishedStep(number=step.number, result=step.result(), request=request, votes=votes)
        for hook in self.hooks:
            with self.marks.during(hook.phase):
                hook.after_step(finished)
            if hook.phase is Phase.VALIDATION and hook.acts_on(step.number):  # which gives captured graphs up
                self.compiling_steps = max(1, self.compiling_steps)

    def _launch_step(self) -> LaunchedStep:
        """One optimizer step over the global batch."""
        for hook in self.hooks:
            hook.before_step(self.step + 1)
        batch_samples = self._pass_over_left_out()
        start = Moment.after_all(self.world.device)
        # Whatever a step draws depends on the seed and the step alone, so resuming needs no generator's state.
        torch.manual_seed(self.config.run.seed + self.step)
        lr = self.schedule.learning_rate(self.step + 1, samples=self.samples)
        set_learning_rate(self.training.engine.optimizer, lr)
        executor = self.training.executor
        with self.stragglers.watching(self.step + 1):
            micro_batches = [self._micro_batch() for _ in range(self._micro_batches(batch_samples))]
            executor.train_step(weighted(micro_batches, self.world))
        norm = gradient_norm(self.training.engine)
        self.samples += batch_samples
        self.step += 1
        return LaunchedStep.launch(
            number=self.step,
            tokens=self.phase.first_token + (self.samples - self.phase.first_sample) * self.phase.length,
            batch_tokens=batch_samples * self.phase.length,
            lr=lr,
            start=start,
            loss=executor.guard.loss,
            norm=norm,
            skipped=executor.guard.skips(norm),
            agreed=self.world.largest([self._asked(), *(hook.vote() for hook in self.hooks)]),
        )

    def _pass_over_left_out(self) -> int:
        """Goes on to the next samples that no rollback leaves out; returns how many the step at hand takes."""
        while True:
            if (phase := self.schedule.at(self.samples)) is not self.phase:
                self._begin(phase)
            batch_samples = self.schedule.step_samples(self.samples)
            if not self.rollbacks.leaves_out(range(self.samples, self.samples + batch_samples)):
                return batch_samples
            for _ in range(self._micro_batches(batch_samples)):
                self.loader.next_micro_batch()
            self.samples += batch_samples

    def _micro_batches(self, batch_samples: int) -> int:
        """Micro-batches of this rank in a step."""
        return self.phase.config.accumulation_steps(data_size=self.world.data_size, batch_samples=batch_samples)

    def _asked(self) -> Request:
        """What this rank is asked for."""
        asked = self.signals.take()
        return max(asked, take_switches(Path(self.config.run.dir))) if self.world.is_main else asked

    def _micro_batch(self) -> MicroBatch:
        """This rank's part of the next sequences."""
        # A wait beside a device that is still at work costs nothing.
        with self.marks.during(Phase.FETCH, unless=self.world.device_is_busy):
            batch = self.loader.next_micro_batch()
        return batch.on_rank(self.world)
