"""What a task says of itself: its items, how they are measured, and how records become scores."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, ClassVar, Generic, TypeVar

from sambalm.evaluation.models.base import LanguageModel
from sambalm.evaluation.plots import Plot
from sambalm.evaluation.settings import TaskSettings
from sambalm.pretrain.config import RunConfig

Settings = TypeVar("Settings", bound=TaskSettings)


@dataclass(frozen=True)
class Item:
    """The smallest part of a task that is measured, and whose record a killed evaluation keeps.

    Args:
        id: names it within the task.
        tokens: that the model reads for it; items of as many in a row are measured together.
        rows: texts that these are tokens of, all of one length.
        content: what the task measures it by.
    """

    id: str
    tokens: int
    rows: int = 1
    content: Any = None


@dataclass(frozen=True)
class Score:
    """A number that a task ends with.

    Args:
        name: of the measure, "accuracy" for example.
        at: what it was measured at, such as {"length": 4096}.
        standard_error: of the value, None where there are fewer than two items.
        chance: what a model that knows nothing gets, None where that says nothing.
        items: measured for it.
    """

    name: str
    at: Mapping[str, int | float | str]
    value: float
    standard_error: float | None
    chance: float | None
    items: int


@dataclass(frozen=True)
class Outcome:
    """What the records of a task add up to.

    Args:
        scores: the table's rows, in order.
        details: further numbers for the JSON alone.
        plot: what the picture shows.
    """

    scores: Sequence[Score]
    plot: Plot
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Surroundings:
    """What a task is made with besides its settings.

    Args:
        model: the model under test.
        run: the configuration of the run that trained it, None where that is not known.
        cache_dir: where indices of data may be kept.
    """

    model: LanguageModel
    run: RunConfig | None
    cache_dir: Path


class Task(ABC, Generic[Settings]):
    """Something to measure of any model, from its settings alone.

    Attributes:
        name: on the command line and in files.
        version: changes whenever other items or another way of measuring make old records useless.
        summary: one line for the list of tasks.
        schema: the keys of its settings.
        pads: whether items of different lengths are measured together.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    summary: ClassVar[str]
    schema: ClassVar[type[TaskSettings]]
    pads: ClassVar[bool] = False

    def __init__(self, settings: Settings, surroundings: Surroundings) -> None:
        self.settings = settings
        self.model = surroundings.model
        self.run = surroundings.run
        self.cache_dir = surroundings.cache_dir

    @abstractmethod
    def items(self) -> list[Item]:
        """Returns all items, in the order in which they are measured.

        Raises:
            EvaluationError: the settings ask for what there is not.
        """

    @abstractmethod
    def measure(self, items: Sequence[Item], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        """Measures items together, of equal `tokens` unless the task pads.

        Args:
            tick: is told tokens that the model has read.

        Returns:
            of each item a record of plain values. Its key `tokens`, where there is one, stands for those of the item
            in results.
        """

    @abstractmethod
    def outcome(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        """Adds up the records of all items, which are in the order of the items."""

    def protocol(self) -> dict[str, Any]:
        """Returns what else results depend on, besides settings and weights: the content of data, the tokenizer."""
        return {}


def mean_score(
    name: str, values: Sequence[float], *, at: Mapping[str, int | float | str], chance: float | None
) -> Score:
    """Makes the score of the mean of values, with its standard error."""
    return Score(name, at, fmean(values), standard_error(values), chance, len(values))


def standard_error(values: Sequence[float]) -> float | None:
    """Returns that of the mean of independent values, None for fewer than two."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
