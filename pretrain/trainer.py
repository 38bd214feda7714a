"""The training loop: fetch, forward and backward, step, and the hooks that do everything else."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from sambalm.data_pipeline.dataset import build_train_dataset
from sambalm.data_pipeline.loader import BatchLoader
from sambalm.data_pipeline.shared import shared_sources
from sambalm.data_pipeline.sources import Source, check_vocabulary, open_sources
from sambalm.model.registry import weight_copies
from sambalm.parallel.config import layout_name
from sambalm.parallel.environment import is_main_process, world_size
from sambalm.parallel.groups import World, start_world
from sambalm.parallel.micro_batch import MicroBatch
from sambalm.parallel.zero.engine import gradient_norm
from sambalm.pretrain.checkpointing.data_record import data_record
from sambalm.pretrain.checkpointing.load import check_data, find_resume_point
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.launched_step import LaunchedStep, Moment
from sambalm.pretrain.lifecycle.checkpointer import Checkpointer
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook
from sambalm.pretrain.lifecycle.run_folder import LeaseGuard, RunFolder, open_run_folder
from sambalm.pretrain.lifecycle.signals import Request, Signals, take_switches
from sambalm.pretrain.lifecycle.skipped_steps import SkippedSteps
from sambalm.pretrain.reporting.metrics import RunReport
from sambalm.pretrain.training import build_training
from sambalm.pretrain.validation import Validator

LEAVING = {Request.LEAVE: ExitCode.REQUEUE, Request.STOP: ExitCode.STOPPED}


def train(config: RunConfig, *, signals: Signals | None = None) -> ExitCode:
    """Runs to train.steps or until it is asked to leave, from the newest good checkpoint of run.dir where there is one.

    Raises:
        ConfigError, ParallelError, DataError, KernelError, CheckpointError, NoProgressError, StoppedError,
        DivergedError, RunInUseError: one sentence each, for the user.
    """
    config.check_world(world_size())
    if is_main_process():  # the others wait for it where the process group is made
        check_vocabulary(config.data, open_sources(config.data), vocab_size=config.model.vocab_size)
    with (
        open_run_folder(config) as folder,
        start_world(config.parallel, copies=weight_copies(config.model, tensor_ranks=config.parallel.tensor)) as world,
        folder.shared(world) as folder,
    ):
        trainer = Trainer(config, world, folder=folder, signals=signals or Signals())
        exit_code = trainer.fit()
        folder.end(exit_code, step=trainer.step, world=world)
        return exit_code


class Trainer:
    """One rank's part of a run."""

    def __init__(self, config: RunConfig, world: World, *, folder: RunFolder, signals: Signals) -> None:
        self.config, self.world, self.folder, self.signals = config, world, folder, signals
        checkpoint = find_resume_point(config, world=world, opened=folder.checkpoint)
        sources = shared_sources(config.data)
        record = data_record(config, sources)
        if checkpoint:
            check_data(checkpoint, record, config=config)
        self.step: int = checkpoint.step if checkpoint else 0
        self.samples: int = checkpoint.state["samples"] if checkpoint else 0
        self.hooks = self._hooks(sources, record)
        self.training = build_training(config, world=world, checkpoint=checkpoint)
        if world.is_main:
            print(self._start_line(), file=sys.stderr)
        self.loader = BatchLoader(
            build_train_dataset(config.data, sources, seed=config.run.seed),
            make_batch=MicroBatch,
            micro_batch_samples=config.train.micro_batch_size,
            data_rank=world.data_rank,
            data_size=world.data_size,
            start_sample=self.samples,
            vocab_size=config.model.vocab_size,
            workers=config.data.workers,
        )

    def _hooks(self, sources: Sequence[Source], record: dict[str, Any]) -> list[Hook]:
        """What happens around the steps, in this order: a record of a step holds its validation and precedes a save."""
        config, world = self.config, self.world
        hooks: list[Hook] = []
        hooks += [
            LeaseGuard(self.folder, world=world),
            Validator(config, sources, world=world),
            RunReport(config, world=world, done_steps=self.step),
            SkippedSteps(config.train.max_skipped_steps, speaks=world.is_main),
            Checkpointer(config, world=world, data=record, folder=self.folder, hooks=hooks),
        ]
        return hooks

    def _start_line(self) -> str:
        layout = layout_name(self.config.parallel, world_size=self.world.size)
        names = " ".join(self.training.kernels.names)
        return f"{self.world.size} x {self.world.device.type}, {layout}, from step {self.step}; {names}"

    def fit(self) -> ExitCode:
        """Trains to the last step or to a request to leave, and calls the hooks on the way."""
        exit_code: ExitCode | None = None
        with closing(self.loader), closing(self.training.executor), ExitStack() as ends:
            for hook in self.hooks:
                hook.on_start(self.training)
                ends.push(lambda error, *_, hook=hook: hook.on_end(None if error else exit_code))
            self.signals.training_starts()
            unread: LaunchedStep | None = None  # a step that the device may still be at
            while self.step < self.config.train.steps:
                launched, request = self._launch_step(), Request.NOTHING
                if unread:  # only now, so that the device always has work
                    self._finish(unread)
                    request = unread.request()
                unread = launched
                if request or self._finishes_at_once(launched):
                    request = max(request, launched.request())
                    self._finish(launched, request)
                    unread = None
                if request in LEAVING and self.step < self.config.train.steps:
                    exit_code = LEAVING[request]
                    return exit_code
            exit_code = ExitCode.FINISHED
        return exit_code

    def _finishes_at_once(self, step: LaunchedStep) -> bool:
        """Whether a step's results are read before the next step is launched."""
        is_last = step.number == self.config.train.steps
        return is_last or step.is_finished or any(hook.acts_on(step.number) for hook in self.hooks)

    def _finish(self, step: LaunchedStep, request: Request = Request.NOTHING) -> None:
        """Tells the hooks of a step. Waits for the device."""
        finished = FinishedStep(number=step.number, result=step.result(), request=request)
        for hook in self.hooks:
            hook.after_step(finished)

    def _launch_step(self) -> LaunchedStep:
        """One optimizer step over the global batch."""
        start = Moment.after_all(self.world.device)
        # Whatever a step draws depends on the seed and the step alone, so resuming needs no generator's state.
        torch.manual_seed(self.config.run.seed + self.step)
        lr = self.config.optimizer.learning_rate(self.step + 1, steps=self.config.train.steps)
        for group in self.training.engine.optimizer.param_groups:
            group["lr"] = lr
        batch_samples = self.config.batch_schedule.step_samples(self.samples)
        micro_batches = self.config.accumulation_steps(data_size=self.world.data_size, batch_samples=batch_samples)
        loss = self.training.executor.train_step([self._micro_batch() for _ in range(micro_batches)])
        mean_loss = self.world.sum_over_replicas(loss) / self.world.replica_size
        self.samples += batch_samples
        self.step += 1
        length = self.config.data.sequence_length
        return LaunchedStep.launch(
            number=self.step,
            tokens=self.samples * length,
            batch_tokens=batch_samples * length,
            lr=lr,
            start=start,
            loss=mean_loss,
            norm=gradient_norm(self.training.engine),
            request=self.world.largest(self._asked()),
        )

    def _asked(self) -> Request:
        """What this rank is asked for."""
        asked = self.signals.take()
        return max(asked, take_switches(Path(self.config.run.dir))) if self.world.is_main else asked

    def _micro_batch(self) -> MicroBatch:
        """This rank's part of the next sequences."""
        return self.loader.next_micro_batch().on_rank(self.world)
