"""The processes that measure together: one alone, or all ranks of a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from sambalm.evaluation.errors import EvaluationError
from sambalm.parallel.config import ParallelConfig
from sambalm.parallel.environment import world_size
from sambalm.parallel.groups import start_world
from sambalm.pretrain.errors import one_sentence

T = TypeVar("T")


class Ranks(Protocol):
    """What an evaluation asks of its processes; `World` is one. Methods are collective."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""

    def of_main(self, action: Callable[[], T]) -> T:
        """Runs an action on the main process alone; all return its result or raise its error."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Returns the values of all, in their order."""


class Alone:
    """One process by itself."""

    rank, size, is_main = 0, 1, True

    def of_main(self, action: Callable[[], T]) -> T:
        return action()

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]


@contextmanager
def started(device: str | None) -> Iterator[tuple[Ranks, str | None]]:
    """Yields the processes that torchrun has started, or this one alone, and the device of this one.

    Args:
        device: what the user names; None for the GPU where there is one. Under torchrun each process has its own GPU.

    Raises:
        EvaluationError: one device of several is named for several processes.
    """
    if world_size() == 1:
        yield Alone(), device
        return
    if device is not None and device not in ("cpu", "cuda"):
        raise EvaluationError(f"--device is {device}, and {world_size()} processes cannot share it: leave it out")
    with start_world(ParallelConfig()) as world:
        yield world, device if device == "cpu" else str(world.device)


def on_each(ranks: Ranks, action: Callable[[], T]) -> list[T]:
    """Runs an action on each process; returns the results of all, in their order. Collective.

    Raises:
        Exception: on every process where one fails: its own error, or an EvaluationError with the sentence of another.
    """
    result, failure = _tried(action)
    found = ranks.all_gather_object((result, _sentence(failure)))
    _raise_first(failure, [told for _, told in found])
    return [each for each, _ in found]


def main_first(ranks: Ranks, action: Callable[[], T]) -> T:
    """Runs an action on the main process, which may leave files behind, and then on the others. Collective.

    Raises:
        Exception: as `on_each`.
    """
    result: Any = None
    failure: Exception | None = None
    for turn in (True, False):
        if ranks.is_main is turn:
            result, failure = _tried(action)
        _raise_first(failure, ranks.all_gather_object(_sentence(failure)))
    return result


def _tried(action: Callable[[], T]) -> tuple[Any, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # whatever it is: the other processes would wait for this one
        return None, error


def _sentence(failure: Exception | None) -> str | None:
    """Returns what an error says, since not every error can be sent."""
    return None if failure is None else one_sentence(failure)


def _raise_first(own: Exception | None, told: list[str | None]) -> None:
    if own is not None:
        raise own
    for sentence in told:
        if sentence is not None:
            raise EvaluationError(sentence)
