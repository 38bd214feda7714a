"""Validation losses at the training length and at multiples of it: of the held-out parts together and of each source's,
and of separate validation data by name.
"""

import itertools
from collections.abc import Sequence

import torch

from sambalm.data_pipeline.dataset import ValidationDataset, build_validation_dataset
from sambalm.data_pipeline.loader import validation_batches
from sambalm.data_pipeline.sources import Source
from sambalm.parallel.execution import Executor
from sambalm.parallel.groups import World
from sambalm.parallel.micro_batch import MicroBatch
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook, is_due
from sambalm.pretrain.lifecycle.phases import Phase
from sambalm.pretrain.reporting.metrics_file import LOSS_AT, NAMED_LOSS_AT, SOURCE_LOSS_AT
from sambalm.pretrain.training import Training


class Validator(Hook):
    """Validates a run on the same held-out samples each time and adds the losses to the step's metrics.

    The samples are found when it is made, so that a run without them does not start.

    Args:
        sources: of the training data, whose held-out parts are validated on.
        separate: of data.validation.
    """

    phase = Phase.VALIDATION

    def __init__(
        self, config: RunConfig, sources: Sequence[Source], *, world: World, separate: Sequence[Source] = ()
    ) -> None:
        self.config, self.sources, self.separate, self.world = config, sources, separate, world
        multiples = config.validation.length_multiples
        holds_out = any(config.data.validation_fractions)
        self.held_out = {m: self._dataset(m, sources, held_out=True) for m in multiples if holds_out}
        self.named = {m: self._dataset(m, separate, held_out=False) for m in multiples if separate}

    def on_start(self, training: Training) -> None:
        self.executor = training.executor

    def acts_on(self, step: int) -> bool:
        return is_due(step, every_steps=self.config.validation.every_steps, last_step=self.config.train.steps)

    def after_step(self, step: FinishedStep) -> None:
        if self.acts_on(step.number):
            step.metrics.update(self.losses(self.executor))

    def losses(self, executor: Executor) -> dict[str, float]:
        """Mean loss in nats by metric name; every token counts once. Collective."""
        found: dict[str, float] = {}
        for multiple, dataset in self.held_out.items():
            sums = self._sums(executor, dataset, multiple)
            found[f"{LOSS_AT}{dataset.sequence_length}"] = sum(sums) / (len(dataset) * dataset.sequence_length)
            if len(self.sources) > 1:
                found |= _by_name(SOURCE_LOSS_AT, dataset, self.sources, sums)
        for multiple, dataset in self.named.items():
            found |= _by_name(NAMED_LOSS_AT, dataset, self.separate, self._sums(executor, dataset, multiple))
        return found

    def _sums(self, executor: Executor, dataset: ValidationDataset, multiple: int) -> list[float]:
        """Sum over the tokens of each source. Collective."""
        totals = torch.zeros(len(dataset.source_counts()), dtype=torch.float64, device=self.world.device)
        batches = validation_batches(
            dataset,
            make_batch=MicroBatch,
            micro_batch_samples=max(1, self.config.train.micro_batch_size // multiple),
            data_rank=self.world.data_rank,
            data_size=self.world.data_size,
            vocab_size=self.config.model.vocab_size,
        )
        while group := list(itertools.islice(batches, self.world.pipeline.size)):  # a round of the pipeline
            parts = [item.batch.on_rank(self.world) for item in group]
            for item, losses in zip(group, executor.losses(parts), strict=True):
                of_rows = losses.double().sum(dim=1) * item.weights.to(totals.device)
                totals.index_add_(0, item.sources.to(totals.device), of_rows)
        return self.world.sum_over_replicas(totals).tolist()

    def _dataset(self, multiple: int, sources: Sequence[Source], *, held_out: bool) -> ValidationDataset:
        length = multiple * self.config.data.sequence_length
        return build_validation_dataset(
            self.config.data,
            sources,
            num_samples=max(1, self.config.validation.tokens // length),
            seed=self.config.run.seed,
            length_multiple=multiple,
            held_out=held_out,
        )


def _by_name(
    metric: str, dataset: ValidationDataset, sources: Sequence[Source], sums: Sequence[float]
) -> dict[str, float]:
    """Mean loss of each source that has samples, by metric name."""
    length = dataset.sequence_length
    return {
        f"{metric}{length}/{source.name}": total / (count * length)
        for source, count, total in zip(sources, dataset.source_counts(), sums, strict=True)
        if count
    }
