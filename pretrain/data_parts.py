"""The data of a run, opened: the sources of data.train, and of each phase its own."""

from collections.abc import Callable, Sequence

from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.phases import DataPart, open_parts
from sambalm.data_pipeline.sources import Source, are_indexed
from sambalm.pretrain.config import RunConfig


def open_data(
    config: RunConfig, open_sources: Callable[[DataConfig], list[Source]]
) -> tuple[list[Source], list[DataPart]]:
    """Returns the sources of data.train, whose held-out parts validate the run, and the part of each phase.

    Args:
        open_sources: or a collective one; called once for each list of sources.
    """
    phases = [(phase.config.data, phase.samples) for phase in config.schedule.phases]
    first, *parts = open_parts([(config.data, 0), *phases], open_sources=open_sources)
    return list(first.sources), parts


def sources_of(sources: Sequence[Source], parts: Sequence[DataPart]) -> list[Source]:
    """Returns every source that a run trains or validates on once, by its prefix."""
    found = {source.prefix: source for source in sources}
    for part in parts:
        found |= {source.prefix: source for source in part.sources if source.prefix not in found}
    return list(found.values())


def data_warning(config: RunConfig) -> str | None:
    """Returns what is to be done before a job starts on a run's data, as they are seen from here; None: nothing.

    Its GPUs would wait while one process reads all tokens, or for a refusal.
    """
    phases = [phase.config.data for phase in config.schedule.phases]
    separate = [config.data.separate_validation] if config.data.separate_validation else []
    try:
        if all([are_indexed(data) for data in (config.data, *phases, *separate)]):
            return None
    except DataError as error:
        return f"{error}; a job that finds no more ends with exit code 2"
    return "the data have no index yet, and all GPUs wait while one process makes it: run `sambalm data index` first"
