"""The training loop: fetch, forward and backward, step, and what happens between steps."""

import sys
from contextlib import closing
from pathlib import Path

import torch

from sambalm.data_pipeline.dataset import build_train_dataset
from sambalm.data_pipeline.loader import BatchLoader
from sambalm.data_pipeline.shared import shared_sources
from sambalm.data_pipeline.sources import check_vocabulary, open_sources
from sambalm.model.registry import weight_copies
from sambalm.parallel.groups import World, is_main_process, start_world, world_size
from sambalm.parallel.micro_batch import MicroBatch
from sambalm.parallel.zero.engine import gradient_norm
from sambalm.pretrain.checkpointing.data_record import data_record
from sambalm.pretrain.checkpointing.load import check_data, find_resume_point
from sambalm.pretrain.checkpointing.write import remove_old_checkpoints, save_checkpoint
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.launched_step import LaunchedStep, Moment
from sambalm.pretrain.lifecycle.run_folder import RunFolder, open_run_folder
from sambalm.pretrain.lifecycle.signals import Request, Signals, take_switches
from sambalm.pretrain.lifecycle.skipped_steps import SkippedSteps
from sambalm.pretrain.reporting.metrics import RunReport, StepResult
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
        folder.shared(world),
    ):
        trainer = Trainer(config, world, folder=folder, signals=signals or Signals())
        exit_code = trainer.fit()
        folder.end(exit_code, step=trainer.step, world=world)
        return exit_code


class Trainer:
    """One rank's part of a run."""

    def __init__(self, config: RunConfig, world: World, *, folder: RunFolder, signals: Signals) -> None:
        self.config, self.world, self.folder, self.signals = config, world, folder, signals
        self.run_dir = Path(config.run.dir)
        checkpoint = find_resume_point(config, world=world)
        sources = shared_sources(config.data)
        self.data_record = data_record(config, sources)
        if checkpoint:
            check_data(checkpoint, self.data_record, config=config)
        self.step, self.samples = (checkpoint.step, checkpoint.state["samples"]) if checkpoint else (0, 0)
        self.validator = Validator(config, sources, world=world)
        self.training = build_training(config, world=world, checkpoint=checkpoint)
        self.skipped = SkippedSteps(config.train.max_skipped_steps, speaks=world.is_main)
        if world.is_main:
            names = " ".join(self.training.kernels.names)
            print(f"{world.size} x {world.device.type}, from step {self.step}; {names}", file=sys.stderr)
        self.loader = BatchLoader(
            build_train_dataset(config.data, sources, seed=config.run.seed),
            micro_batch_samples=config.train.micro_batch_size,
            data_rank=world.data_rank,
            data_size=world.data_size,
            start_sample=self.samples,
            vocab_size=config.model.vocab_size,
            workers=config.data.workers,
        )

    def fit(self) -> ExitCode:
        """Trains to the last step or to a request to leave, with validation and checkpoints on the way."""
        steps, validation = self.config.train.steps, self.config.validation
        with (
            RunReport(self.config, world=self.world, done_steps=self.step) as report,
            closing(self.loader),
            closing(self.training.execution),
        ):
            self.signals.training_starts()
            unread = None  # a step that the device may still be at
            while self.step < steps:
                launched, request = self._launch_step(), Request.NOTHING
                if unread:  # only now, so that the device always has work
                    self._record(report, unread.number, unread.result(), {})
                    request = unread.request()
                unread = launched
                validate = self.step == steps or self.step % validation.every_steps == 0
                save = self.step == steps or self.step % self.config.checkpoint.every_steps == 0
                if validate or save or request or launched.is_finished:
                    result, request = launched.result(), max(request, launched.request())
                    losses = self.validator.losses(self.training.execution) if validate else {}
                    self._record(report, launched.number, result, losses)
                    unread = None
                if save or request:
                    self._save()
                if request in LEAVING and self.step < steps:
                    return LEAVING[request]
        return ExitCode.FINISHED

    def _record(self, report: RunReport, number: int, result: StepResult, losses: dict[str, float]) -> None:
        report.step(number, result, losses)
        self.skipped.step(number, result.grad_norm)

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
        loss = self.training.execution.train_step([self._micro_batch() for _ in range(micro_batches)])
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
        return max(asked, take_switches(self.run_dir)) if self.world.is_main else asked

    def _save(self) -> None:
        save_checkpoint(
            self.training.parts,
            config=self.config,
            world=self.world,
            step=self.step,
            samples=self.samples,
            data=self.data_record,
            before_commit=self.folder.check_lease,
        )
        remove_old_checkpoints(self.run_dir, keep=self.config.checkpoint.keep, world=self.world)

    def _micro_batch(self) -> MicroBatch:
        """This rank's part of the next sequences."""
        return MicroBatch(*self.loader.next_micro_batch()).on_rank(self.world)
