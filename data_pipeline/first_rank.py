"""Work that one rank does for all."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from .errors import DataError

Result = TypeVar("Result")


def on_first_rank(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and return its result, which must pickle, on every rank; alone, simply run it.

    Every rank has to call this. An exception of rank 0 is raised on all as DataError, so that none waits for ever.
    """
    if not dist.is_initialized():
        return action()
    outcome, cause = [None, None], None
    if dist.get_rank() == 0:
        try:
            outcome = [action(), None]
        except Exception as error:
            outcome, cause = [None, str(error) or type(error).__name__], error
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise DataError(failure) from cause
    return result
