"""The training samples of a run in phases: what each phase draws, behind what the phases before it have drawn."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .config import DataConfig
from .dataset import DrawnBefore, TrainDataset, build_train_dataset
from .sources import Source


@dataclass(frozen=True)
class DataPart:
    """One phase's part of the data: how many samples it draws, and of which sources."""

    config: DataConfig
    sources: Sequence[Source]
    samples: int


def open_parts(
    configs: Sequence[tuple[DataConfig, int]], *, open_sources: Callable[[DataConfig], list[Source]]
) -> list[DataPart]:
    """Returns the parts of phases, each given by its section and its samples.

    Args:
        open_sources: or a collective one; called once for sources that several phases have.
    """
    opened: list[tuple[DataConfig, list[Source]]] = []
    parts = []
    for config, samples in configs:
        sources = next((sources for known, sources in opened if known.train == config.train), None)
        if sources is None:
            sources = open_sources(config)
            opened.append((config, sources))
        parts.append(DataPart(config, sources, samples))
    return parts


def build_train_datasets(parts: Sequence[DataPart], *, seed: int) -> list[TrainDataset]:
    """Returns the data set of each phase; sample n of the run is number n of its phase's.

    A source goes on where earlier phases with samples of the same length have left it. With another length its text is
    cut anew, and nothing is known of what has been seen.

    Raises:
        DataError: a source is shorter than one sample of a phase.
    """
    numbers: dict[str, int] = {}
    drawn: Counter[tuple[str, int]] = Counter()
    datasets, first = [], 0
    for part in parts:
        length = part.config.sequence_length
        prefixes = [source.prefix for source in part.sources]
        for prefix in prefixes:
            numbers.setdefault(prefix, len(numbers))
        before = DrawnBefore(first, [numbers[p] for p in prefixes], [drawn[p, length] for p in prefixes])
        dataset = build_train_dataset(part.config, part.sources, seed=seed, before=before)
        drawn.update({(p, length): n for p, n in zip(prefixes, dataset.counts(part.samples), strict=True)})
        datasets.append(dataset)
        first += part.samples
    return datasets
