"""Held-out losses at the training length and at multiples of it."""

import itertools

import torch

from sambalm.data_pipeline.dataset import SampleDataset, build_validation_dataset
from sambalm.data_pipeline.loader import validation_batches
from sambalm.parallel.execution import Execution
from sambalm.parallel.pipeline import MicroBatch
from sambalm.parallel.state import World
from sambalm.pretrain.config import RunConfig

LOSS_AT = "validation_loss_"  # and the length in tokens: the name of a metric


class Validator:
    """Validates a run on the same held-out samples each time; they are found when the run starts."""

    def __init__(self, config: RunConfig, *, world: World) -> None:
        self.config, self.world = config, world
        self.datasets = {multiple: self._dataset(multiple) for multiple in config.validation.length_multiples}

    def losses(self, execution: Execution) -> dict[str, float]:
        """Mean loss in nats by metric name; every held-out token counts once. Collective."""
        return {
            f"{LOSS_AT}{dataset.sequence_length}": self._loss(execution, dataset, multiple)
            for multiple, dataset in self.datasets.items()
        }

    def _loss(self, execution: Execution, dataset: SampleDataset, multiple: int) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        batches = validation_batches(
            dataset,
            num_samples=len(dataset),
            micro_batch_samples=max(1, self.config.train.micro_batch_size // multiple),
            data_rank=self.world.data_rank,
            data_size=self.world.data_size,
            vocab_size=self.config.model.vocab_size,
        )
        while group := list(itertools.islice(batches, self.world.pipeline.size)):  # a round of the pipeline
            parts = [MicroBatch(*batch).on_rank(self.world) for batch, _ in group]
            for (_, weights), losses in zip(group, execution.losses(parts), strict=True):
                total += (losses.double() * weights.to(total.device).unsqueeze(1)).sum()
        return self.world.sum_over_replicas(total).item() / (len(dataset) * dataset.sequence_length)

    def _dataset(self, multiple: int) -> SampleDataset:
        length = multiple * self.config.data.sequence_length
        return build_validation_dataset(
            self.config.data,
            num_samples=max(1, self.config.validation.tokens // length),
            seed=self.config.run.seed,
            length_multiple=multiple,
        )
