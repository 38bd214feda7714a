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
        self.held_out = held_out_datasets(config, sources)
        self.named = _datasets(config, separate, held_out=False) if separate else {}

    def on_start(self, training: Training) -> None:
        self.executor = training.executor

    def acts_on(self, step: int) -> bool:
        return is_due(step, every_steps=self.config.validation.every_steps, last_step=self.config.train.steps)

    def after_step(self, step: FinishedStep) -> None:
        if self.acts_on(step.number):
            step.metrics.update(self.losses(self.executor))

    def losses(self, executor: Executor) -> dict[str, float]:
        """Mean loss in nats by metric name; every token that counts does so once. Collective."""
        found: dict[str, float] = {}
        for multiple, dataset in self.held_out.items():
            sums, counts = self._sums(executor, dataset, multiple)
            if any(counts):
                found[f"{LOSS_AT}{dataset.sequence_length}"] = sum(sums) / sum(counts)
            if len(self.sources) > 1:
                found |= _by_name(f"{SOURCE_LOSS_AT}{dataset.sequence_length}", self.sources, sums, counts)
        for multiple, dataset in self.named.items():
            sums, counts = self._sums(executor, dataset, multiple)
            found |= _by_name(f"{NAMED_LOSS_AT}{dataset.sequence_length}", self.separate, sums, counts)
        return found

    def _sums(self, executor: Executor, dataset: ValidationDataset, multiple: int) -> tuple[list[float], list[float]]:
        """Sums of the losses of each source, and how many tokens count there. Collective."""
        samples = torch.tensor(dataset.source_counts(), dtype=torch.float64, device=self.world.device)
        totals, counts = torch.zeros_like(samples), torch.zeros_like(samples)
        is_weighted = False
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
            for item, part, losses in zip(group, parts, executor.losses(parts), strict=True):
                rows, sources = item.weights.to(totals.device), item.sources.to(totals.device)
                if (weights := part.loss_weights) is not None:
                    losses, is_weighted = losses * weights, True
                    counts.index_add_(0, sources, weights.double().sum(dim=1) * rows)
                totals.index_add_(0, sources, losses.double().sum(dim=1) * rows)
        counts = self.world.sum_over_replicas(counts) if is_weighted else samples * dataset.sequence_length
        return self.world.sum_over_replicas(totals).tolist(), counts.tolist()


def held_out_datasets(config: RunConfig, sources: Sequence[Source]) -> dict[int, ValidationDataset]:
    """Returns by multiple of the training length the samples of the held-out parts; nothing where none is held out.

    Raises:
        DataError: these parts make no sample of some length, or no label of theirs counts.
    """
    return _datasets(config, sources, held_out=True) if any(config.data.validation_fractions) else {}


def _datasets(config: RunConfig, sources: Sequence[Source], *, held_out: bool) -> dict[int, ValidationDataset]:
    return {
        multiple: build_validation_dataset(
            config.data,
            sources,
            num_samples=max(1, config.validation.tokens // (multiple * config.data.sequence_length)),
            length_multiple=multiple,
            held_out=held_out,
        )
        for multiple in config.validation.length_multiples
    }


def _by_name(
    metric: str, sources: Sequence[Source], sums: Sequence[float], counts: Sequence[float]
) -> dict[str, float]:
    """Mean loss of each source that has tokens that count, by metric name."""
    return {
        f"{metric}/{source.name}": total / count
        for source, total, count in zip(sources, sums, counts, strict=True)
        if count
    }
