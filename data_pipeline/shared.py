"""The same sources on every rank, each index made by one process of those that see the same files."""

import os

import torch.distributed as dist

from .config import DataConfig
from .errors import DataError
from .sources import Source, open_sources


def shared_sources(config: DataConfig) -> list[Source]:
    """`open_sources` for every rank of a run: the first rank's. Collective where torch.distributed is initialised.

    On file systems that nodes share, the first rank's index serves all. On others, the first rank of each node
    checks that node's copy and makes its own index.
    Raises DataError on every rank where the data of any node is damaged, or is not that of the first rank.
    """
    if not dist.is_initialized():
        return open_sources(config)
    box = [_outcome(config) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(box, src=0)
    sources = _sources_or_error(box[0])
    failure = None
    if dist.get_rank() != 0 and os.environ.get("LOCAL_RANK") == "0":
        failure = _difference(sources, _outcome(config))
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for rank, reason in enumerate(failures):
        if reason:
            raise DataError(f"on the node of rank {rank}: {reason}")
    return sources


def _outcome(config: DataConfig) -> list[Source] | str:
    try:
        return open_sources(config)
    except DataError as error:
        return str(error)
    except Exception as error:  # the others wait for this rank's word
        return f"{type(error).__name__}: {error}"


def _sources_or_error(outcome: list[Source] | str) -> list[Source]:
    if isinstance(outcome, str):
        raise DataError(outcome)
    return outcome


def _difference(wanted: list[Source], found: list[Source] | str) -> str | None:
    if isinstance(found, str):
        return found
    for one, other in zip(wanted, found, strict=True):
        if one.content() != other.content():
            return (
                f"the data under {one.prefix} is not that of the first rank's node; copy it anew, or give all nodes "
                "one shared directory"
            )
    return None
